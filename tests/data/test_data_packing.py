"""Rows, packed and separate, against a plain loop over the stream, for any documents and any row length."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.rows.packing import IGNORED, PackedRows, SeparateRows, TokenStream

END = 9
documents_of = st.lists(st.lists(st.integers(0, 8), max_size=12), min_size=1, max_size=12)


def stream_of(documents, dtype=np.uint16, gap=0):
    """The documents with END behind each, `gap` strange tokens apart in the file."""
    pieces, starts, at = [], [], 0
    for document in documents:
        starts.append(at)
        pieces += [*document, END, *[7777] * gap]
        at = len(pieces)
    lengths = np.array([len(document) + 1 for document in documents], dtype=np.int64)
    return TokenStream(np.array(pieces, dtype=dtype), np.array(starts, dtype=np.int64), lengths)


def plain_rows(documents, seq_len):
    """The same by the definition, a token at a time."""
    tokens, labels, within = [], [], []
    for document in documents:
        whole = [*document, END]
        tokens += whole
        labels += [*whole[1:], IGNORED]
        within += range(len(whole))
    rows = []
    for first in range(0, len(tokens) - seq_len + 1, seq_len):
        part = slice(first, first + seq_len)
        positions = []
        for at in within[part]:
            positions.append(0 if at == 0 or not positions else positions[-1] + 1)
        rows.append((tokens[part], positions, labels[part]))
    return tokens, rows


@given(documents_of, st.integers(1, 20), st.integers(0, 2))
def test_rows_are_what_the_definition_says(documents, seq_len, gap):
    packed = PackedRows(stream_of(documents, gap=gap), seq_len)
    tokens, expected = plain_rows(documents, seq_len)
    assert len(packed) == len(expected) == len(tokens) // seq_len
    ids = np.arange(len(packed))
    batch = packed.rows(ids)
    assert all(part.dtype == np.int64 and part.shape == (len(packed), seq_len) for part in batch)
    for row, (inputs, positions, labels) in enumerate(expected):
        assert batch.input_ids[row].tolist() == inputs
        assert batch.position_ids[row].tolist() == positions
        assert batch.labels[row].tolist() == labels
    assert batch.input_ids.ravel().tolist() == tokens[: len(packed) * seq_len]
    assert packed.label_tokens(ids).tolist() == (batch.labels != IGNORED).sum(axis=1).tolist()


@given(documents_of, st.integers(1, 6), st.data(), st.booleans())
def test_rows_come_in_the_order_asked_for(documents, seq_len, data, pack):
    stream = stream_of(documents)
    packed = PackedRows(stream, seq_len) if pack else SeparateRows(stream, seq_len, END)
    if not len(packed):
        return
    ids = np.array(data.draw(st.lists(st.integers(0, len(packed) - 1), max_size=8)), dtype=np.int64)
    everything = packed.rows(np.arange(len(packed)))
    for some, whole in zip(packed.rows(ids), everything, strict=True):
        assert np.array_equal(some, whole[ids])
    assert packed.label_tokens(ids).dtype == np.int64


def test_the_last_position_looks_into_the_next_row_and_into_the_dropped_tail():
    packed = PackedRows(stream_of([[1, 2, 3, 4, 5]]), 2)
    batch = packed.rows(np.arange(3))
    assert batch.labels.tolist() == [[2, 3], [4, 5], [END, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1]] * 3
    short = PackedRows(stream_of([[1, 2, 3]]), 3)
    assert len(short) == 1
    assert short.rows(np.array([0])).labels.tolist() == [[2, 3, END]]


def test_an_end_token_inside_a_text_is_an_ordinary_token():
    packed = PackedRows(stream_of([[1, END, 2], [3]]), 6)
    assert packed.rows(np.array([0])).labels.tolist() == [[END, 2, END, IGNORED, END, IGNORED]]
    assert packed.label_tokens(np.array([0])).tolist() == [4]


@pytest.mark.parametrize("ids", [[-1], [3], [0, 7]])
def test_rows_that_are_not_there(ids):
    packed = PackedRows(stream_of([[1, 2, 3, 4, 5]]), 2)
    with pytest.raises(IndexError):
        packed.rows(np.array(ids))
    with pytest.raises(IndexError):
        packed.label_tokens(np.array(ids))


def test_senseless_arguments():
    with pytest.raises(ValueError, match="seq_len"):
        PackedRows(stream_of([[1]]), 0)
    stream = TokenStream(np.zeros(1, np.uint16), np.zeros(1, np.int64), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="without tokens"):
        PackedRows(stream, 2)
    with pytest.raises(ValueError, match="without tokens"):
        SeparateRows(stream, 2, END)


N = IGNORED
PAD = 5


@pytest.mark.parametrize(
    ("documents", "seq_len", "inputs", "labels"),
    [
        ([[1, 2], [3]], 4, [[1, 2, END, PAD], [3, END, PAD, PAD]], [[2, END, N, N], [END, N, N, N]]),
        # As long as a row, and one token longer: its end-of-document token alone makes no row.
        ([[1, 2, 3]], 4, [[1, 2, 3, END]], [[2, 3, END, N]]),
        ([[1, 2, 3, 4]], 4, [[1, 2, 3, 4]], [[2, 3, 4, END]]),
        ([[1, 2, 3, 4, 6]], 4, [[1, 2, 3, 4], [6, END, PAD, PAD]], [[2, 3, 4, 6], [END, N, N, N]]),
        # Nothing but an end: no row. In the middle of others it moves none.
        ([[]], 4, [], []),
        ([[1], [], [2]], 2, [[1, END], [2, END]], [[END, N], [END, N]]),
        ([[1, 2]], 1, [[1], [2]], [[2], [END]]),
    ],
)
def test_separate_rows(documents, seq_len, inputs, labels):
    rows = SeparateRows(stream_of(documents), seq_len, PAD)
    assert len(rows) == len(inputs)
    found = rows.rows(np.arange(len(rows)))
    assert found.input_ids.tolist() == inputs
    assert found.labels.tolist() == labels
    assert found.position_ids.tolist() == [list(range(seq_len))] * len(inputs)


@given(documents_of, st.integers(1, 20), st.integers(0, 2))
def test_separate_rows_have_each_label_once_behind_its_document(documents, seq_len, gap):
    rows = SeparateRows(stream_of(documents, gap=gap), seq_len, PAD)
    ids = np.arange(len(rows))
    found = rows.rows(ids)
    assert all(part.dtype == np.int64 and part.shape == (len(rows), seq_len) for part in found)
    counted = found.labels != IGNORED
    pairs = list(zip(found.input_ids[counted].tolist(), found.labels[counted].tolist(), strict=True))
    whole = [[*document, END] for document in documents]
    assert pairs == [pair for tokens in whole for pair in itertools.pairwise(tokens)]
    # The labels that packing has too, but for those of its dropped tail.
    packed = PackedRows(stream_of(documents, gap=gap), seq_len)
    theirs = packed.rows(np.arange(len(packed))).labels.ravel()
    theirs = theirs[theirs != IGNORED].tolist()
    assert [label for _, label in pairs][: len(theirs)] == theirs
    # A label has nothing but its own document before it in the row, and nothing behind it but padding.
    assert rows.label_tokens(ids).tolist() == counted.sum(axis=1).tolist()
    assert all(row[: row.sum()].all() and row.sum() > 0 for row in counted)
    assert len(rows) == sum(-(-len(document) // seq_len) for document in documents)
    own = sum(min(seq_len, int(count) + 1) for count in counted.sum(axis=1))
    assert rows.padding == pytest.approx(1 - own / (len(rows) * seq_len) if len(rows) else 0.0)

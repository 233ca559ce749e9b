"""Rows of whole documents against a plain loop over them, for any documents, masks and row length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.rows.packing import IGNORED, TokenStream
from dstrain.data.rows.split import split_stream
from dstrain.data.rows.whole_documents import WholeDocumentRows, best_fit, fit, label_counts

FILL = 99
documents_of = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=20
)


def stream_of(documents, gap=0):
    """The documents with ``gap`` strange, trained tokens between them in the file."""
    tokens, trained, starts = [], [], []
    for document in documents:
        starts.append(len(tokens))
        tokens += [token for token, _ in document] + [77] * gap
        trained += [is_trained for _, is_trained in document] + [True] * gap
    bits = np.packbits(np.array(trained, bool), bitorder="little")
    lengths = np.array([len(document) for document in documents], np.int64)
    return TokenStream(np.array(tokens, np.uint16), np.array(starts, np.int64), lengths, bits)


@given(documents_of, st.integers(12, 40), st.integers(0, 2), st.booleans())
def test_rows_are_what_the_definition_says(documents, seq_len, gap, pack):
    rows = WholeDocumentRows(stream_of(documents, gap), seq_len, FILL, pack=pack)
    batch = rows.rows(np.arange(len(rows)))
    found = []
    for inputs, positions, labels in zip(*(part.tolist() for part in batch), strict=True):
        assert len(inputs) == len(positions) == len(labels) == seq_len
        begins = [at for at, position in enumerate(positions) if position == 0]
        assert begins[0] == 0 and (pack or len(begins) == 1)
        for first, last in zip(begins, [*begins[1:], seq_len], strict=True):
            assert positions[first:last] == list(range(last - first))
            found.append((inputs[first:last], labels[first:last]))
    expected = []
    for document in documents:
        tokens = [token for token, _ in document]
        labels = [token if is_trained else IGNORED for token, is_trained in document[1:]] + [IGNORED]
        expected.append((tokens, labels))
    # The last document of a row has the padding behind it.
    left = sorted(expected)
    for tokens, labels in found:
        match = next(
            one
            for one in left
            if tokens[: len(one[0])] == one[0]
            and labels[: len(one[1])] == one[1]
            and set(tokens[len(one[0]) :]) <= {FILL}
            and set(labels[len(one[1]) :]) <= {IGNORED}
        )
        left.remove(match)
    assert not left
    assert rows.label_tokens(np.arange(len(rows))).tolist() == (batch.labels != IGNORED).sum(axis=1).tolist()
    filled = sum(map(len, documents))
    assert rows.padding == pytest.approx(1 - filled / (len(rows) * seq_len))


@given(documents_of)
def test_labels_are_counted(documents):
    stream = stream_of(documents, gap=1)
    expected = [sum(is_trained for _, is_trained in document[1:]) for document in documents]
    assert label_counts(stream).tolist() == expected


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_document_is_lost_and_no_row_too_full(lengths):
    order, ends = best_fit(np.array(lengths), 64)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[one] for one in row) for row in np.split(order, ends[:-1])]
    assert max(sizes) <= 64
    # Two rows that are half empty would have been one.
    assert sum(size <= 32 for size in sizes) <= 1


@pytest.mark.parametrize("seq_len", [512, 1024, 2048])
def test_conversations_fill_their_rows(seq_len):
    """Lengths as those of small talk: most are short, a few are long."""
    lengths = np.random.default_rng(5).lognormal(4.6, 0.8, 20_000).astype(np.int64).clip(8, seq_len)
    _, ends = best_fit(lengths, seq_len)
    assert lengths.sum() / (ends.size * seq_len) > 0.98


def test_windows_are_packed_alone(monkeypatch):
    monkeypatch.setattr("dstrain.data.rows.whole_documents._WINDOW", 3)
    order, ends = best_fit(np.array([5, 5, 1, 4, 4, 2]), 10)
    assert sorted(order[: ends[0]].tolist() + order[ends[0] : ends[1]].tolist()) == [0, 1, 2]


def test_too_long():
    documents = [[(1, True)] * 4, [(2, False)] * 6 + [(2, True)], [(3, True)] * 7]
    stream = stream_of(documents)
    dropped = fit(stream, 4, "drop")
    assert (dropped.stream.lengths.tolist(), dropped.cut, dropped.dropped) == ([4], 0, 2)
    cut = fit(stream, 4, "cut")
    assert (cut.stream.lengths.tolist(), cut.stream.starts.tolist()) == ([4, 4], [0, 11])
    assert (cut.cut, cut.dropped) == (1, 1), "of the second nothing is left to predict"
    with pytest.raises(ValueError, match="does not fit"):
        WholeDocumentRows(stream, 4, FILL)


def test_the_split_keeps_what_is_trained():
    train, held = split_stream(stream_of([[(1, True), (2, False)]] * 10), 0.3)
    assert held.lengths.size == 3
    assert label_counts(train).tolist() == [0] * 7 and label_counts(held).tolist() == [0] * 3
    assert train.trained is not None and held.trained is not None

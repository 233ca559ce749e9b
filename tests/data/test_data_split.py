"""The held-out split: its size, its determinism, and the advice when it comes out too small."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.rows.packing import IGNORED, PackedRows, TokenStream
from dstrain.data.rows.split import fraction_for, split_stream


def stream_of(lengths):
    lengths = np.array(lengths, dtype=np.int64)
    return TokenStream(np.arange(lengths.sum(), dtype=np.uint32), np.cumsum(lengths) - lengths, lengths)


def pieces(stream):
    return [
        tuple(range(start, start + length))
        for start, length in zip(stream.starts, stream.lengths, strict=True)
    ]


@given(st.lists(st.integers(2, 50), min_size=2, max_size=300), st.floats(0.001, 0.999))
def test_each_document_lands_whole_on_one_side(lengths, fraction):
    stream = stream_of(lengths)
    train, held = split_stream(stream, fraction)
    assert sorted(pieces(train) + pieces(held)) == pieces(stream)
    assert abs(len(pieces(held)) - fraction * len(lengths)) <= 1
    assert pieces(train) and pieces(held)


@given(st.integers(2, 10_000), st.floats(0.001, 0.999))
def test_a_single_document_is_cut(length, fraction):
    stream = stream_of([length])
    train, held = split_stream(stream, fraction)
    assert pieces(train)[0] + pieces(held)[0] == pieces(stream)[0]
    assert abs(held.size - fraction * length) <= 1 and train.size and held.size


def test_no_label_crosses_the_cut():
    train, held = split_stream(stream_of([8]), 0.5)
    assert PackedRows(train, 4).rows(np.array([0])).labels.tolist() == [[1, 2, 3, IGNORED]]
    batch = PackedRows(held, 4).rows(np.array([0]))
    assert batch.input_ids.tolist() == [[4, 5, 6, 7]]
    assert batch.labels.tolist() == [[5, 6, 7, IGNORED]]


def test_nothing_is_validation_at_zero():
    stream = stream_of([3, 4])
    assert split_stream(stream, 0) == (stream, None)


def test_the_choice_is_spread_and_never_changes():
    _, held = split_stream(stream_of([1] * 1000), 0.01)
    assert held.starts.tolist() == [81, 111, 287, 361, 497, 671, 744, 773, 855, 979]
    _, held = split_stream(stream_of([1] * 10_000), 0.2)
    assert all(150 < count < 250 for count in np.histogram(held.starts, bins=10, range=(0, 10_000))[0])


@given(st.lists(st.integers(2, 50), min_size=1, max_size=200), st.integers(1, 400))
def test_following_the_advice_holds_out_enough(lengths, tokens):
    stream = stream_of(lengths)
    fraction = fraction_for(stream, tokens)
    if fraction is not None:
        assert 0 < fraction < 0.5
        assert split_stream(stream, fraction)[1].size >= tokens


@pytest.mark.parametrize("lengths,tokens", [([10], 5), ([10], 11), ([4, 4], 4), ([4] * 10, 41)])
def test_no_advice_where_half_would_not_do(lengths, tokens):
    assert fraction_for(stream_of(lengths), tokens) is None

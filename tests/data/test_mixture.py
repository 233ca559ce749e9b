"""Mixtures: shares that hold in every step, phases, an order that is computed, and rows that keep their source's."""

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.rows.mixture import MixedRows, MixtureOrder
from dstrain.data.rows.order import dealt
from dstrain.data.rows.packing import PackedRows, TokenStream
from dstrain.mixture_shares import MixturePhase, parts_of, row_shares, rows_before, rows_of_sources

SHARES = st.lists(st.floats(0.001, 100), min_size=1, max_size=6)


def source_numbers(order: MixtureOrder, rows: dict[str, int], step: int) -> np.ndarray:
    return np.searchsorted(np.cumsum(list(rows.values())), order.sample_ids(step), side="right")


@settings(max_examples=200, deadline=None)
@given(SHARES, st.integers(0, 2**38))
def test_any_number_of_first_places_has_each_source_s_share(shares: list[float], places: int) -> None:
    counts = rows_of_sources(places, parts_of(shares))
    assert sum(counts.values()) == places
    for number, share in enumerate(shares):
        exact = Fraction(share) * places / sum(map(Fraction, shares))
        # Within a row for each source before it, and what a share of 24 bits leaves.
        assert abs(counts.get(number, 0) - exact) <= len(shares) + places * len(shares) / 2**23


@settings(max_examples=100, deadline=None)
@given(SHARES, st.integers(1, 5_000))
def test_one_more_place_is_of_one_source(shares: list[float], places: int) -> None:
    line = np.arange(places + 1)
    steps = [np.diff(counts) for counts in rows_of_sources(line, parts_of(shares)).values()]
    assert all(set(np.unique(each)) <= {0, 1} for each in steps)
    assert (sum(steps) == 1).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), SHARES), min_size=1, max_size=3),
    st.lists(st.integers(1, 200), min_size=6, max_size=6),
    st.integers(1, 40),
    st.integers(0, 2**64 - 1),
)
def test_each_source_is_read_in_whole_epochs_whatever_the_phases(
    phases: list[tuple[int, list[float]]], sizes: list[int], batch: int, seed: int
) -> None:
    ends = np.cumsum([steps for steps, _ in phases]).tolist()
    made = [MixturePhase(end, parts_of(shares)) for end, (_, shares) in zip(ends, phases, strict=True)]
    rows = {f"source {number}": size for number, size in enumerate(sizes)}
    order = MixtureOrder(rows, made, batch, seed)
    ids = np.concatenate([order.sample_ids(step) for step in range(1, ends[-1] + 1)])
    given_rows = rows_before(made, batch, len(sizes))[-1][1]
    first = 0
    for size, count in zip(sizes, given_rows, strict=True):
        times = np.bincount(ids[(ids >= first) & (ids < first + size)] - first, minlength=size)
        assert times.sum() == count
        assert times.max() - times.min() <= 1, "no row a second time before each was seen once"
        first += size


def test_the_order_is_what_it_was() -> None:
    # Of a fixed config: runs that are resumed with another version must see the same samples.
    order = MixtureOrder({"web": 100, "code": 40}, [MixturePhase(10, parts_of([3, 1]))], 8, seed=7)
    assert order.sample_ids(1).tolist() == [68, 3, 94, 22, 111, 120, 95, 15]
    assert order.sample_ids(10).tolist() == [132, 84, 12, 88, 91, 139, 82, 25]


def test_a_source_s_order_does_not_depend_on_its_place_in_the_list() -> None:
    one = MixtureOrder({"a": 50, "b": 70}, [MixturePhase(9, parts_of([1, 1]))], 10, seed=3)
    other = MixtureOrder({"b": 70, "a": 50}, [MixturePhase(9, parts_of([1, 1]))], 10, seed=3)
    of_a = [{int(i) for i in one.sample_ids(step) if i < 50} for step in range(1, 9)]
    of_a_again = [{int(i) - 70 for i in other.sample_ids(step) if i >= 70} for step in range(1, 9)]
    assert of_a == of_a_again


def test_phases_change_the_shares_at_their_step() -> None:
    rows = {"web": 1000, "code": 1000}
    phases = [MixturePhase(9, parts_of([1, 0])), MixturePhase(10, parts_of([1, 3]))]
    order = MixtureOrder(rows, phases, 100, seed=1)
    shares = [float((source_numbers(order, rows, step) == 1).mean()) for step in (1, 9, 10, 11)]
    assert shares == [0, 0, 0.75, 0.75], "and the last phase goes on"


def test_any_step_is_found_at_once_after_a_billion_tokens() -> None:
    rows = {f"source {number}": 10**7 + number for number in range(8)}
    order = MixtureOrder(rows, [MixturePhase(10**6, parts_of(range(1, 9)))], 512, seed=5)
    began = time.perf_counter()
    for step in range(10**6, 10**6 + 20):  # 512 rows of 2,048 tokens: 10**12 tokens later
        assert len(order.sample_ids(step)) == 512
    assert time.perf_counter() - began < 5


def test_micro_batches_are_the_same_whatever_the_replicas() -> None:
    order = MixtureOrder({"a": 9, "b": 30}, [MixturePhase(9, parts_of([1, 2]))], 24, seed=2)
    for replicas, micro_batch in ((1, 24), (2, 3), (4, 2), (3, 8)):
        parts = [
            dealt(order.sample_ids(4), replica=r, replicas=replicas, micro_batch=micro_batch)
            for r in range(replicas)
        ]
        together = [parts[r][m] for m in range(len(parts[0])) for r in range(replicas)]
        assert np.concatenate(together).tolist() == order.sample_ids(4).tolist()


def stream(first: int, documents: list[int]) -> TokenStream:
    lengths = np.array(documents, np.int64)
    tokens = np.arange(first, first + int(lengths.sum()), dtype=np.uint32)
    return TokenStream(tokens, np.cumsum(lengths) - lengths, lengths)


def test_mixed_rows_are_those_of_their_sources() -> None:
    parts = [PackedRows(stream(0, [5, 9, 30]), 8), PackedRows(stream(1000, [64]), 8)]
    mixed = MixedRows(parts)
    assert len(mixed) == len(parts[0]) + len(parts[1])
    ids = np.array([len(parts[0]) + 3, 0, 4, len(parts[0])])
    found = mixed.rows(ids)
    for at, (part, row) in enumerate(((1, 3), (0, 0), (0, 4), (1, 0))):
        expected = parts[part].rows(np.array([row]))
        for one, other in zip(found, expected, strict=True):
            assert (one[at] == other[0]).all()
        assert mixed.label_tokens(ids)[at] == parts[part].label_tokens(np.array([row]))[0]
        assert mixed.filled(ids)[at] == 8
    assert [mixed.source_of(int(row)) for row in ids] == [1, 0, 0, 1]
    with pytest.raises(IndexError, match="there are 13"):
        mixed.rows(np.array([13]))


def test_shares_of_tokens_become_shares_of_rows() -> None:
    # Rows of the second source are half full: for as many tokens it takes twice as many rows.
    assert row_shares([1, 1], [100, 50], [10, 10]) == pytest.approx([1 / 3, 2 / 3])
    assert row_shares([None, None], [100, 50], [10, 30]) == pytest.approx([0.25, 0.75])

"""The sample order: a permutation an epoch, the same on every layout, and for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.rows.order import SampleOrder, dealt, hash_words, permute, splitmix64


def test_splitmix64_is_the_published_one():
    # The first outputs of Vigna's splitmix64.c for the seed 1234567 (the values that Rosetta Code lists).
    states = [(1234567 + number * 0x9E3779B97F4A7C15) % 2**64 for number in range(5)]
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(np.array(states, dtype=np.uint64)).tolist() == expected


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_sends_each_place_somewhere_else(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size, dtype=np.uint64), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [2**40, 2**40 + 1, 2**62])
def test_permute_reaches_far(size):
    places = np.arange(0, size, size // 999, dtype=np.uint64)[:1000]
    out = permute(places, size, 5)
    assert out.min() >= 0 and out.max() < size and np.unique(out).size == places.size >= 999


@given(st.integers(1, 200), st.integers(1, 300), st.integers(-(2**70), 2**70), st.integers(1, 5))
def test_every_row_once_an_epoch_without_a_gap(rows, global_batch, seed, epochs):
    order = SampleOrder(rows, global_batch, seed)
    steps = -(-rows * epochs // global_batch)
    line = np.concatenate([order.sample_ids(step) for step in range(1, steps + 1)])
    assert line.dtype == np.int64
    for epoch in range(epochs):
        assert np.array_equal(np.sort(line[epoch * rows : (epoch + 1) * rows]), np.arange(rows))


@given(st.integers(1, 500), st.integers(1, 10**12), st.integers(0, 10))
def test_a_step_is_found_without_the_steps_before(rows, step, seed):
    warm = SampleOrder(rows, 12, seed)
    warm.sample_ids(step)
    warm.sample_ids(1)
    assert np.array_equal(warm.sample_ids(step), SampleOrder(rows, 12, seed).sample_ids(step))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_replicas_share_a_step_without_overlap_in_any_layout(replicas, micro_batch, accumulation, step):
    order = SampleOrder(97, replicas * micro_batch * accumulation, seed=3)
    shares = [
        dealt(order.sample_ids(step), replica=replica, replicas=replicas, micro_batch=micro_batch)
        for replica in range(replicas)
    ]
    assert all(len(batches) == accumulation for batches in shares)
    together = np.concatenate([shares[r][m] for m in range(accumulation) for r in range(replicas)])
    assert np.array_equal(together, order.sample_ids(step))


def test_golden_values_that_must_never_change():
    assert hash_words(1, 2) == 13608149317741381227
    order = SampleOrder(rows=1000, global_batch=8, seed=42)
    assert order.sample_ids(1).tolist() == [684, 180, 478, 628, 955, 381, 439, 384]
    assert order.sample_ids(126).tolist() == [436, 51, 965, 208, 568, 508, 55, 33]
    assert SampleOrder(5, 12, 0).sample_ids(1).tolist() == [4, 0, 3, 2, 1, 2, 1, 4, 0, 3, 1, 4]


def test_seeds_and_epochs_shuffle_differently_and_well():
    rows = 2000
    line = [SampleOrder(rows, rows, seed).sample_ids(step) for seed in (0, 1) for step in (1, 2)]
    for i, one in enumerate(line):
        for other in [np.arange(rows), *line[:i]]:
            # The correlation of two random permutations has a standard deviation of 1 / sqrt(rows - 1).
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(rows)
            assert (one == other).sum() < 10
        # LocalRanks in the order are no neighbours in the corpus.
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 5 / np.sqrt(rows)


@pytest.mark.parametrize("rows", [2, 3, 5, 10, 17])
def test_small_sets_are_shuffled_evenly(rows):
    """Each row is as likely as any other in each place (chi square with (rows - 1)**2 degrees of freedom)."""
    epochs = 3000
    seen = np.zeros((rows, rows))
    order = SampleOrder(rows, rows, seed=11)
    for step in range(1, epochs + 1):
        seen[np.arange(rows), order.sample_ids(step)] += 1
    freedom = (rows - 1) ** 2
    chi_square = ((seen - epochs / rows) ** 2 / (epochs / rows)).sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("rows,global_batch", [(0, 1), (1, 0)])
def test_senseless_sizes(rows, global_batch):
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(rows, global_batch, 0)


def test_senseless_requests():
    order = SampleOrder(10, 8, 0)
    with pytest.raises(ValueError, match="counted from 1"):
        order.sample_ids(0)
    with pytest.raises(ValueError, match="can't be dealt"):
        dealt(order.sample_ids(1), replica=0, replicas=3, micro_batch=1)
    with pytest.raises(ValueError, match=r"not in 0\.\.1"):
        dealt(order.sample_ids(1), replica=2, replicas=2, micro_batch=1)

"""Ranks, stages, replicas and hosts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.errors import DstrainError
from dstrain.planning.layout import Host, Layout, choose_data_parallel, fill_hosts
from dstrain.planning.plan import Machines
from tests.support.plans import plan

SIZES = {"pipeline": st.integers(1, 9), "data_parallel": st.integers(1, 9)}


def layout(pipeline: int, data_parallel: int, slots: int | None = None) -> Layout:
    ranks = pipeline * data_parallel
    slots = slots or ranks
    hosts = tuple(Host(f"node{i}", slots) for i in range(ranks // slots))
    return Layout(hosts, pipeline, data_parallel, tuple(range(pipeline + 1)))


@given(**SIZES)
def test_ranks_and_places_are_a_bijection(pipeline: int, data_parallel: int) -> None:
    it = layout(pipeline, data_parallel)
    pairs = list(itertools.product(range(pipeline), range(data_parallel)))
    assert sorted(it.rank(stage, replica) for stage, replica in pairs) == list(range(it.world_size))
    assert all((it.stage(r), it.replica(r)) == p for p in pairs for r in [it.rank(*p)])


@given(**SIZES)
def test_stages_of_a_replica_are_neighbours(pipeline: int, data_parallel: int) -> None:
    it = layout(pipeline, data_parallel)
    for replica in range(data_parallel):
        ranks = [it.rank(stage, replica) for stage in range(pipeline)]
        assert ranks == list(range(ranks[0], ranks[0] + pipeline))


@given(**SIZES, data=st.data())
def test_hosts_are_filled_one_after_the_other(pipeline: int, data_parallel: int, data: st.DataObject) -> None:
    ranks = pipeline * data_parallel
    slots = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    places = list(layout(pipeline, data_parallel, slots).places())
    assert [place.rank for place in places] == list(range(ranks))
    assert [(place.host, place.local_rank) for place in places] == [
        (f"node{rank // slots}", rank % slots) for rank in range(ranks)
    ]


@given(**SIZES)
def test_every_replica_holds_every_layer_once(pipeline: int, data_parallel: int) -> None:
    places = list(layout(pipeline, data_parallel).places())
    for replica in range(data_parallel):
        held = [n for place in places if place.replica == replica for chunk in place.chunks for n in chunk]
        assert sorted(held) == list(range(pipeline))


def test_dualpipev_folds_the_spans() -> None:
    it = Layout((Host("a", 2),), 2, 1, (0, 1, 3, 4, 8), "dualpipev")
    assert it.chunks(0) == (range(1), range(4, 8))
    assert it.chunks(1) == (range(1, 3), range(3, 4))


@pytest.mark.parametrize("cut", [(0, 2), (0, 1, 1), (0, 2, 1), (0, 1, 2, 3)])
def test_a_cut_has_one_non_empty_span_a_stage(cut: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cut"):
        Layout((Host("a", 2),), 2, 1, cut)


def test_the_slots_are_the_ranks() -> None:
    with pytest.raises(ValueError, match="4 ranks"):
        Layout((Host("a", 3),), 2, 2, (0, 1, 2))


@pytest.mark.parametrize(
    ("ranks", "filled"),
    [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1]), (12, [4, 4, 4])],
)
def test_fill_hosts(ranks: int, filled: list[int]) -> None:
    hosts = fill_hosts((Host("a", 4), Host("b", 4), Host("c", 4)), ranks)
    assert [host.slots for host in hosts] == filled
    assert [host.name for host in hosts] == ["a", "b", "c"][: len(filled)]


@pytest.mark.parametrize(
    ("pipeline", "asked", "devices", "replicas"),
    [
        (1, None, 1, 1),
        (1, None, 8, 8),
        (2, None, 8, 4),
        (8, None, 8, 1),
        (3, 1, 4, 1),  # one device stays idle because the user said so
        (2, 2, 8, 2),
        (4, None, None, 1),  # CPU: as many processes as are asked for
        (4, 3, None, 3),
    ],
)
def test_choose_data_parallel(pipeline: int, asked: int | None, devices: int | None, replicas: int) -> None:
    assert choose_data_parallel(pipeline, asked, devices, where="x") == replicas


@given(pipeline=st.integers(1, 20), asked=st.none() | st.integers(1, 20), devices=st.integers(1, 20))
def test_a_refusal_names_layouts_that_are_not_refused(pipeline: int, asked: int | None, devices: int) -> None:
    try:
        replicas = choose_data_parallel(pipeline, asked, devices, where="--pipeline")
    except DstrainError as error:
        hint = error.hint or ""
        assert error.where == "--pipeline"
    else:
        assert pipeline * replicas <= devices
        return
    found = 0
    for flag, numbers in hints(hint).items():
        for number in numbers:
            kept = None if "without --data-parallel" in hint else asked
            if flag == "--pipeline":
                choose_data_parallel(number, kept, devices, where="x")
            else:
                assert flag == "--data-parallel"
                choose_data_parallel(pipeline, number, devices, where="x")
            found += 1
    assert found


def hints(text: str) -> dict[str, list[int]]:
    """The numbers behind each flag of a hint: ``--a 1 or 2 uses 9; or --b 3`` -> a: 1, 2; b: 3."""
    found: dict[str, list[int]] = {}
    for part in text.split("--")[1:]:
        words = part.replace(",", " ").split()
        numbers = list(itertools.takewhile(lambda word: word.isdigit() or word == "or", words[1:]))
        if numbers:
            found["--" + words[0]] = [int(word) for word in numbers if word.isdigit()]
    return found


def test_three_stages_on_four_devices_say_both_ways_out() -> None:
    with pytest.raises(DstrainError) as caught:
        choose_data_parallel(3, None, 4, where="--pipeline")
    assert caught.value.message == "4 devices can't be divided evenly into 3 stages"
    assert hints(caught.value.hint or "") == {"--pipeline": [1, 2, 4], "--data-parallel": [1]}


def test_a_plan_fills_the_hosts_of_a_hostfile() -> None:
    machines = Machines((Host("a", 4), Host("b", 4)), "cuda")
    layout = plan(machines=machines, pipeline=4, global_batch=8).layout
    assert (layout.pipeline, layout.data_parallel) == (4, 2)
    assert [(p.host, p.stage, p.replica) for p in layout.places()] == [
        *(("a", stage, 0) for stage in range(4)),
        *(("b", stage, 1) for stage in range(4)),
    ]
    assert plan(machines=machines, pipeline=4, data_parallel=1).layout.hosts == (Host("a", 4),)


@pytest.mark.parametrize(
    ("slots", "flags"),
    [
        ((4, 2), {}),
        ((4, 4), {"pipeline": 3, "data_parallel": 2}),
        ((2, 2), {"pipeline": 3, "data_parallel": 1}),
    ],
)
def test_uneven_hosts_are_refused(slots: tuple[int, ...], flags: dict[str, int]) -> None:
    machines = Machines(tuple(Host(f"n{i}", n) for i, n in enumerate(slots)), "cuda")
    with pytest.raises(DstrainError, match="unevenly") as caught:
        plan(machines=machines, global_batch=48, **flags)
    assert caught.value.hint


@pytest.mark.parametrize(("pipeline", "schedule"), [(9, "1f1b"), (5, "dualpipev"), (100, "1f1b")])
def test_more_stages_than_layers(pipeline: int, schedule: str) -> None:
    with pytest.raises(DstrainError, match="more than the model's 8 layers") as caught:
        plan(pipeline=pipeline, schedule=schedule, global_batch=400)
    (most,) = hints(caught.value.hint or "")["--pipeline"]
    assert plan(pipeline=most, schedule=schedule, global_batch=400).layout.pipeline == most

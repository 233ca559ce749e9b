"""The search for the best layout finds what looking at all of them finds, and holds to what the user has chosen."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from dstrain.config.loader import ResolvedConfig, load_config, override
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device, Link, find_device
from dstrain.estimate.memory import USABLE, memory_needed
from dstrain.estimate.traffic import traffic
from dstrain.planning import model_shape
from dstrain.planning.fitting.candidates import Candidate, find_candidates, fixed_choices
from dstrain.planning.fitting.scores import Scores
from dstrain.planning.fitting.search import NEAR, Scored, choose, fit
from dstrain.planning.layout import Host
from dstrain.planning.layout_names import LayoutChoice
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import Layer, ModelShape
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import DATA, transformer

# A device beside which the models below are large, and a network that is felt.
SMALL = Device(
    name="small",
    kind="cuda",
    memory_bytes=None,
    flops={"fp32": 1e12, "bf16": 4e12},
    utilisation=0.5,
    memory_bandwidth=20e9,
    host_link=Link(2e9, 1e-5),
    inside=Link(5e9, 1e-5),
    between=Link(0.5e9, 5e-5),
    gpus_per_node=4,
    precisions=("fp32", "bf16"),
    layer_overhead=1e-4,
    source="made up",
)


def model(blocks: int = 6, hidden: int = 256, vocabulary: int = 1000) -> ModelShape:
    """A model whose activations weigh something, untied."""
    block, embedding = 12 * hidden * hidden, vocabulary * hidden
    layers = (
        Layer("embed", "embed", embedding, 0, {"embed": embedding}),
        *(
            Layer(
                f"block {i}", "block", block, 2 * block, {f"block.{i}": block}, 4.0 * hidden,
                (34 * hidden, 60 * hidden),
            )
            for i in range(blocks)
        ),
        Layer("head", "head", embedding, 2 * embedding, {"head": embedding}),
    )  # fmt: skip
    total = 2 * embedding + blocks * block
    return ModelShape("llama", hidden, vocabulary, 512, layers, (), total, None)


def machines(hosts: int, devices: int, megabytes: float | None, kind: str = "cuda") -> Machines:
    memory = None if megabytes is None else int(megabytes * 1e6)
    names = tuple(Host(f"node-{number}", devices) for number in range(hosts))
    return Machines(names, kind, memory_bytes=memory, device=replace(SMALL, kind=kind))


def config(**flags: Any) -> ResolvedConfig:
    """A config in which nothing that can be fitted has been chosen, but for ``flags``."""
    return load_config(settings=("seq_len=128",), flags=flags)


def every_plan(resolved: ResolvedConfig, model: ModelShape, on: Machines) -> Iterator[tuple[Candidate, Plan]]:
    """The plans of all candidates, each made as `dstrain plan` makes it."""
    device_is_host = on.accelerator == "cpu"
    for candidate in find_candidates(resolved, model, on.hosts, device_is_host=device_is_host).accepted:
        yield candidate, make_plan(override(resolved, candidate.flags), on, model, DATA, "model.json")


CASES = [
    ("roomy", model(), machines(1, 2, 4000), {"global_batch": 16}),
    ("tight", model(), machines(1, 4, 60), {"global_batch": 16}),
    ("hosts", model(), machines(3, 2, 80), {"global_batch": 12, "precision": "bf16"}),
    ("vocabulary", model(4, 128, 20_000), machines(1, 3, 90), {"global_batch": 9}),
    ("memory not known", model(), machines(1, 4, None), {"global_batch": 8}),
    ("deep", model(14, 128), machines(2, 4, 25), {"global_batch": 32, "precision": "bf16"}),
    ("processors", model(), machines(1, 4, 500, "cpu"), {"global_batch": 16}),
    ("processors of two hosts", model(), machines(2, 2, 500, "cpu"), {"global_batch": 16}),
    ("chosen", model(), machines(1, 4, 100), {"global_batch": 16, "pipeline": 2, "zero": 1}),
]


@pytest.mark.parametrize(("shape_", "on", "flags"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_search_finds_what_looking_at_all_finds(
    shape_: ModelShape, on: Machines, flags: dict[str, Any]
) -> None:
    resolved = config(**flags)
    assert on.device is not None
    found = fit(resolved, shape_, on, on.device, wanted=4)
    scores = Scores(resolved, shape_, on, on.device)
    limit = None if on.memory_bytes is None else USABLE * on.memory_bytes
    fitting = []
    for candidate, plan in every_plan(resolved, shape_, on):
        assert plan.time is not None
        assert scores.least_time(candidate) <= plan.time.total * (1 + 1e-9), candidate
        needed = memory_needed(plan.layout, plan.stage_memory, plan.accelerator)[0]
        if limit is None or needed <= limit:
            fitting.append(Scored(candidate, plan.layout, plan.time, needed))
    expected = choose(fitting, 4)
    assert found.fits
    assert found.looked_at == len(found.best) + sum(found.fallen.values())
    assert [row.candidate for row in found.best] == [row.candidate for row in expected]
    # The numbers are those that `dstrain plan` says with these choices.
    for row, plan in zip(found.best, expected, strict=True):
        assert (row.seconds, row.memory, row.layout) == (plan.seconds, plan.memory, plan.layout)


def test_most_candidates_are_never_timed() -> None:
    device = find_device("h100-80g", "here")
    on = replace(machines(16, 8, None), memory_bytes=device.memory_bytes, device=device)
    resolved = load_config(settings=("seq_len=4096",), flags={"global_batch": 512, "precision": "bf16"})
    found = fit(resolved, model(32, 4096, 128_256), on, device)
    assert found.fits and found.looked_at > 4000
    assert found.timed < found.looked_at / 10


def test_what_is_frozen_is_found_once_and_not_for_each_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    shape_, on = model(), machines(1, 4, 60)
    adapted = replace(shape_.layers[1], tensors={**shape_.layers[1].tensors, "q.lora_A.default.weight": 4096})
    shape_ = replace(shape_, layers=(shape_.layers[0], adapted, *shape_.layers[2:]))
    asked: list[str] = []
    monkeypatch.setattr(
        model_shape, "is_adapter_parameter", lambda name: bool(asked.append(name)) or "lora" in name
    )
    assert on.device is not None
    found = fit(config(global_batch=16, freeze=["nothing"]), shape_, on, on.device)
    assert found.timed > 5
    names = [name for layer in shape_.layers for name in layer.tensors]
    assert set(asked) == set(names)
    assert len(asked) == 2 * len(names)  # whether each is frozen, and how many each layer's adapter has


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_of_those_that_are_alike_a_larger_micro_batch_needs_no_less(zero: int) -> None:
    """Two micro-batches of 3 samples in 4 stages need less than three of 2: fewer wait when gradients are there."""
    shape_, on = model(14, 640), machines(1, 4, None)
    resolved = config(global_batch=6, pipeline=4, zero=zero, schedule="1f1b", activation_checkpointing=False)
    scores, alike = Scores(resolved, shape_, on, SMALL), dict[Hashable, list[tuple[int, int]]]()
    for candidate in find_candidates(resolved, shape_, on.hosts, device_is_host=False).accepted:
        needed = scores.memory(candidate, scores.fastest(candidate))
        alike.setdefault(scores.alike_in_memory(candidate), []).append((candidate.micro_batch, needed))
    assert all(
        [needed for _, needed in sorted(kind)] == sorted(n for _, n in kind) for kind in alike.values()
    )


def test_the_users_own_buckets_count() -> None:
    """A bucket of 4 GB is allocated whole: `plan` calls layouts with it too large on a device of 3 GB."""
    on = machines(1, 2, 3000)
    own = ("deepspeed.zero_optimization.reduce_bucket_size=1000000000",)
    flags = {"global_batch": 8, "precision": "bf16", "zero": 1}
    assert fit(load_config(settings=("seq_len=128",), flags=flags), model(), on, SMALL).fits
    assert not fit(load_config(settings=("seq_len=128", *own), flags=flags), model(), on, SMALL).fits


def test_zero_1_is_taken_where_zero_2_would_reduce_behind_each_micro_batch() -> None:
    """An 8B model in 4 stages of 8 replicas, 16 micro-batches: 126 GB of gradients a step in place of 7.9 GB."""
    device = find_device("h100-80g", "here")
    on = replace(machines(4, 8, None), memory_bytes=device.memory_bytes, device=device)
    chosen = {"global_batch": 128, "precision": "bf16", "pipeline": 4, "micro_batch": 1}
    resolved = load_config(settings=("seq_len=4096",), flags=chosen)
    large = transformer(32, 4096, 128_256, tied=False)
    best = fit(resolved, large, on, device, wanted=8).best
    assert best[0].candidate.layout.zero == 1
    of_zero_2 = fit(
        load_config(settings=("seq_len=4096",), flags={**chosen, "zero": 2}), large, on, device, wanted=1
    ).best[0]
    assert of_zero_2.time.data_parallel > 5 * best[0].time.data_parallel
    plan = make_plan(override(resolved, {"zero": 2, "data_parallel": 8}), on, large, DATA, "model.json")
    (warning,) = [text for text in plan.warnings if text.startswith("ZeRO-2 with a pipeline")]
    sent = {part.what: part.bytes for part in plan.time.traffic} if plan.time else {}
    once = traffic(plan.run_config.model_copy(update={"zero": 1}), large, plan.layout, plan.batch)
    for size in (sent["gradients"], {part.what: part.bytes for part in once}["gradients"]):
        assert f"{size / 1e9:,.1f} GB" in warning


def test_where_nothing_fits_the_nearest_are_named() -> None:
    on = machines(1, 2, 5)
    found = fit(config(global_batch=8), model(), on, SMALL, wanted=3)
    assert not found.fits and found.limit is not None
    assert found.looked_at == len(found.best) + sum(found.fallen.values())
    needs = [row.memory for row in found.best]
    assert needs == sorted(needs) and needs[0] > found.limit
    least = min(
        memory_needed(plan.layout, plan.stage_memory, "cuda")[0]
        for _, plan in every_plan(config(global_batch=8), model(), on)
    )
    assert needs[0] == least


def test_what_the_user_chose_stays_and_what_the_recipe_says_may_change() -> None:
    resolved = load_config(flags={"zero": 2, "micro_batch": 2})
    assert resolved.config.micro_batch == 2 and fixed_choices(resolved) == {"zero": 2, "micro_batch": 2}
    accepted = find_candidates(resolved, model(), (Host("localhost", 4),), device_is_host=False).accepted
    assert {c.layout.zero for c in accepted} == {2} and {c.micro_batch for c in accepted} == {2}
    assert {c.layout.pipeline for c in accepted} == {1, 2, 3, 4}
    # quickstart.yaml has a micro-batch of its own
    of_recipe = load_config()
    assert of_recipe.config.micro_batch == 4 and fixed_choices(of_recipe) == {}


def test_replicas_share_the_batch_and_the_hosts_evenly() -> None:
    hosts = (Host("a", 4), Host("b", 4))
    accepted = find_candidates(config(global_batch=12), model(), hosts, device_is_host=False).accepted
    replicas = {c.layout.pipeline: c.layout.data_parallel for c in accepted}
    # 5 to 7 ranks would fill two hosts unevenly, and 12 samples are not shared by 8 replicas
    assert replicas == {1: 4, 2: 4, 3: 1, 4: 2, 8: 1}


def test_a_router_loss_keeps_its_micro_batch() -> None:
    routed = replace(model(), router_loss=True)
    accepted = find_candidates(
        config(global_batch=16), routed, (Host("a", 2),), device_is_host=False
    ).accepted
    assert {c.micro_batch for c in accepted} == {4}  # quickstart.yaml's


def test_of_times_that_are_all_but_equal_the_simplest_comes_first() -> None:
    found = fit(config(global_batch=16), model(), machines(1, 2, 4000), SMALL, wanted=3)
    first = found.best[0]

    def like(seconds: float, **changes: Any) -> Scored:
        layout = replace(LayoutChoice(1, 1, 2), **changes)
        return replace(first, candidate=Candidate(layout, 4, False), time=replace(first.time, total=seconds))

    near, far = 1.0 * NEAR - 0.001, 1.0 * NEAR + 0.001
    staged = like(1.0, pipeline=2, data_parallel=1)
    assert choose([staged, like(near)], 2) == [like(near), staged]
    assert choose([staged, like(far)], 2) == [staged, like(far)]
    assert choose([like(1.0, zero=3), like(near, zero=0)], 1) == [like(near, zero=0)]
    # offloading without need is not worth a line
    assert choose([like(1.0), like(1.3, offload="cpu"), like(1.4, zero=2)], 3) == [
        like(1.0),
        like(1.4, zero=2),
    ]


def test_nothing_that_can_be_trained_is_one_clear_error() -> None:
    with pytest.raises(DstrainError, match="more stages than layers") as caught:
        fit(config(pipeline=12, global_batch=16), model(), machines(1, 12, 100), SMALL)
    assert caught.value.where == "--fit"

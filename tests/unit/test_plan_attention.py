"""Which attention a plan takes for `auto`, and what its estimates make of it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import Any

import pytest

from dstrain.api.machines import is_installed
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.planning.attention import FLASH_PACKAGES, VARLEN, with_chosen_attention
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import plan, shape

WITH_KERNEL = Machines((Host("localhost", 2),), "cuda", flash_packages=(FLASH_PACKAGES[VARLEN],))
OLDER_TORCH = replace(WITH_KERNEL, flash_packages=("flash_attn",))
OLDER_GPUS = replace(WITH_KERNEL, precisions=("fp32", "fp16"))
CPUS = replace(WITH_KERNEL, accelerator="cpu")
NO_VARLEN = replace(shape(), attention_refusals={VARLEN: "it can't"})
NO_SDPA = replace(shape(), attention_refusals={VARLEN: "it can't", "sdpa": "it can't"})
DROPOUT = replace(shape(), dropout=0.1)


@pytest.mark.parametrize(
    ("machines", "precision", "model", "asked", "chosen"),
    [
        (WITH_KERNEL, "bf16", shape(), "auto", VARLEN),
        (WITH_KERNEL, "fp16", shape(), "auto", VARLEN),
        (WITH_KERNEL, "fp32", shape(), "auto", "sdpa"),
        (WITH_KERNEL, "bf16", shape(), "sdpa", "sdpa"),
        (WITH_KERNEL, "bf16", NO_VARLEN, "auto", "sdpa"),
        (WITH_KERNEL, "bf16", NO_SDPA, "auto", "eager"),
        (WITH_KERNEL, "bf16", DROPOUT, "auto", "sdpa"),
        (OLDER_TORCH, "bf16", shape(), "auto", "sdpa"),
        (OLDER_GPUS, "fp16", shape(), "auto", "sdpa"),
        (CPUS, "bf16", shape(), "auto", "sdpa"),
    ],
)
def test_auto_takes_the_best_that_is_there(
    machines: Machines, precision: str, model: Any, asked: str, chosen: str
) -> None:
    resolved = load_config(flags={"precision": precision, "attention": asked})
    assert with_chosen_attention(resolved, model, *machines.kernels).config.attention == chosen


def test_the_plan_names_it_and_keeps_what_was_asked() -> None:
    made = plan(machines=WITH_KERNEL, precision="bf16")
    assert (made.attention, made.attention_of_model, made.config["attention"]) == (VARLEN, VARLEN, "auto")
    before = plan(machines=OLDER_TORCH, precision="bf16")
    assert (before.attention, before.attention_of_model) == ("sdpa", "auto")
    assert Plan.from_record(made.to_record()).attention == VARLEN
    older = {key: value for key, value in made.to_record().items() if key != "attention"}
    assert Plan.from_record(older).attention_of_model == "auto"


def test_no_mask_is_counted_with_it() -> None:
    layers = tuple(
        replace(layer, forward_flops_per_token_and_position=400.0 * (layer.kind == "block"))
        for layer in shape().layers
    )
    model = replace(shape(), layers=layers)

    def memory(machines: Machines, **choices: Any) -> int:
        made = plan(machines=machines, model=model, precision="bf16", seq_len=256, micro_batch=2, **choices)
        return made.stage_memory[0].total

    asked = {"settings": ("attention=sdpa",)}
    assert memory(WITH_KERNEL) < memory(WITH_KERNEL, **asked) == memory(OLDER_TORCH)
    whole = plan(machines=WITH_KERNEL, precision="bf16", model=replace(shape(), packing_leak="x"), pack=False)
    assert whole.attention == VARLEN


@pytest.mark.parametrize(
    ("machines", "precision", "model", "said"),
    [
        (CPUS, "bf16", shape(), "varlen has kernels for CUDA devices only"),
        (WITH_KERNEL, "fp32", shape(), "varlen has kernels for bf16 and fp16 only"),
        (OLDER_TORCH, "bf16", shape(), "varlen needs the Python package torch>=2.13"),
        (WITH_KERNEL, "bf16", NO_VARLEN, "can't have attention: varlen: it can't"),
        (WITH_KERNEL, "bf16", DROPOUT, "can't have attention: varlen: it has no dropout"),
    ],
)
def test_what_can_t_have_it_is_refused(machines: Machines, precision: str, model: Any, said: str) -> None:
    with pytest.raises(DstrainError) as error:
        plan(machines=machines, precision=precision, model=model, settings=(f"attention={VARLEN}",))
    assert said in error.value.message


@pytest.mark.parametrize(
    ("found", "there"),
    [("2.13.0+cpu", True), ("2.14.1", True), ("3.0", True), ("2.9.1", False), (None, False)],
)
def test_a_version_is_asked_for(found: str | None, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "torch" or found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("dstrain.api.machines.version", version)
    assert is_installed(FLASH_PACKAGES[VARLEN]) is there
    assert is_installed("json") and not is_installed("no_such_package")

"""What the plan refuses of a model and of how it is to be computed, and what it says with the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.model_lookup import find_model
from dstrain.config.files import is_hub_name, model_config_file
from dstrain.config.loader import load_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.memory import estimate
from dstrain.planning.layout import Host
from dstrain.planning.model_shape import ModelShape, Tied
from dstrain.planning.plan import Machines
from tests.support.plans import LAPTOP, plan, shape

GPUS = Machines((Host("localhost", 2),), "cuda", flash_packages=("flash_attn",))


def refused(**choices: Any) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        plan(**choices)
    return caught.value


# --- layers dropped at random


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_replicas_that_drop_other_layers_are_refused(zero: int) -> None:
    error = refused(model=shape(layerdrop=0.1), data_parallel=2, zero=zero)
    assert "layerdrop 0.1" in error.message and error.where == "--data-parallel"
    assert error.hint == "layerdrop: 0 in the model's config.json, or --data-parallel 1"


def test_one_replica_may_drop_layers() -> None:
    assert plan(model=shape(layerdrop=0.1), data_parallel=1).layout.data_parallel == 1
    assert plan(model=shape(layerdrop=0.0), data_parallel=2).layout.data_parallel == 2


# --- samples that depend on each other in a micro-batch


def test_samples_that_depend_on_each_other_do_not_share_a_micro_batch() -> None:
    leaking = shape(row_leak="x computes another result beside another sample")
    for choices in ({"micro_batch": 2}, {}):
        error = refused(model=leaking, data_parallel=1, global_batch=8, **choices)
        assert "x computes another result beside another sample" in error.message
        assert error.hint == "--micro-batch 1"
    assert plan(model=leaking, data_parallel=1, global_batch=8, micro_batch=1).batch.accumulation == 8


# --- randomness


def test_randomness_under_other_names_is_told() -> None:
    def told(**choices: Any) -> list[str]:
        return [w for w in plan(model=shape(**choices)).warnings if "random numbers" in w]

    assert "router_jitter_noise 0.01" in told(randomness="router_jitter_noise 0.01")[0]
    assert "set it to 0" in told(randomness="router_jitter_noise 0.01")[0]
    assert "no single value" in told(randomness="")[0] and "set it" not in told(randomness="")[0]
    assert not told()


def test_what_an_adapter_drops_by_the_layout_is_told() -> None:
    def told(**choices: Any) -> list[str]:
        return [w for w in plan(model=shape(**choices)).warnings if "layouts agree only" in w]

    assert "adapter.dropout to 0" in told(adapter_drops_by_layout=True)[0]
    assert "in its config.json" in told(dropout=0.1)[0]
    assert not told()


# --- the router loss


def test_the_router_loss_depends_on_a_derived_micro_batch() -> None:
    def told(**choices: Any) -> bool:
        return any("router loss" in w and "--micro-batch" in w for w in plan(**choices).warnings)

    assert told(model=shape(router_loss=True))
    assert not told(model=shape(router_loss=True), micro_batch=2)
    assert not told()


# --- attention


@pytest.mark.parametrize(
    ("attention", "hint"), [("bogus", "flash_attention_2"), ("spda", "sdpa?"), ("flash_attention2", "_2?")]
)
def test_no_attention(attention: str, hint: str) -> None:
    error = refused(settings=(f"attention={attention}",))
    assert repr(attention) in error.message and hint in (error.hint or "")
    assert error.where == "--set attention"


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_attention_that_runs_anywhere(attention: str) -> None:
    assert plan(settings=(f"attention={attention}",)).config["attention"] == attention


@pytest.mark.parametrize(
    ("machines", "precision", "attention", "words"),
    [
        (LAPTOP, "bf16", "flash_attention_2", "CUDA devices only"),
        (GPUS, "fp32", "flash_attention_2", "bf16 and fp16 only"),
        (replace(GPUS, flash_packages=()), "bf16", "flash_attention_2", "package flash_attn,"),
        (GPUS, "bf16", "flash_attention_3", "package flash_attn_interface,"),
        (LAPTOP, "fp32", "flex_attention", "gradients on CUDA devices only"),
    ],
)
def test_flash_attention_without_its_kernels(
    machines: Machines, precision: str, attention: str, words: str
) -> None:
    error = refused(machines=machines, precision=precision, settings=(f"attention={attention}",))
    assert words in error.message and "attention=auto" in (error.hint or "")


def test_attention_that_the_family_has_not() -> None:
    error = refused(model=shape(attention_refusals={"sdpa": "it has none"}), settings=("attention=sdpa",))
    assert error.message == "llama can't have attention: sdpa: it has none"
    assert error.where == "--set attention" and "attention=eager" in (error.hint or "")
    assert plan(machines=GPUS, settings=("attention=flex_attention",)).config["attention"] == "flex_attention"


def test_flash_attention_with_its_kernels() -> None:
    made = plan(machines=GPUS, precision="bf16", settings=("attention=flash_attention_2",))
    assert made.config["attention"] == "flash_attention_2"


# --- frozen parameters


def named(model: ModelShape) -> ModelShape:
    """``model`` with tensors: the tied weight under a name in each of its layers."""
    tied = ("embed.weight", "head.weight")
    tensors = {0: {tied[0]: 51_200}, len(model.layers) - 1: {tied[1]: 51_200, "norm.weight": 200}}
    layers = tuple(
        replace(x, tensors=tensors.get(i, {f"blocks.{i - 1}.w": x.parameters}))
        for i, x in enumerate(model.layers)
    )
    return replace(model, layers=layers, tied=(Tied(tied[1], 51_200, (0, len(layers) - 1), tied),))


@pytest.mark.parametrize("pattern", ["nothing.*", "*.wieght"])
def test_a_pattern_that_freezes_nothing(pattern: str) -> None:
    error = refused(model=named(shape()), settings=(f'freeze=["{pattern}"]',))
    assert error.message == f"no parameter of llama matches {pattern!r}"
    assert error.where == "--set freeze"


def untied(model: ModelShape) -> ModelShape:
    layers = tuple(replace(x, tensors={f"layer.{i}": x.parameters}) for i, x in enumerate(model.layers))
    return replace(model, layers=layers, tied=())


@pytest.mark.parametrize(
    ("schedule", "frozen", "words"),
    [
        ("dualpipev", "0", "the first layers of stage 0"),
        ("dualpipev", "[01]", "the first layers of stage 0"),
        ("dualpipev", "[012345]", "stage 0 would have only frozen parameters"),
        ("dualpipev", "1", None),
        ("dualpipev", "[14]", "stage 1 would have only frozen parameters"),
        ("dualpipev", "5", None),
        ("1f1b", "[01]", "stage 0 would have only frozen parameters"),
        ("1f1b", "0", None),
        ("1f1b", "[45]", "stage 2 would have only frozen parameters"),
    ],
)
def test_layers_of_a_stage_that_nothing_can_be_learnt_in(
    schedule: str, frozen: str, words: str | None
) -> None:
    """Three stages of six layers: with DualPipeV stage 0 holds the first and the last, stage 1 the second and fifth."""
    model = untied(shape(4))
    given = {
        "pipeline": 3,
        "schedule": schedule,
        "global_batch": 6,
        "settings": (f'freeze=["layer.{frozen}"]',),
    }
    cut = "0,1,1,1,1,0" if schedule == "dualpipev" else "1,2,1"
    if words is None:
        plan(model=model, partition=cut, **given)
    else:
        error = refused(model=model, partition=cut, **given)
        assert error.message.startswith(words) and error.where == "--set freeze" and error.hint


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "*"])
def test_a_tied_weight_that_is_frozen_counts_once(name: str) -> None:
    model = named(shape(2))
    config = RunConfig(precision="bf16", freeze=[name])
    states = estimate(config, model, replicas=1, micro_batch=1, accumulation=1).states
    assert min(states) >= 0
    still = model.total_parameters if name == "*" else 51_200
    # Weights, their gradients in fp32, masters and two moments.
    assert sum(states) == 2 * still + (2 + 4 + 12) * (model.total_parameters - still)


# --- messages


def test_the_key_is_said_once() -> None:
    assert str(refused(pipeline=2, partition="3,4")).startswith("--partition: 3,4 has 7 blocks")
    assert str(refused(pipeline=2, settings=("partition=3,4,5",))).startswith("--set partition: 3,4,5 has")
    assert refused(zero=3, offload="nvme").message.startswith("--offload nvme requires nvme_path")


def test_the_partition_counts_blocks() -> None:
    assert "number of blocks of each stage" in (RunConfig.model_fields["partition"].description or "")


def test_an_existing_file_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("llama/config.json") and is_hub_name("llama/other")
    with pytest.raises(DstrainError) as caught:
        model_config_file("llama/config.json", where="--model")
    assert caught.value.message == "llama/config.json is a file"
    assert caught.value.hint == "name its folder: llama"


@pytest.mark.parametrize("model", ["", " "])
def test_no_model(model: str) -> None:
    with pytest.raises(DstrainError, match="no model given"):
        model_config_file(model, where="--model")


def test_weights_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    def find(**flags: Any) -> str:
        return find_model(load_config(flags={"model": str(tmp_path), **flags})).tokenizer

    with pytest.raises(DstrainError) as caught:
        find(init="pretrained")
    assert "no tokenizer" in caught.value.message and str(caught.value.where).startswith("fine-tune.yaml:")
    assert caught.value.hint == "--tokenizer FOLDER, or --tokenizer bytes if that is meant"
    assert find(init="pretrained", tokenizer="bytes") == find() == "bytes"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find(init="pretrained") == str(tmp_path)

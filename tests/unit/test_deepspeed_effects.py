"""What DeepSpeed's keys do to a run: each has its kinds, and those that change arithmetic are said in the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.deepspeed_keys import GONE, all_keys, effects
from dstrain.config.loader import load_config
from dstrain.config.values import KeyPath
from dstrain.errors import DstrainError
from dstrain.planning.deepspeed import user_keys
from dstrain.planning.deepspeed.keys import KEYS, NEEDS_CUDA, PACKAGES, owner_of
from dstrain.planning.explain import explain
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import MINIMAL, plan
from tools import deepspeed_keys_page
from tools.deepspeed_keys.effects import EFFECTS, KINDS, effects_of

ROOT = Path(__file__).parents[2]
GPUS = Machines((Host("n1", 2),), "cuda", ("a GPU",) * 2)
LEAVES = [path for path, node in all_keys() if "keys" not in node and not GONE & set(node)]


def test_every_key_has_its_kinds() -> None:
    assert len(LEAVES) > 340
    for path in LEAVES:
        assert effects(path) == set(effects_of(path)) <= set(KINDS), path
        assert "harmless" not in effects(path) or len(effects(path)) == 1, path


def test_every_line_is_for_a_key_that_there_is() -> None:
    known = {".".join(path) for path, node in all_keys() if not GONE & set(node)}
    assert set(EFFECTS) <= known


def test_a_new_key_must_be_looked_at() -> None:
    with pytest.raises(KeyError, match=r"effects\.py"):
        effects_of(("a_key_of_the_next_version",))
    with pytest.raises(KeyError, match=r"effects\.py"):  # ZeRO's have each a line of their own
        effects_of(("zero_optimization", "a_key_of_the_next_version"))


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "deepspeed-keys.md").read_text(encoding="utf-8")
    assert written == deepspeed_keys_page.page(), "docs/deepspeed-keys.md is out of date: run `make docs`"


# --- arithmetic


def with_keys(keys: dict[str, Any], **flags: Any) -> Plan:
    return plan(
        machines=GPUS, settings=tuple(f"deepspeed.{key}={json.dumps(keys[key])}" for key in keys), **flags
    )


def test_a_plan_of_no_own_keys_is_covered() -> None:
    for zero in (0, 1, 2, 3):
        assert plan(machines=GPUS, zero=zero).not_covered == ()


@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        ("communication_data_type", "bf16", {}),
        ("zero_optimization.zero_quantized_weights", True, {"zero": 3}),
        ("zero_optimization.zero_quantized_gradients", True, {"zero": 3}),
        ("zero_optimization.memory_efficient_linear", False, {"zero": 3}),
        ("fp16.loss_scale", 128, {"precision": "fp16"}),
        ("fp16.loss_scale_window", 100, {"precision": "fp16"}),
        ("bf16.check_grad_overflow", True, {"precision": "bf16"}),
        ("bf16.bf16_master_weights_and_grads", True, {"precision": "bf16", "offload": "cpu"}),
        ("prescale_gradients", True, {"zero": 0}),
        ("gradient_predivide_factor", 2.0, {"zero": 0}),
        ("weight_quantization.num_bits", 4, {}),
    ],
)
def test_a_key_that_changes_arithmetic_is_said(key: str, value: Any, flags: dict[str, Any]) -> None:
    made = with_keys({key: value}, **flags)
    assert made.not_covered == (f"DeepSpeed's {key} = {json.dumps(value)} (--set deepspeed.{key})",)
    assert Plan.from_record(made.to_record()).not_covered == made.not_covered
    assert "arithmetic" in explain(made, f"deepspeed.{key}")[0].effects


@pytest.mark.parametrize(
    ("keys", "flags"),
    [
        ({"communication_data_type": "fp32"}, {}),  # the plan's own
        ({"prescale_gradients": False, "gradient_predivide_factor": 1.0}, {}),
        ({"communication_data_type": "auto"}, {}),
        ({"fp16.loss_scale_window": 100}, {"precision": "bf16"}),  # of a block that is switched off
        ({"fp16.loss_scale_window": 1000, "fp16.hysteresis": 2}, {"precision": "fp16"}),
        ({"zero_optimization.zero_quantized_weights": False}, {"zero": 3}),  # DeepSpeed's default
        ({"zero_optimization.reduce_bucket_size": 1000, "steps_per_print": 7}, {"zero": 2}),
        ({"expert_parallel.top_k": 3}, {}),
    ],
)
def test_what_changes_nothing_is_not_said(keys: dict[str, Any], flags: dict[str, Any]) -> None:
    assert with_keys(keys, **flags).not_covered == ()


def _another(node: dict[str, Any]) -> Any:
    """A value that is not the default, of a kind that the key takes."""
    default = node.get("default")
    if "choices" in node:
        return next((each for each in reversed(node["choices"]) if each != default), None)
    for kind, values in {
        "boolean": (True, False), "integer": (3, 2), "float": (0.5, 0.25), "text": ("other",), "list": (["x"],),
    }.items():  # fmt: skip
        if kind in node.get("accepts", ()):
            return next(value for value in values if value != default)
    return None


@pytest.mark.parametrize("path", [path for path in LEAVES if "arithmetic" in effects(path)], ids=".".join)
def test_no_key_that_changes_arithmetic_gets_by(path: KeyPath) -> None:
    """It is decided by a key of dstrain's, refused, in a block that is off, or said."""
    node = next(node for each, node in all_keys() if each == path)
    value = _another(dict(node))
    if owner_of(path) is not None or value is None:
        return
    off = any(
        effects((*path[:depth], "enabled")) and path != (*path[:depth], "enabled")
        for depth in range(1, len(path))
    )
    said = []
    for flags in (
        {"zero": 0},
        {"zero": 3},
        {"zero": 1, "precision": "fp16"},
        {"zero": 1, "precision": "bf16"},
    ):
        try:
            said.append(with_keys({".".join(path): value}, **flags).not_covered)
        except DstrainError:
            said.append(("refused",))
    assert any(said) or off, path
    if not off:
        assert all(said), path


# --- what a rank would find out


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("key", "value"), [("prescale_gradients", True), ("gradient_predivide_factor", 2.0)])
def test_scaling_that_zero_does_not_do_is_refused(key: str, value: Any, zero: int) -> None:
    with pytest.raises(DstrainError, match=key):
        with_keys({key: value}, zero=zero)


@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        ("zero_optimization.compute_grad_norm", False, {"zero": 1}),
        ("fp16.fp16_master_weights_and_grads", True, {"precision": "fp16"}),
        ("bf16.bf16_master_weights_and_grads", True, {"precision": "bf16"}),
    ],
)
def test_what_deepspeed_would_refuse_on_a_rank(key: str, value: Any, flags: dict[str, Any]) -> None:
    with pytest.raises(DstrainError, match=key) as caught:
        with_keys({key: value}, **flags)
    assert caught.value.hint and caught.value.hint.startswith("remove it")


@pytest.mark.parametrize("path", sorted(NEEDS_CUDA), ids=".".join)
def test_kernels_for_gpus_are_refused_on_cpus(path: KeyPath) -> None:
    assert "device" in effects(path)
    with pytest.raises(DstrainError, match="CUDA devices only"):
        plan(zero=3, settings=(f"deepspeed.{'.'.join(path)}=true",))
    plan(zero=3, settings=(f"deepspeed.{'.'.join(path)}=false",))


@pytest.mark.parametrize("path", PACKAGES, ids=".".join)
def test_a_package_that_is_missing_is_named_with_the_plan(
    path: KeyPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    dotted = ".".join(path)
    assert "package" in effects(path)

    def load(value: str) -> Any:
        return load_config(config_file=str(MINIMAL), settings=[f"deepspeed.{dotted}={value}"])

    asked: list[str] = []
    monkeypatch.setattr(user_keys, "is_installed", lambda package: bool(asked.append(package)))
    with pytest.raises(DstrainError) as caught:
        user_keys.check_packages_here(load("true"))
    assert f"{dotted} needs the Python package {asked[0]}" in caught.value.message
    assert caught.value.where == f"--set deepspeed.{dotted}"
    user_keys.check_packages_here(load("false"))
    monkeypatch.setattr(user_keys, "is_installed", lambda package: True)
    user_keys.check_packages_here(load("true"))


def test_every_switch_that_needs_a_package_is_in_the_table() -> None:
    switches = {
        path for path in LEAVES if "package" in effects(path) and path[-1] in ("enabled", "datastates_ckpt")
    }
    assert switches == set(PACKAGES)
    assert not any(KEYS[path].owner for path in switches if path in KEYS)

"""The table of optimizers: what it says is so, all who need it ask it, and one from outside is refused early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.api.planning import check_code_here
from dstrain.config.files import ds_configs
from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config, override, read_config
from dstrain.config.values import leaves
from dstrain.errors import DstrainError
from dstrain.optimizers import (
    OPTIMIZERS,
    facts_of_type,
    kept_states,
    optimizer_facts,
    option_keys,
)
from dstrain.planning.checks import refuse
from dstrain.planning.plan import Plan
from tests.support.plans import plan

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
LION = "own_optimizers:Lion"
OWN = (f"optimizer={LION}", f"code_dirs=[{OWN_CODE}]")


def fragments_of(name: str) -> list[str]:
    facts = OPTIMIZERS[name]
    return [facts.fragment, *([facts.offloaded_fragment] if facts.offloaded_fragment else [])]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_fragments_hold_what_it_takes(name: str) -> None:
    for fragment in fragments_of(name):
        values = json.loads((ds_configs() / "optimizer" / f"{fragment}.json").read_text())
        assert values["optimizer"]["type"] == OPTIMIZERS[name].deepspeed_type
        derived = {value for _, value in leaves(values) if isinstance(value, str) and value.startswith("$")}
        fused = fragment == OPTIMIZERS[name].fragment and OPTIMIZERS[name].fused_update_bytes is not None
        assert derived == {f"${key}" for key in ("lr", *OPTIMIZERS[name].takes, *["fused"] * fused)}
        assert facts_of_type(values["optimizer"]["type"]) is OPTIMIZERS[name]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_states_are_those_that_torchs_optimizer_keeps(name: str, momentum: float) -> None:
    facts = OPTIMIZERS[name]
    options = {"momentum": momentum}
    parameter = torch.nn.Parameter(torch.ones(7))
    parameter.grad = torch.ones(7)
    kind = getattr(torch.optim, facts.deepspeed_type)
    optimizer = kind(
        [parameter], lr=0.1, **{key: value for key, value in options.items() if key in facts.takes}
    )
    optimizer.step()
    kept = {key: value for key, value in optimizer.state[parameter].items() if getattr(value, "ndim", 0)}
    assert set(kept) == {state.name for state in kept_states(facts, options)}
    assert all(value.shape == parameter.shape and value.dtype == torch.float32 for value in kept.values())


def test_a_new_optimizer_is_one_entry_and_one_fragment(tmp_path: Path) -> None:
    """Choices, schema, plan, estimates, explanations of an optimizer that is added to the table, and nowhere else."""
    script = f"""
import json, shutil
from pathlib import Path
import dstrain.config.files as files
from dstrain.optimizers import OPTIMIZERS, OptimizerFacts, StateTensor

OPTIMIZERS["rmsprop"] = OptimizerFacts(
    fragment="rmsprop", deepspeed_type="RMSprop", takes=("eps", "momentum", "weight_decay"),
    states=(StateTensor("square_avg"), StateTensor("momentum_buffer", kept_with="momentum")),
    update_bytes=40, temporary_bytes={{"cuda": 4, "cpu": 4}}, decoupled_decay=False,
)
place = Path({str(tmp_path)!r}) / "ds_configs"
shutil.copytree(files.packaged("ds_configs"), place)
(place / "optimizer" / "rmsprop.json").write_text(json.dumps({{"optimizer": {{"type": "RMSprop", "params": {{
    "lr": "$lr", "eps": "$eps", "momentum": "$momentum", "weight_decay": "$weight_decay"}}}}}}))
files.packaged = lambda name: place
files.ds_configs.cache_clear()

from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.planning.explain import explain
from tests.support.plans import plan

made = plan(settings=("optimizer=rmsprop",), lr=0.5)
with_momentum = plan(settings=("optimizer=rmsprop", "momentum=0.9"))
adamw = plan()
try:
    load_config(settings=["optimizer=adagrad"])
except DstrainError as error:
    message = str(error)
print(json.dumps({{
    "deepspeed": made.deepspeed["optimizer"],
    "bytes": [each.stage_memory[0].optimizer for each in (made, with_momentum, adamw)],
    "schema": json_schema()["properties"]["optimizer"]["anyOf"][0]["enum"],
    "takes": explain(made, "optimizer")[0].takes,
    "eps": explain(made, "deepspeed.optimizer.params.eps")[0].why,
    "message": message,
}}))
"""
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["deepspeed"] == {
        "type": "RMSprop",
        "params": {"lr": 0.5, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.1},
    }
    without, with_momentum, adamw = found["bytes"]
    assert (
        without < with_momentum == adamw and 3 * without == 2 * adamw
    )  # with ZeRO's master: 8, 12 and 12 bytes
    assert found["schema"] == [*OPTIMIZERS, "rmsprop"] and "rmsprop" in found["takes"]
    assert found["eps"] == "it follows from eps (default)"
    assert "'adamw', 'sgd' or 'rmsprop'" in found["message"]


# --- from outside


def outside(*settings: str, **flags: Any) -> Plan:
    return plan(settings=(*OWN, *settings), **flags)


def test_the_plan_says_what_it_does_not_know() -> None:
    made = outside("optimizer_options={betas: [0.9, 0.98]}", zero=2, data_parallel=2)
    assert made.not_covered == (f"optimizer {LION}",) and plan().not_covered == ()
    assert any("estimated as AdamW: 8 bytes of states" in warning for warning in made.warnings)
    assert "optimizer" not in made.deepspeed and made.deepspeed["zero_allow_untested_optimizer"] is True
    assert made.stage_memory == plan(zero=2, data_parallel=2).stage_memory
    assert made.identity["optimizer"] == LION
    assert made.identity["optimizer_options"] == {"betas": [0.9, 0.98]}
    assert "optimizer_options" not in plan().identity, "a checkpoint of before has none"
    assert Plan.from_record(json.loads(json.dumps(made.to_record()))) == made


def test_keys_of_other_optimizers_are_told() -> None:
    assert any("momentum is not for" in warning for warning in outside("momentum=0.9").warnings)
    assert not any("not for" in warning for warning in outside("weight_decay=0.3").warnings)
    assert set(option_keys()) == {"betas", "eps", "momentum", "weight_decay"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("optimizer_options={betas: [0.9, 0.98]}",),
            "are for an optimizer of your own, and adamw takes keys",
        ),
        ((*OWN, "optimizer_options.lr=0.1"), "lr is passed to own_optimizers:Lion by dstrain"),
        ((*OWN, "optimizer_options.weight_decay=0.1"), "weight_decay is passed to"),
        ((*OWN, "deepspeed.optimizer.type=Lion"), "optimizer = own_optimizers:Lion"),
        (("optimizer=lion",), "must be 'adamw' or 'sgd', or one of your own like my_module:MyOptimizer"),
        (("optimizer=my module:Lion",), "must be 'adamw' or 'sgd', or one of your own"),
        ((*OWN, "optimizer_options={a: .nan}"), "must be valid JSON"),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(DstrainError, match=words):
        refuse(load_config(settings=settings))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_optimizer:Lion", "did you mean own_optimizers?"),
        ("own_optimizers:Lino", "did you mean Lion?"),
        ("nowhere.at_all:Lion", "there is no module 'nowhere.at_all'"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(name: str, words: str) -> None:
    resolved = load_config(settings=[f"optimizer={name}", f"code_dirs=[{OWN_CODE}]"])
    with pytest.raises(DstrainError) as caught:
        check_code_here(resolved)
    assert words in str(caught.value) and caught.value.where == "--set optimizer"


def test_nothing_of_it_is_run_to_make_a_plan(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("raise SystemExit('it was run')\nclass Mine: pass\n")
    check_code_here(load_config(settings=["optimizer=loud:Mine", f"code_dirs=[{tmp_path}]"]))


def test_it_is_looked_for_beside_the_config_and_where_the_run_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, here = tmp_path / "configs", tmp_path / "here"
    config.mkdir(), here.mkdir()
    (config / "mine.yaml").write_text(f"optimizer: {LION}\noptimizer_options:\n  betas: [0.9, 0.98]\n")
    monkeypatch.chdir(here)
    resolved = load_config(config_file="../configs/mine.yaml")
    assert resolved.config.code_dirs == [str(here / "../configs"), str(here)]
    (tmp_path / "config.yaml").write_text(resolved.to_yaml())
    monkeypatch.chdir(tmp_path)
    again = read_config(tmp_path / "config.yaml")
    assert again.config == resolved.config and override(again, {"steps": 7}).config.code_dirs == [
        str(here / "../configs"),
        str(here),
    ]
    assert load_config().config.code_dirs is None


def test_an_editor_knows_the_choices() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    for value, good in (("adamw", True), (LION, True), ("adam", False), (3, False)):
        assert jsonschema.Draft202012Validator(schema).is_valid({"optimizer": value}) is good


def test_what_is_assumed_of_it_is_adamw_with_torchs_kernels() -> None:
    facts = optimizer_facts(LION)
    assert facts.states == OPTIMIZERS["adamw"].states and facts.offloaded_update_bytes is None
    with pytest.raises(KeyError):
        optimizer_facts("lion")

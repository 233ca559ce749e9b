"""A recipe's value gives way to the user's choices where it can be derived; the user's own is refused instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.loader import ResolvedConfig, load_config, override, read_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.plan import Machines, Plan, PlannedData
from dstrain.planning.recipe_values import fit_recipe, follow_data
from tests.support.plans import DATA, LAPTOP, shape


def gpus(count: int) -> Machines:
    return Machines((Host("n1", count),), "cuda", ("a GPU",))


def planned(resolved: ResolvedConfig, machines: Machines = LAPTOP, **changes: Any) -> Plan:
    return make_plan(resolved, machines, shape(**changes), DATA, "/models/tiny/config.json")


@pytest.mark.parametrize("size", range(1, 33))
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_any_global_batch_goes_with_the_quickstart(size: int, replicas: int) -> None:
    batch = planned(load_config(flags={"global_batch": size * replicas}), gpus(replicas)).batch
    assert batch.micro_batch * batch.accumulation * replicas == size * replicas
    assert batch.micro_batch == 4 or size % 4


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_the_quickstart_goes_with_any_number_of_gpus_that_divides_its_batch(count: int) -> None:
    assert planned(load_config(), gpus(count)).batch.data_parallel == count


def test_the_quickstart_goes_with_dualpipev() -> None:
    made = planned(load_config(flags={"pipeline": 4, "schedule": "dualpipev"}), blocks=8)
    assert made.batch.accumulation >= 8


@pytest.mark.parametrize("how", ["flag", "set", "file"])
def test_the_users_own_micro_batch_does_not_give_way(how: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("recipe: quickstart\nmicro_batch: 4\n" if how == "file" else "recipe: quickstart\n")
    flags = {"global_batch": 6} | ({"micro_batch": 4} if how == "flag" else {})
    resolved = load_config(
        config_file=str(own), flags=flags, settings=["micro_batch=4"] if how == "set" else []
    )
    with pytest.raises(DstrainError, match="not a multiple of the micro-batch 4"):
        planned(resolved)


def test_what_gave_way_is_shown_with_its_reason_and_stays_so_in_the_run_folder(tmp_path: Path) -> None:
    resolved = load_config(flags={"global_batch": 6})
    made = planned(resolved)
    assert made.config["micro_batch"] is None and made.batch.micro_batch == 6
    assert made.origins["micro_batch"].startswith("derived: quickstart.yaml:")
    kept = tmp_path / "config.yaml"
    kept.write_text(fit_recipe(resolved, shape(), None).to_yaml())
    assert planned(read_config(kept)).batch == made.batch  # a resumed run's config is all the user's own
    assert planned(override(read_config(kept), {"data_parallel": 2})).batch.micro_batch == 3


def test_samples_are_no_longer_than_the_model_where_the_user_did_not_say_how_long() -> None:
    made = planned(load_config(), max_positions=64)
    assert made.config["seq_len"] == 64 and "quickstart.yaml:" in made.origins["seq_len"]
    assert any(note.startswith("seq_len is 64") for note in made.warnings)
    with pytest.raises(DstrainError, match="seq_len 128 exceeds the model's 64 positions"):
        planned(load_config(flags={"seq_len": 128}), max_positions=64)


# --- pretrained weights


QUICKSTARTS = ("lr", "warmup_steps", "sample_tokens", "betas", "weight_decay")


@pytest.mark.parametrize("how", ["flag", "set", "file"])
def test_pretrained_weights_are_not_trained_with_the_quickstarts_values(how: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: m\ninit: pretrained\n")
    resolved = load_config(
        config_file=str(own) if how == "file" else None,
        flags={"model": "m"} | ({"init": "pretrained"} if how == "flag" else {}),
        settings=["init=pretrained"] if how == "set" else [],
    )
    config = resolved.config
    assert config.init == "pretrained" and config.lr <= 1e-4 and 0 < config.warmup_steps < config.steps
    for key in QUICKSTARTS:
        assert resolved.origin(key).place.startswith("fine-tune.yaml:"), key
        assert getattr(config, key) != getattr(load_config().config, key), key


def test_what_the_user_says_of_pretrained_weights_stands(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("init: pretrained\nlr: 3.0e-4\n")
    assert load_config(config_file=str(own), flags={"warmup_steps": 3}).config.lr == 3e-4
    own.write_text("recipe: quickstart\ninit: pretrained\n")
    assert load_config(config_file=str(own)).origin("lr").place.startswith("quickstart.yaml:")
    assert load_config(config_file=str(own), flags={"init": "random"}).config.init == "random"
    own.write_text("init: random\n")
    assert load_config(config_file=str(own)).config == RunConfig()


def test_the_quickstarts_learning_rate_on_pretrained_weights_gets_a_note() -> None:
    resolved = load_config(recipe="quickstart", flags={"init": "pretrained"})
    (note,) = [note for note in planned(resolved).warnings if "pretrained" in note]
    assert note.startswith("lr 0.004 (quickstart.yaml:") and "--recipe fine-tune" in note
    for chosen in ({"lr": 4e-3}, {"init": "random"}):
        other = load_config(recipe="quickstart", flags={"init": "pretrained", **chosen})
        assert not [note for note in planned(other).warnings if "pretrained" in note]


CONVERSATIONS = replace(DATA, format="messages", trained_tokens=100, train_on="assistant")


def values_of(resolved: ResolvedConfig, data: PlannedData) -> Plan:
    return make_plan(resolved, LAPTOP, shape(), data, "/models/tiny/config.json", model_folder="/models/tiny")


def test_pretrained_weights_that_see_conversations_take_the_optimizer_of_sft(tmp_path: Path) -> None:
    resolved = load_config(flags={"init": "pretrained", "weight_decay": 0.3})
    texts, chat = values_of(resolved, DATA), values_of(resolved, CONVERSATIONS)
    assert (texts.config["lr"], texts.config["betas"]) == (2e-5, [0.9, 0.999])
    assert (chat.config["lr"], chat.config["betas"]) == (1e-5, [0.9, 0.95])
    assert chat.origins["lr"].startswith("sft.yaml:") and texts.origins["lr"].startswith("fine-tune.yaml:")
    assert chat.config["weight_decay"] == 0.3 and chat.origins["weight_decay"] == "--weight-decay"
    kept = tmp_path / "config.yaml"
    kept.write_text(follow_data(resolved, CONVERSATIONS).to_yaml())
    assert values_of(read_config(kept), CONVERSATIONS).config == chat.config


def test_a_named_recipe_keeps_its_values(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("recipe: fine-tune\n")
    for resolved in (load_config(recipe="fine-tune"), load_config(config_file=str(own))):
        assert values_of(resolved, CONVERSATIONS).config["lr"] == 2e-5
    assert values_of(load_config(), CONVERSATIONS).config["lr"] == 4e-3, "random weights"

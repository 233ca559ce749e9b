"""The run config: layers, origins, strict reading, and the file that a run folder keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config.files import recipes
from dstrain.config.loader import ResolvedConfig, load_config, override, read_config
from dstrain.config.origins import Origin
from dstrain.config.schema import RunConfig, field_names
from dstrain.config.value_types import LARGEST
from dstrain.config.yaml_reader import dump_yaml, parse_scalar, parse_yaml
from dstrain.errors import DstrainError


def write(folder: Path, text: str | bytes, name: str = "own.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refused(**layers: Any) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        load_config(**layers)
    assert caught.value.exit_code == 2
    return caught.value


# --- layers


def test_defaults_alone_need_a_file_of_their_own(tmp_path: Path) -> None:
    resolved = load_config(config_file=write(tmp_path, "seed: 1234\n"))
    assert resolved.config == RunConfig()
    assert resolved.origin("lr") == Origin("default", "default")


def test_without_anything_it_is_the_quickstart() -> None:
    resolved = load_config()
    assert resolved.config == load_config(recipe="quickstart").config
    assert resolved.origin("steps").kind == "recipe"


def test_each_layer_beats_the_one_below_it(tmp_path: Path) -> None:
    own = write(tmp_path, "# a comment\nlr: 0.5\nsteps: 7\nseed: 3\n")
    resolved = load_config(
        recipe="quickstart",
        config_file=own,
        settings=["steps=8", "seed=4"],
        flags={"seed": 5},
    )
    config = resolved.config
    recipe = load_config(recipe="quickstart")
    assert config.keep == RunConfig().keep and resolved.origin("keep").kind == "default"
    assert config.global_batch == recipe.config.global_batch != RunConfig().global_batch
    assert (config.lr, config.steps, config.seed) == (0.5, 8, 5)
    assert resolved.origin("lr") == Origin("file", f"{own}:2")
    assert resolved.origin("steps") == Origin("set", "--set steps")
    assert resolved.origin("seed") == Origin("flag", "--seed")


def test_recipe_origin_names_its_line(repository: Path) -> None:
    lines = (repository / "ds_configs/recipes/quickstart.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.startswith("global_batch:"))
    assert load_config().origin("global_batch") == Origin("recipe", f"quickstart.yaml:{line}")


def test_flag_origin_is_spelled_as_the_user_typed_it() -> None:
    assert str(load_config(flags={"seq_len": 64}).origin("seq_len")) == "--seq-len"


def test_the_last_set_wins() -> None:
    assert load_config(settings=["steps=3", "steps=4"]).config.steps == 4


def test_a_file_may_name_its_recipe(tmp_path: Path) -> None:
    own = write(tmp_path, "recipe: quickstart\nsteps: 3\n")
    resolved = load_config(config_file=own)
    assert resolved.config == load_config(flags={"steps": 3}).config
    assert "recipe" not in resolved.config.model_dump()


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_that_comes_along_is_valid(recipe: str) -> None:
    load_config(recipe=recipe)


# --- the deepspeed mapping


def test_deepspeed_nests_and_merges_with_origins(tmp_path: Path) -> None:
    own = write(tmp_path, "deepspeed:\n  zero_optimization:\n    sub_group_size: 5\n    overlap_comm: true\n")
    resolved = load_config(
        config_file=own, settings=["deepspeed.zero_optimization.sub_group_size=6", "deepspeed.aio.a=x"]
    )
    assert resolved.config.deepspeed == {
        "zero_optimization": {"sub_group_size": 6, "overlap_comm": True},
        "aio": {"a": "x"},
    }
    path = ("deepspeed", "zero_optimization")
    assert resolved.origin(*path, "overlap_comm") == Origin("file", f"{own}:4")
    assert resolved.origin(*path, "sub_group_size").kind == "set"
    assert resolved.origin(*path, "unheard").place == "default"


def test_a_set_that_opens_a_value_is_blamed_for_it() -> None:
    """quickstart.yaml sets betas; what breaks it is the --set."""
    assert refused(settings=["betas.x=1"]).where == "--set betas.x"


def test_a_mapping_set_whole_keeps_inner_paths() -> None:
    resolved = load_config(settings=["deepspeed={a: {b: 1}}"])
    assert resolved.config.deepspeed == {"a": {"b": 1}}


@pytest.mark.parametrize("value", [".nan", ".inf", "!!binary aGk=", "!!set {a, b}"])
def test_deepspeed_holds_only_what_json_can(tmp_path: Path, value: str) -> None:
    own = write(tmp_path, f"deepspeed:\n  key: {value}\n")
    assert "JSON" in refused(config_file=own).message


# --- what is read from text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2.5e3),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("0x10", 16),
        ("1_000", 1000),
        ("true", True),
        ("on", "on"),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("=", "="),
        ("null", None),
        ("~", None),
        ("", None),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("'3e-4'", "3e-4"),
        ("e5", "e5"),
        ("a: [", "a: ["),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("lr=3e-4", "lr", 3e-4),
        ("lr=1", "lr", 1.0),
        ("name=2024-01-31", "name", "2024-01-31"),
        ("name=123", "name", "123"),
        ("name=null", "name", None),
        ("prompt=def f(x): return", "prompt", "def f(x): return"),
        ("prompt=a=b", "prompt", "a=b"),
        ("prompt='def '", "prompt", "def "),
        ("prompt=", "prompt", ""),
        ("prompt=null", "prompt", "null"),
        ("betas=[0.8, 0.9]", "betas", [0.8, 0.9]),
        ("activation_checkpointing=true", "activation_checkpointing", True),
    ],
)
def test_settings(setting: str, key: str, value: Any) -> None:
    assert getattr(load_config(settings=[setting]).config, key) == value


# --- what is refused


@pytest.mark.parametrize("key", ["DIM", "Steps", "seq-len"])
def test_keys_are_spelled_exactly(key: str) -> None:
    assert key in refused(settings=[f"{key}=1"]).message


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    assert load_config(config_file=write(tmp_path, b"\xef\xbb\xbfsteps: 3\n")).config.steps == 3


# --- config.yaml


def round_trip(resolved: ResolvedConfig, folder: Path) -> ResolvedConfig:
    path = folder / "config.yaml"
    path.write_text(resolved.to_yaml(), encoding="utf-8")
    return read_config(path)


def test_config_yaml_says_where_each_value_came_from(tmp_path: Path) -> None:
    resolved = load_config(flags={"steps": 3}, settings=["lr=0.5"])
    lines = resolved.to_yaml().splitlines()
    assert "steps: 3  # --steps" in lines
    assert "lr: 0.5  # --set lr" in lines
    assert "keep: 2  # default" in lines
    assert [line.split(":")[0] for line in lines if line[0].isalpha()] == field_names()
    again = round_trip(resolved, tmp_path)
    assert again.config == resolved.config
    assert str(again.origin("steps")) == f"config.yaml:{lines.index('steps: 3  # --steps') + 1}"


@pytest.mark.parametrize(
    "prompt",
    ["3e-4", "1e5", "true", "null", "~", "", " ", "a\n\nb\n", "# no", "a # b", "a: b", "'", '"', "- x", "\u2028x",
     "\ufeff", "x" * 20_000 + " y", "é 漢 🎉", "\x1b[0m", "2024-01-31", "on", "!!x", "%", "@", "`", "\\n", "=", "<<"],
)  # fmt: skip
def test_odd_texts_survive(tmp_path: Path, prompt: str) -> None:
    config = RunConfig(prompt=prompt, name=prompt, deepspeed={"a": {prompt: prompt}})
    resolved = ResolvedConfig(config, {("prompt",): Origin("file", "odd\nname.yaml:3")})
    assert round_trip(resolved, tmp_path).config == config


TEXT = st.text(max_size=20)
FRACTION = st.floats(0, 1, exclude_max=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CONFIGS = st.builds(
    RunConfig,
    prompt=TEXT,
    name=st.none() | TEXT,
    data=TEXT,
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    eps=st.floats(min_value=1e-30, max_value=1),
    betas=st.lists(FRACTION, min_size=2, max_size=2),
    validation=FRACTION,
    zero=st.sampled_from([0, 1, 2, 3]),
    micro_batch=st.none() | st.integers(1, LARGEST),
    activation_checkpointing=st.booleans(),
    deepspeed=st.dictionaries(TEXT, JSON, max_size=4),
)


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS)
def test_config_yaml_round_trip(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    resolved = ResolvedConfig(config, {})
    again = parse_yaml(resolved.to_yaml(), name="config.yaml")
    assert RunConfig.model_validate(again.values) == config


@given(values=st.dictionaries(TEXT, JSON, max_size=4))
def test_yaml_writes_what_it_reads(values: dict[str, Any]) -> None:
    assert parse_yaml(dump_yaml(values) if values else "{}", name="x").values == values


# --- override


def test_override_lays_flags_over_a_kept_config(tmp_path: Path) -> None:
    kept = round_trip(load_config(flags={"steps": 3}, settings=["deepspeed.a.b=1"]), tmp_path)
    changed = override(kept, {"steps": 9}, ["deepspeed.a.c=2", "lr=0.25"])
    assert (changed.config.steps, changed.config.lr) == (9, 0.25)
    assert changed.config.deepspeed == {"a": {"b": 1, "c": 2}}
    assert str(changed.origin("steps")) == "--steps"
    assert changed.origin("seed") == kept.origin("seed")
    assert kept.config.steps == 3 and kept.config.deepspeed == {"a": {"b": 1}}


def test_override_refuses_as_a_fresh_config_does(tmp_path: Path) -> None:
    kept = round_trip(load_config(), tmp_path)
    with pytest.raises(DstrainError, match="steps = 0"):
        override(kept, {"steps": 0})
    with pytest.raises(DstrainError, match="unknown key 'stpes'"):
        override(kept, {}, ["stpes=3"])


def test_a_spoilt_config_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(load_config().to_yaml().replace("\nsteps:", "\nstpes:"))
    with pytest.raises(DstrainError, match=r"did you mean steps") as caught:
        read_config(path)
    assert (caught.value.where or "").startswith("config.yaml:")


def test_a_deprecated_key_keeps_working_and_says_its_new_name(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text("steps: 3\nheld_out: 0.25\n")
    resolved = load_config(config_file=str(old))
    assert resolved.config.validation == 0.25
    assert resolved.origin("validation").place == f"{old}:2"
    assert resolved.notes == (f"{old}:2: held_out is deprecated, the key is now validation",)
    by_setting = load_config(config_file=str(old), settings=["held_out=0.5"])
    assert by_setting.config.validation == 0.5 and len(by_setting.notes) == 2
    old.write_text("held_out: 0.25\nvalidation: 0.5\n")
    with pytest.raises(DstrainError, match="both validation and its old name held_out are given"):
        load_config(config_file=str(old))


def test_a_later_layer_wins_under_whatever_name(tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text("recipe: quickstart\nvalidation: 0.25\n")
    assert load_config(config_file=str(new), settings=["held_out=0.5"]).config.validation == 0.5
    folder = tmp_path / "config.yaml"
    folder.write_text(load_config(config_file=str(new)).to_yaml().replace("validation:", "held_out:"))
    assert read_config(folder).config.validation == 0.25 and read_config(folder).notes == ()

"""``dstrain config init, check, schema, diff`` and ``dstrain plan --explain``, as they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dstrain.config.files import ds_configs, recipes
from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config
from dstrain.config.schema import RunConfig
from dstrain.config.template import GROUPS
from dstrain.config.yaml_reader import parse_yaml
from tests.support.e2e import Said

Dstrain = Callable[..., Said]
PLAN = ("--model", "model", "--data", "text.jsonl", "--seq-len", "32")


# --- init


def test_what_init_writes_passes_check_and_means_the_defaults(place: Path, dstrain_here: Dstrain) -> None:
    said = dstrain_here("config", "init", "my.yaml")
    assert said.code == 0 and "config check my.yaml" in said.out
    assert dstrain_here("config", "check", "my.yaml") == Said(0, "my.yaml: no errors\n", "")
    assert load_config(config_file="my.yaml").config == RunConfig()
    text = (place / "my.yaml").read_text()
    for key, field in RunConfig.model_fields.items():
        assert re.search(rf"^(# )?{key}:", text, re.MULTILINE), key
        assert " ".join((field.description or "").split()[:3]) in text.replace("\n# ", " ")
    assert dstrain_here("config", "init", "-").out == text


def test_init_does_not_overwrite(place: Path, dstrain_here: Dstrain) -> None:
    (place / "dstrain.yaml").write_text("steps: 3\n")
    said = dstrain_here("config", "init")
    assert said.code == 2 and "dstrain.yaml already exists" in said.err
    assert (place / "dstrain.yaml").read_text() == "steps: 3\n"
    assert dstrain_here("config", "init", "none/x.yaml").code == 2


def test_the_headings_are_those_of_the_schema(repository: Path) -> None:
    lines = (repository / "dstrain/config/schema.py").read_text().splitlines()
    headings = {
        lines[number + 1].strip().partition(":")[0]: line.strip().removeprefix("# ")
        for number, line in enumerate(lines)
        if line.startswith("    # ") and re.match(r"    \w+: ", lines[number + 1])
    }
    assert headings == GROUPS


# --- check

BAD = """\
stpes: 3
lr: fast
zero: 0
precision: bf16
deepspeed:
  gradient_cliping: 1
  stage: 2
  zero_optimization:
    reduce_bucket_size: many
"""
WORSE = """\
zero: 0
precision: bf16
elastic: true
partition: atuo
deepspeed:
  zero_optimization: {stage: 2, overlap_com: true}
  train_batch_size: 3
  train_micro_batch_size_per_gpu: 3
  wall_clock_breakdown: true
"""


def test_check_finds_all_mistakes_at_once(place: Path, dstrain_here: Dstrain) -> None:
    (place / "bad.yaml").write_text(BAD)
    said = dstrain_here("config", "check", "bad.yaml")
    assert said.code == 2 and not said.out
    assert re.findall(r"error: bad\.yaml:(\d+): ", said.err) == ["1", "2", "6", "7", "9"]
    for words in ("did you mean steps?", "must be a number", "did you mean gradient_clipping?", "5 errors"):
        assert words in said.err
    record = json.loads(dstrain_here("config", "check", "bad.yaml", "--json").out)
    assert [each["where"] for each in record] == [f"bad.yaml:{line}" for line in (1, 2, 6, 7, 9)]
    assert all(each["message"] and each["hint"] for each in record)


def test_check_finds_what_can_not_work_together(place: Path, dstrain_here: Dstrain) -> None:
    """The micro-batch is not judged: what it is depends on the machine."""
    (place / "worse.yaml").write_text(WORSE)
    said = dstrain_here("config", "check", "worse.yaml", "--set", "pipeline=2")
    assert said.code == 2
    assert re.findall(r"error: worse\.yaml:(\d+): ", said.err) == ["1", "3", "4", "6", "6", "7", "9"]
    for words in (
        "ZeRO-0",
        "--restarts N",
        "auto?",
        "contradicts 0",
        "overlap_comm?",
        "contradicts 32",
        "timer",
    ):
        assert words in said.err
    assert "7 errors" in said.err


def test_check_with_a_recipe_below(place: Path, dstrain_here: Dstrain) -> None:
    (place / "own.yaml").write_text("deepspeed: {train_batch_size: 16}\n")
    assert dstrain_here("config", "check", "own.yaml").code == 2
    assert dstrain_here("config", "check", "own.yaml", "--recipe", "quickstart").code == 0
    assert "--recipe" in dstrain_here("config", "check", "own.yaml", "--recipe", "none").err


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_passes_check(recipe: str, dstrain_here: Dstrain) -> None:
    assert dstrain_here("config", "check", str(ds_configs() / "recipes" / f"{recipe}.yaml")).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("a: [", "not valid YAML"),
        ("steps: 1\nsteps: 2\n", "duplicate key 'steps'"),
        (None, "none.yaml"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_mistake(
    text: str | None, words: str, place: Path, dstrain_here: Dstrain
) -> None:
    if text is not None:
        (place / "none.yaml").write_text(text)
    said = dstrain_here("config", "check", "none.yaml")
    assert said.code == 2 and words in said.err and "1 error\n" in said.err


def test_check_reads_the_deepspeed_file_too(place: Path, dstrain_here: Dstrain) -> None:
    (place / "own.yaml").write_text("ds_config: d.json\n")
    assert "d.json" in dstrain_here("config", "check", "own.yaml").err
    (place / "d.json").write_text('{"zero_optimization": {\n"stage": 3},\n"typo": 1}')
    said = dstrain_here("config", "check", "own.yaml")
    assert "d.json:2" in said.err and "d.json:3" in said.err and "2 errors" in said.err


# --- schema


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema())


def test_the_schema_is_one(dstrain_here: Dstrain) -> None:
    schema = json.loads(dstrain_here("config", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema == json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == {"recipe", *RunConfig.model_fields}
    described = [key for key, value in schema["properties"].items() if "description" in value]
    assert len(described) >= len(RunConfig.model_fields)


def test_the_schema_takes_what_dstrain_takes(
    validator: jsonschema.Draft202012Validator, dstrain_here: Dstrain
) -> None:
    texts = [(ds_configs() / "recipes" / f"{recipe}.yaml").read_text() for recipe in recipes()]
    for text in [*texts, dstrain_here("config", "init", "-").out]:
        validator.validate(parse_yaml(text, name="x").values)
    validator.validate(RunConfig().model_dump())
    for fragment in (
        path for path in ds_configs().rglob("*/*.json") if path.parent.name in ("zero", "precision")
    ):
        values = json.loads(fragment.read_text().replace('"$zero"', "1").replace('"$overlap"', '"auto"'))
        values = json.loads(re.sub(r'"\$\w+"', "7", json.dumps(values)))
        validator.validate({"deepspeed": values})


@pytest.mark.parametrize(
    "wrong",
    [
        {"stpes": 1}, {"steps": 0}, {"steps": "3"}, {"lr": 0}, {"zero": 4}, {"zero": True}, {"precision": "fp8"},
        {"betas": [0.9]}, {"recipe": "none"}, {"deepspeed": {"gradient_cliping": 1}},
        {"deepspeed": {"zero_optimization": {"stage": 4}}}, {"deepspeed": {"zero_optimization": {"stge": 1}}},
        {"deepspeed": {"amp": {}}}, {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 0}}},
        {"deepspeed": {"comms_logger": {"enabled": "loud"}}},
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses(wrong: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert not validator.is_valid(wrong)


# --- explain


def test_explain_in_words_and_as_json(place: Path, dstrain_here: Dstrain) -> None:
    said = dstrain_here("plan", *PLAN, "--zero", "2", "--explain", "zero_optimization.stage")
    assert said.code == 0 and not said.err
    for line in (r"^deepspeed\.zero_optimization\.stage$", r"^  here +2$", r"^  from +zero \(--zero\)$"):
        assert re.search(line, said.out, re.MULTILINE), said.out
    record = json.loads(dstrain_here("plan", *PLAN, "--explain", "gradient_clipping", "--json").out)
    assert [each["key"] for each in record] == ["gradient_clipping", "deepspeed.gradient_clipping"]
    assert record[0]["decides"] == {"gradient_clipping": 1.0}


def test_explain_refuses_what_is_no_key_before_anything_else(place: Path, dstrain_here: Dstrain) -> None:
    said = dstrain_here("plan", "--model", "none", "--explain", "gradient_cliping")
    assert said.code == 2 and "did you mean gradient_clipping" in said.err and "none" not in said.err


# --- diff


def test_diff_of_files(place: Path, dstrain_here: Dstrain) -> None:
    (place / "a.yaml").write_text("zero: 1\nlr: 0.5\nname: x\ndeepspeed: {steps_per_print: 3}\n")
    (place / "b.yaml").write_text("lr: 0.5\nname: y\nzero: 2\n")
    said = dstrain_here("config", "diff", "a.yaml", "b.yaml")
    assert said.code == 1 and not said.err
    assert re.search(r"zero +1 \(a\.yaml:1\) +\| +2 \(b\.yaml:3\)", said.out)
    assert re.search(r"deepspeed\.steps_per_print +3 \(a\.yaml:4\) +\| +-", said.out)
    assert "lr" not in said.out and "name" not in said.out
    record = json.loads(dstrain_here("config", "diff", "a.yaml", "b.yaml", "--json").out)
    assert record[0] == {
        "part": "config", "key": "zero",
        "a": {"value": 1, "origin": "a.yaml:1"}, "b": {"value": 2, "origin": "b.yaml:3"},
    }  # fmt: skip
    assert dstrain_here("config", "diff", "a.yaml", "a.yaml") == Said(0, "no differences\n", "")


def test_places_of_two_runs_name_their_folders(place: Path, dstrain_here: Dstrain) -> None:
    for name, zero in (("a", 1), ("b", 2)):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "config.yaml").write_text(f"model: model\nzero: {zero}\n")
    said = dstrain_here("config", "diff", "a", "runs/b")
    assert re.search(r"zero +1 \(runs/a/config\.yaml:2\) +\| +2 \(runs/b/config\.yaml:2\)", said.out), said
    (place / "runs" / "b" / "config.yaml").write_text("model: model\nkey_of_2027: 3\n")
    said = dstrain_here("config", "diff", "a", "b")
    assert said.code == 2 and "runs/b/config.yaml:2: " in said.err, said
    resumed = {"origins": {"zero": "config.yaml:9"}}
    for name in ("a", "b"):
        (place / "runs" / name / "config.yaml").write_text(f"model: model\nzero: {ord(name) - 96}\n")
        parts = ("deepspeed_origins", "deepspeed", "layout", "batch", "model", "data")
        record = {**{part: {} for part in parts}, **resumed, "accelerator": "cpu", "dstrain": "0"}
        (place / "runs" / name / "plan.json").write_text(json.dumps(record))
    said = dstrain_here("config", "diff", "a", "b")
    assert re.search(r"zero +1 \(runs/a/config\.yaml:9\) +\| +2 \(runs/b/config\.yaml:9\)", said.out), said


def test_diff_of_runs_shows_what_followed(place: Path, dstrain_here: Dstrain) -> None:
    from dstrain.planning.plan import Plan

    def made(name: str, *flags: str) -> Plan:
        record = json.loads(dstrain_here("plan", *PLAN, *flags, "--json").out)
        folder = place / "runs" / name
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps(record))
        (folder / "config.yaml").write_text(json.dumps(record["config"]))
        return Plan.from_record(record)

    made("a", "--zero", "1")
    b = made("b", "--zero", "2", "--pipeline", "2", "--data-parallel", "1")
    said = dstrain_here("config", "diff", "a", "runs/b")
    assert said.code == 1
    for words in (
        r"zero +1 \(--zero\) +\| +2 \(--zero\)",
        r"zero_optimization\.stage +1 \(zero .*\) +\| +2 \(zero \(--zero\)\)",
        r"layout\n(.*\n)*  pipeline +1 +\| +2",
        r"cut +\[0, 4\] +\| +" + re.escape(str(list(b.layout.cut))),
    ):
        assert re.search(words, said.out), said.out
    assert "versions" not in said.out and "data\n" not in said.out
    assert dstrain_here("config", "diff", "a", "a").code == 0
    (place / "runs/a/plan.json").write_text("{}")
    assert "damaged" in dstrain_here("config", "diff", "a", "b").err


def test_diff_of_what_is_not_there(place: Path, dstrain_here: Dstrain) -> None:
    for name in ("none", "none.yaml"):
        said = dstrain_here("config", "diff", name, "none")
        assert said.code == 2 and "none" in said.err


def test_check_shares_the_batch_out_where_the_replicas_are_chosen(
    place: Path, dstrain_here: Callable[..., Said]
) -> None:
    (place / "batch.yaml").write_text("global_batch: 7\ndata_parallel: 2\n")
    said = dstrain_here("config", "check", "batch.yaml")
    assert said.code == 2
    assert "batch.yaml:1: a global batch of 7 can't be divided evenly among 2 replicas" in said.err

"""With which choices a run is trained once more."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.reproducing import choices_again
from dstrain.config.loader import ResolvedConfig, load_config
from dstrain.config.schema import RunConfig
from dstrain.runs.run_folder import RunFolder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run was started: with a model, a tokenizer and a text, under relative paths."""
    for name in ("model", "words"):
        (tmp_path / "there" / name).mkdir(parents=True)
    (tmp_path / "there" / "mine.txt").write_text("text")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def again(
    place: Path, flags: dict[str, Any] | None = None, settings: tuple[str, ...] = (), **chosen: Any
) -> RunConfig:
    """The choices of a second run, after one on 2 stages x 2 replicas with these choices."""
    flags_then = {"model": "model", "data": "mine.txt", "pipeline": 2, **chosen}
    resolved: ResolvedConfig = load_config(recipe=None, config_file=None, settings=(), flags=flags_then)
    folder = RunFolder(place / "runs" / "one")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(resolved.to_yaml())
    first = {
        "config": resolved.config.model_dump(mode="json"),
        "layout": {"pipeline": 2, "data_parallel": 2, "cut": [0, 3, 6]},
        "batch": {"micro_batch": 2},
        "directory": str(place),
        "model": {"folder": str(place / "model")},
    }
    return choices_again(folder, first, flags or {}, settings).config


def test_what_followed_from_the_machines_is_what_it_was(place: Path) -> None:
    config = again(place)
    assert (config.data_parallel, config.micro_batch, config.partition) == (2, 2, "2,2")
    assert (config.name, config.runs_dir) == ("one-again", str(place / "runs"))
    assert config.model == "model" and config.data == "mine.txt"


def test_a_dataset_of_code_is_no_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "my_data:texts").write_text("text")
    monkeypatch.chdir(place.parent / "here")
    config = again(place, data="my_data:texts", data_options={"count": 3})
    assert (config.data, config.data_options) == ("my_data:texts", {"count": 3})


def test_a_second_repetition_has_a_name_of_its_own(place: Path) -> None:
    (place / "runs" / "one-again").mkdir(parents=True)
    assert again(place).name == "one-again-2"


@pytest.mark.parametrize(
    ("flags", "settings"), [({"pipeline": 1}, ()), ({}, ("pipeline=1",)), ({"schedule": "dualpipev"}, ())]
)
def test_what_follows_from_a_change_is_chosen_anew(
    place: Path, flags: dict[str, Any], settings: tuple[str, ...]
) -> None:
    assert again(place, flags, settings).partition == "auto"


def test_another_batch_has_its_own_micro_batch(place: Path) -> None:
    assert again(place, {"global_batch": 8}).micro_batch == 4, "what the config has"
    assert again(place, {"seed": 6}).micro_batch == 2


def test_a_limit_of_time_ends_the_first_run_and_not_its_repetition(place: Path) -> None:
    assert again(place, time_limit="1h").time_limit is None
    assert again(place, {"time_limit": "2h"}, time_limit="1h").time_limit == "2h"


def test_what_was_typed_on_each_node_is_trained_on_this_one(place: Path) -> None:
    config = again(place, launcher="none", nodes=2, processes=2, master_addr="first", name="one")
    assert (config.launcher, config.nodes, config.processes, config.master_addr) == (None, None, None, None)


def test_paths_count_from_where_the_run_was_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.parent / "here")
    config = again(place, tokenizer="words")
    assert [config.model, config.data, config.tokenizer] == [
        str(place / name) for name in ("model", "mine.txt", "words")
    ]


def test_patterns_prefixes_and_templates_count_from_there_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = place / "an [odd] name"
    for name in ("web/a.jsonl", "tok/train.bin", "tok/train.idx", "chat.jinja", "org/data/a.txt"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("text")
    monkeypatch.chdir(place.parent / "here")
    odd = f"{place}/an [[]odd] name"
    sources = ["web/*.jsonl", "tok/train", "org/data", "org/name", "none/*.jsonl", "/abs/*.jsonl", "stdlib"]
    moved = [f"{odd}/web/*.jsonl", f"{there}/tok/train", f"{there}/org/data", *sources[3:]]
    for source, expected in zip(sources, moved, strict=True):
        assert again(there, data=source, chat_template="chat.jinja").data == expected
    config = again(there, data=[{"path": path, "name": f"n{at}"} for at, path in enumerate(sources)])
    assert [source.path for source in config.sources] == moved
    assert Path(glob.glob(config.sources[0].path)[0]) == there / "web/a.jsonl"
    config = again(there, data="web/*.jsonl", chat_template="chat.jinja", validation=[{"path": "tok/train"}])
    assert config.chat_template == str(there / "chat.jinja") and config.read_sources[-1].path == moved[1]
    (there / "chatml").touch()
    assert again(there, chat_template="chatml").chat_template == "chatml"


def test_what_is_gone_is_taken_from_the_run_folder(place: Path) -> None:
    for name in ("model", "words"):
        (place / name).rmdir()
    config = again(place, tokenizer="words")
    assert config.model == config.tokenizer == str(place / "runs" / "one" / "model")
    config = again(place, tokenizer="bytes", init="pretrained")
    assert config.model == "model", "weights are not kept there"
    assert config.tokenizer == "bytes"

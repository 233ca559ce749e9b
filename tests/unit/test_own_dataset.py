"""A dataset from outside in a plan: what names it, what refuses it, and that its code runs in processes of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.events import Events
from dstrain.api.planning import check_code_here
from dstrain.api.prepare_data import prepare_data
from dstrain.config.files import cache_folder
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.planning.checks import refuse
from dstrain.planning.plan import Plan, PlannedData
from dstrain.train.run_data import prepare_run_data
from tests.support.plans import plan
from tests.unit.test_run_data import on_hosts

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
OWN = ("data=own_datasets:numbered", f"code_dirs=[{OWN_CODE}]")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class Heard(Events):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, topic: str = "note") -> None:
        self.notes.append(text)


def prepared(name: str, *settings: str, events: Events | None = None, **options: Any) -> PlannedData:
    given = (f"data=own_datasets:{name}", f"code_dirs=[{OWN_CODE}]", "seq_len=32", *settings)
    resolved = load_config(settings=[*given, *(f"data_options.{key}={options[key]}" for key in options)])
    return prepare_data(resolved, "bytes", events or Heard())


def test_the_plan_says_that_it_is_from_outside() -> None:
    made = plan(settings=(*OWN, "data_options={count: 3}"))
    assert made.not_covered == ("dataset own_datasets:numbered",)
    assert made.run_config.data_options == {"count": 3}
    assert "data_options" not in made.identity, "the fingerprint says what it gave"
    assert Plan.from_record(json.loads(json.dumps(made.to_record()))) == made


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("data_options={count: 3}",), "data_options (count) are for a dataset of your own, and stdlib is"),
        (("data=./a:b", "data_options.count=3"), "and ./a:b is none"),
        ((*OWN, "data_options={a: .nan}"), "must be valid JSON"),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(DstrainError) as caught:
        refuse(load_config(settings=settings))
    assert words in str(caught.value)


def test_a_name_of_code_is_code_and_a_file_of_that_name_is_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "my_data:texts").write_text("text " * 200)
    code = load_config(settings=["data=my_data:texts", f"code_dirs=[{OWN_CODE}]", "seq_len=32"])
    with pytest.raises(DstrainError, match="dataset my_data:texts: there is no module") as caught:
        check_code_here(code)
    assert "the file of that name is --data ./my_data:texts" in str(caught.value.hint)
    file = load_config(settings=["data=./my_data:texts", "seq_len=32"])
    assert file.config.plugins == () and prepare_data(file, "bytes", Heard()).documents == 1


def test_it_is_read_at_each_plan_and_tokenized_once(tmp_path: Path) -> None:
    calls, heard = tmp_path / "calls", Heard()
    first = prepared("numbered", log=str(calls), events=heard)
    assert len(calls.read_text().splitlines()) == 2 and str(os.getpid()) not in calls.read_text()
    assert (first.source, first.documents, first.files) == ("own_datasets:numbered", 40, 0)
    assert heard.notes.count("to standard output") == heard.notes.count("to standard error") == 2
    assert prepared("numbered", log=str(calls)) == first
    assert len(calls.read_text().splitlines()) == 3
    assert prepared("Numbered") == dataclasses.replace(first, source="own_datasets:Numbered")


@pytest.mark.parametrize(
    ("name", "options", "where", "words"),
    [
        ("in_no_order", {}, "--set data", "gave other documents when it was called again (40 with"),
        ("broken", {"third": "bytes"}, "--set data", "document 3 is bytes, not a str"),
        ("broken", {"third": "raises"}, str(OWN_CODE), "failed at document 3: KeyError"),
        ("broken", {"third": "ends the process"}, "--set data", "ended before it had read all"),
    ],
)
def test_what_is_wrong_with_it_is_said_by_the_plan(
    name: str, options: dict[str, str], where: str, words: str
) -> None:
    with pytest.raises(DstrainError) as caught:
        prepared(name, **options)
    assert f"own_datasets:{name}" in caught.value.message and words in caught.value.message
    assert caught.value.exit_code == 2 and str(caught.value.where).startswith(where)


def test_ranks_take_the_plans_documents_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has the tokens calls no code; one that has not may give other documents, which is refused."""
    settings = (
        "data=own_datasets:lines",
        f"code_dirs=[{OWN_CODE}]",
        "data_options.file=a.jsonl",
        "seq_len=32",
    )
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {number} " * 9}) + "\n" for number in range(30)))
    resolved = load_config(settings=settings)
    data = prepare_data(resolved, "bytes", Heard())
    made = plan(settings=settings, data=data)
    fingerprint = prepare_run_data(made).sources[0].data.summary()["fingerprint"]
    assert fingerprint == data.fingerprint

    file.write_text(file.read_text().replace("text 7", "text 8"))
    assert prepare_run_data(made).sources[0].data.summary()["fingerprint"] == fingerprint, (
        "the plan's documents"
    )
    assert prepare_data(resolved, "bytes", Heard()).fingerprint != fingerprint, "what a resumed run refuses"

    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "cache of another host"))
    assert not list(cache_folder().iterdir())
    with pytest.raises(DstrainError, match="own_datasets:lines gave other documents when it was called"):
        prepare_run_data(made)
    with pytest.raises(DstrainError, match=r"on .*: dataset own_datasets:lines gave other") as caught:
        prepare_run_data(on_hosts(made, 2))
    assert "every host needs the module of own_datasets:lines with what it reads" in str(caught.value.hint)


def test_the_light_side_imports_none_of_what_reads() -> None:
    code = "import sys, dstrain.data.reading.own_documents; print(*{'numpy', 'torch', 'datasets'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""

"""A damaged file in a run folder: each command that reads it ends with one message, or does without the file.

What a child process or a rank finds out reaches the user with place and way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.made_run import COMMANDS, MadeRun, make_run, one_error

DAMAGED = {
    "no JSON": b"{nonsense",
    "a number of 6,000 digits": b'{"format": 2, "step": ' + b"7" * 6000 + b"}",
    "a list": b"[]",
    "nothing": b"",
    "an empty object": b"{}",
    "no text": bytes(range(256)),
}
FILES = (
    "config.yaml", "plan.json", "metrics.jsonl", "result.json", "record.json", "launches.jsonl", "run-id",
    "model/config.json", "ds_config.json", ".lock", "environment", "checkpoints/step-000002/manifest.json",
    "checkpoints/step-000002/DAMAGED",
)  # fmt: skip
READERS = {
    **{name: COMMANDS[name] for name in ("resume", "checkpoints", "export")},
    "reproduce": ("reproduce", "old", "--name", "again"),
    "config show": ("config", "show", "--config", "runs/old/config.yaml"),
    "config diff": ("config", "diff", "old", "old"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, materials: Path) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"), materials)


def wrong_with(made: MadeRun, file: str, content: bytes, reader: str) -> str | None:
    made.restore()
    (made.place / "runs" / "old" / file).write_bytes(content)
    said = made.call(*READERS[reader])
    if said.code == 0 or (reader == "checkpoints" and said.code == 1 and "damaged: " in said.out):
        return None
    wrong = one_error(said)
    return f"{reader} of a damaged {file}: {wrong}\n{said.err[-800:]}" if wrong else None


@pytest.mark.parametrize("damage", ("no JSON", "a number of 6,000 digits"))
def test_a_plan_that_a_child_process_reads(made: MadeRun, damage: str) -> None:
    made.restore()
    plan = made.place / "runs" / "old" / "plan.json"
    plan.write_bytes(DAMAGED[damage])
    said = made.call(*READERS["export"])
    assert said.code == 2 and one_error(said) is None, said
    assert (
        f"error: {plan}" in said.err and "the plan is damaged: " in said.err and "dstrain resume" in said.err
    )


def test_a_checkpoint_that_is_cut_off(made: MadeRun) -> None:
    made.restore()
    file = next((made.place / "runs/old/checkpoints/step-000002/state").glob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-50])
    for reader in ("resume", "export"):
        said = made.call(*READERS[reader])
        assert one_error(said) is None, said
        assert "step-000002" in said.err or "no complete checkpoint" in said.err, said


@pytest.mark.parametrize("file", ("config.yaml", "metrics.jsonl"))
def test_every_reader(made: MadeRun, file: str) -> None:
    assert not list(_wrong(made, [file], ["a number of 6,000 digits"]))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_damage_for_every_reader(made: MadeRun) -> None:
    wrong = list(_wrong(made, FILES, DAMAGED))
    assert not wrong, "\n".join(wrong)


def _wrong(made: MadeRun, files: Iterable[str], damages: Iterable[str]) -> Iterator[str]:
    for file in files:
        for damage in damages:
            for reader in READERS:
                if said := wrong_with(made, file, DAMAGED[damage], reader):
                    yield said

"""What docs/extending.md shows: its code and its config are taken from the page and run."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.e2e.conftest import Said

pytestmark = pytest.mark.timeout(300)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def test_the_hook_of_the_page_runs(dstrain: Callable[..., Said], place: Path, repository: Path) -> None:
    page = repository / "docs" / "extending.md"
    code, config = blocks(page, "python")[0], blocks(page, "yaml")[0]
    assert len(code.splitlines()) < 30, "short enough to be read at once"
    (place / "my_hooks.py").write_text(code)
    (place / "my.yaml").write_text(config)
    small = [
        *("--model", "model", "--data", "text.jsonl", "--pipeline", "2", "--steps", "6", "--seq-len", "32"),
        *("--global-batch", "8", "--micro-batch", "2", "--set", "eval_every=2", "--set", "sample_tokens=0"),
        *("--save-every", "never", "--name", "mine", "--set", "warmup_steps=0"),
    ]
    said = dstrain("run", "--config", "my.yaml", *small)
    assert said.code == 0, said.out + said.err
    folder = RunFolder(place / "runs" / "mine")
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    best = min(losses, key=lambda step: losses[step])
    assert json.loads((folder.path / "best-step.json").read_text()) == {"step": best, "loss": losses[best]}
    assert f"best validation loss so far: {losses[best]:.4f} at step {best}" in said.out
    assert best > 0 and "not covered by the equality proof: hook my_hooks:BestStep" in said.out


@pytest.mark.parametrize(
    ("key", "module", "marks"),
    [
        ("optimizer", "my_optimizers", "torch.optim.Optimizer"),
        ("loss", "my_losses", "def focal("),
        ("lr_schedule", "my_schedules", "def wsd("),
    ],
)
def test_what_the_page_shows_trains_alike_in_two_layouts(
    key: str, module: str, marks: str, dstrain: Callable[..., Said], place: Path, repository: Path
) -> None:
    page = repository / "docs" / "extending.md"
    code = next(block for block in blocks(page, "python") if marks in block)
    config = next(block for block in blocks(page, "yaml") if f"\n{key}: {module}:" in block)
    assert len(code.splitlines()) < 30, "short enough to be read at once"
    (place / f"{module}.py").write_text(code)
    (place / "my.yaml").write_text(config)
    small = [
        *(
            "--model",
            "model",
            "--data",
            "text.jsonl",
            "--steps",
            "6",
            "--seq-len",
            "32",
            "--global-batch",
            "8",
        ),
        *("--micro-batch", "2", "--set", "eval_every=0", "--set", "sample_tokens=0", "--save-every", "never"),
        *("--set", "warmup_steps=0"),
    ]
    if key != "lr_schedule":
        small += ["--set", "lr_schedule=constant"]
    losses = []
    for name, layout in {"one": ("--zero", "0"), "staged": ("--zero", "1", "--pipeline", "2")}.items():
        said = dstrain("run", "--config", "my.yaml", *small, *layout, "--name", name)
        assert said.code == 0, said.out + said.err
        lines = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if record["step"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0], "it learns"


def test_the_dataset_of_the_page_is_trained_on(
    dstrain: Callable[..., Said], place: Path, repository: Path
) -> None:
    page = repository / "docs" / "extending.md"
    code = next(block for block in blocks(page, "python") if "sqlite3" in block)
    config = next(block for block in blocks(page, "yaml") if "data_options:" in block)
    assert len(code.splitlines()) < 30, "short enough to be read at once"
    (place / "mine").mkdir()
    (place / "mine" / "my_data.py").write_text(code)
    (place / "mine" / "my.yaml").write_text(config)
    with closing(sqlite3.connect(place / "mine" / "articles.sqlite")) as database:
        database.execute("CREATE TABLE articles (id INTEGER, title TEXT, text TEXT)")
        rows = [(number, f"Article {number}", "All about it. " * number) for number in range(40, 0, -1)]
        database.executemany("INSERT INTO articles VALUES (?, ?, ?)", rows)
        database.commit()
    small = [
        *("--model", "model", "--steps", "3", "--seq-len", "32", "--global-batch", "8", "--micro-batch", "2"),
        *("--set", "eval_every=0", "--set", "sample_tokens=0", "--save-every", "never", "--pipeline", "2"),
        *("--set", "warmup_steps=0", "--name", "mine"),
    ]
    said = dstrain("run", "--config", "mine/my.yaml", *small)
    assert said.code == 0, said.out + said.err
    assert "not covered by the equality proof: dataset my_data:articles" in said.out
    plan = json.loads((place / "runs" / "mine" / "plan.json").read_text())
    text = sum(len(f"{title}\n\n{text}") for _, title, text in rows)
    assert (plan["data"]["documents"], plan["data"]["bytes"]) == (40, text)

"""Runs under torture: what they train, how they are started, and what must be true of them after each kill."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dstrain.runs.checkpoint.manifest import (
    damage_of,
    files_of,
    named_checkpoints,
    read_manifest,
    wrong_files,
)
from dstrain.runs.run_folder import RunFolder
from tests.support.materials import LLAMA
from tests.support.torture.attempt import ALL, Attempt
from tests.support.torture.moments import START, STEP, Moment

STEPS = 60
SAVE_EVERY = 5
KEEP = 2
_SLOW_SECONDS = 0.02
# Some are computed before the guard, or the launcher, has told the ranks to end.
_MOST_STEPS_AFTER_A_KILL = 25

CONFIG = {
    "model": "model",
    "data": "text.jsonl",
    "seq_len": 32,
    "validation": 0.0,
    "steps": STEPS,
    "global_batch": 8,
    "micro_batch": 2,
    "lr": 3e-3,
    "eval_every": 0,
    "sample_tokens": 0,
    "save_every": SAVE_EVERY,
    "keep": KEEP,
    "save_weights": True,
}


@dataclass(frozen=True)
class Layout:
    zero: int
    pipeline: int
    data_parallel: int
    precision: str = "fp32"
    adapter: str = "none"

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data_parallel

    def __str__(self) -> str:
        name = f"zero{self.zero}-pp{self.pipeline}-dp{self.data_parallel}-{self.precision}"
        return name if self.adapter == "none" else f"{name}-{self.adapter}"


def write_materials(place: Path) -> None:
    """A tiny model, and a text of which no two samples are equal."""
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(LLAMA))
    draws = random.Random(1)
    texts = ["".join(draws.choices("abcdefgh ", k=200)) for _ in range(80)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


class Run:
    """One run, over all of its attempts."""

    def __init__(self, place: Path, name: str, layout: Layout, *, real: bool = False) -> None:
        self.place = place
        self.layout = layout
        self.folder = RunFolder(place / "runs" / name)
        self.attempts = 0
        self._real = real
        self._config = place / f"{name}.yaml"
        record = CONFIG | {
            "name": name,
            "zero": layout.zero,
            "pipeline": layout.pipeline,
            "data_parallel": layout.data_parallel,
            "precision": layout.precision,
            "adapter": layout.adapter,
        }
        self._config.write_text(yaml.safe_dump(record))

    @contextmanager
    def attempt(self, *options: str, **hindered: Any) -> Iterator[Attempt]:
        """`dstrain run` the first time, `dstrain resume` then. Whatever happens, nothing of it runs on after this."""
        self.attempts += 1
        command = ["run", "--config", str(self._config)]
        if self.folder.config.exists():
            command = ["resume", str(self.folder.path)]
        elif self.folder.path.exists():  # it was killed before it said what it trains
            command.append("--resume")
        attempt = Attempt(
            [*command, *options],
            place=self.place,
            folder=self.folder,
            number=self.attempts,
            hindered=hindered,
            real=self._real,
        )
        try:
            yield attempt
        finally:
            attempt.end()

    def newest(self) -> int:
        """The step of the newest checkpoint; 0 where there is none. All that have a name must be whole to the byte."""
        named = named_checkpoints(self.folder.checkpoints)
        for checkpoint in named:
            assert damage_of(checkpoint) is None, (checkpoint, damage_of(checkpoint))
            files = files_of(read_manifest(checkpoint))
            assert not wrong_files(checkpoint, files, sorted(files))
        return int(named[-1].name.removeprefix("step-")) if named else 0

    def finish(self) -> None:
        """The last attempt: nobody disturbs it."""
        begins_at = self.newest() + 1
        with self.attempt() as attempt:
            code = attempt.wait(180)
            assert code == 0, self.told(attempt)
            attempt.wait_until_all_have_ended()
            self.check_begin(attempt, begins_at)
        self.check_records(begins_at)

    def kill(self, moment: Moment, seed: str) -> str:
        """An attempt that is killed. Tells what came of it, and how far a save had come that was left behind."""
        begins_at = self.newest() + 1
        named = len(named_checkpoints(self.folder.checkpoints))
        slow = {"slow": _SLOW_SECONDS, "seed": seed} if moment.in_a_save else {}
        with self.attempt(**slow) as attempt:
            seen = attempt.wait_until(lambda: _is_seen(moment, attempt, self.layout.world_size))
            assert seen, f"it ended before {moment}:\n{self.told(attempt)}"
            attempt.wait_a_moment(moment.delay)
            attempt.kill_part(moment.victim, random.Random(seed))
            steps = attempt.steps()
            attempt.wait_until_all_have_ended()
            assert attempt.steps() <= steps + _MOST_STEPS_AFTER_A_KILL, "it trained on"
            code = attempt.wait()
            self.check_begin(attempt, begins_at)
            assert code != 0, f"{moment}: it ended as if nothing had happened"
            if code > 0:
                self.check_one_clear_error(attempt)
            left = attempt.new_marks() & {"aside", "files", "manifest", "removing"}
        self.check_records(begins_at)
        newest = self.newest()
        assert newest >= begins_at - 1, "a checkpoint was lost"
        # One more than before: killed between the new one's name and the old ones' end.
        assert len(named_checkpoints(self.folder.checkpoints)) <= max(KEEP, named) + 1
        return f"exit code {code}; newest {begins_at - 1} -> {newest}; left {sorted(left)}"

    def stop_after(self, steps: int) -> None:
        """An attempt that is killed whole after so many steps."""
        with self.attempt() as attempt:
            assert attempt.wait_until(lambda: attempt.steps() >= steps), self.told(attempt)
            attempt.kill_part(ALL, random.Random())
            attempt.wait_until_all_have_ended()

    def fail(self, *, signs: Sequence[str], **hindered: Any) -> None:
        """An attempt that ends by itself, with one error that holds each of ``signs``."""
        begins_at = self.newest() + 1
        with self.attempt(**hindered) as attempt:
            code = attempt.wait(180)
            assert code == 1, self.told(attempt)
            attempt.wait_until_all_have_ended()
            self.check_one_clear_error(attempt)
            error = self.told(attempt).split("error: ")[1]
            for sign in signs:
                assert sign in error, error
        self.check_records(begins_at)

    def told(self, attempt: Attempt) -> str:
        return attempt.output.read_text(encoding="utf-8", errors="replace")[-6000:]

    def check_begin(self, attempt: Attempt, begins_at: int) -> None:
        if begins_at > 1:
            assert f"continues from step-{begins_at - 1:06d}\n" in attempt.output.read_text(encoding="utf-8")

    def check_one_clear_error(self, attempt: Attempt) -> None:
        """One message for the user; the lines of a log that it quotes begin with a bar."""
        lines = attempt.output.read_text(encoding="utf-8").splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, self.told(attempt)
        assert not any(line.startswith("Traceback") for line in lines), self.told(attempt)

    def records(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has computed, in the order of time, repeated steps included."""
        path = self.place / "records" / self.folder.name / f"rank-{rank}.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def check_records(self, begins_at: int) -> None:
        """The last attempt began where its newest checkpoint ended, and passed over no step."""
        for rank in range(self.layout.world_size):
            steps = [record["step"] for record in self.records(rank) if record["attempt"] == self.attempts]
            assert steps == list(range(begins_at, begins_at + len(steps))), (rank, begins_at, steps)

    def sequence(self, rank: int) -> dict[int, dict[str, Any]]:
        """What counts of each step: what was computed last."""
        return {record["step"]: _without_attempt(record) for record in self.records(rank)}


def _without_attempt(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "attempt"}


def _is_seen(moment: Moment, attempt: Attempt, world_size: int) -> bool:
    if moment.sign == START:
        return len(attempt.parts().get("rank", [])) >= world_size
    if moment.sign == STEP:
        return attempt.steps() >= moment.steps
    return moment.sign in attempt.new_marks()


def assert_ends_as_unbroken(run: Run, unbroken: Callable[[Layout], Run]) -> None:
    """Nobody disturbs it any more: in the end it is as the unbroken run of its layout."""
    run.finish()
    assert_equal_to_unbroken(run, unbroken(run.layout))
    assert_tidy(run)


def assert_equal_to_unbroken(run: Run, unbroken: Run) -> None:
    """To the bit: what every rank computed, what metrics.jsonl says, and the weights."""
    for rank in range(run.layout.world_size):
        expected = unbroken.sequence(rank)
        assert sorted(expected) == list(range(1, STEPS + 1))
        assert run.sequence(rank) == expected, rank
        for record in run.records(rank):  # a step that was repeated, was the same each time
            assert _without_attempt(record) == expected[record["step"]], (rank, record)
    assert_equal_metrics(run, unbroken)
    assert_equal_weights(run, unbroken)


def assert_equal_weights(run: Run, unbroken: Run) -> None:
    """Every byte of the last weights."""
    weights = {path.name: path.read_bytes() for path in unbroken.folder.weights.iterdir()}
    assert weights
    assert {path.name: path.read_bytes() for path in run.folder.weights.iterdir()} == weights


def assert_equal_metrics(run: Run, unbroken: Run) -> None:
    """Every step once, in order, no line torn; loss, learning rate, norm and tokens to the bit."""
    assert _metrics(run) == _metrics(unbroken)


def _metrics(run: Run) -> list[tuple[Any, ...]]:
    text = run.folder.metrics.read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [tuple(line[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")) for line in lines]


def assert_tidy(run: Run) -> None:
    """The newest ones are there, whole, and nothing else is left of all the saves."""
    names = sorted(path.name for path in run.folder.checkpoints.iterdir())
    assert len(names) == KEEP and names[-1] == f"step-{STEPS:06d}", names
    assert run.newest() == STEPS

"""Runs whose data is streamed: the same losses in any layout and after any stop, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Held, Stream, StreamRequest
from dstrain.runs.run_folder import RunFolder, read_metrics
from dstrain.shared_caches import clear_leftovers
from tests.e2e.test_chat import write_conversations
from tests.support.e2e import Said, one_message, start

pytestmark = pytest.mark.timeout(400)

STREAM = """\
model: model
tokenizer: bytes
data:
  - {path: texts, weight: 2}
  - {path: chat, format: messages, weight: 1, validation: 0.1}
data_stream: true
too_long: drop
validation: 0
eval_every: 4
eval_samples: 6
seq_len: 128
steps: 8
global_batch: 8
micro_batch: 2
seed: 5
lr: 1.0e-3
lr_schedule: constant
warmup_steps: 0
eps: 1.0e-3
sample_tokens: 0
"""


@pytest.fixture
def streamed(place: Path) -> Path:
    (place / "stream.yaml").write_text(STREAM)
    (place / "texts").mkdir()
    for shard in range(5):
        texts = [f"{shard}.{number} " + "the rank of a stage " * (number % 7) for number in range(30)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (place / "texts" / f"{shard}.jsonl").write_text(lines)
    (place / "chat").mkdir()
    write_conversations(place / "chat" / "a.jsonl")
    return place


def losses_of(place: Path, name: str) -> list[tuple[float | None, float | None]]:
    records = read_metrics(RunFolder(place / "runs" / name).metrics)
    return [(record.get("loss"), record.get("validation_loss")) for record in records]


def assert_nothing_is_left() -> None:
    """No ring in the cache, and no process that makes rows."""
    until = time.monotonic() + 20
    while left := [*Path(os.environ["DSTRAIN_CACHE"]).glob("streams/*"), *producers()]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def remove_errors() -> None:
    """What a stream has failed with stays for the ranks of the host to read, and nothing else."""
    left = list(Path(os.environ["DSTRAIN_CACHE"]).glob("streams/*/*"))
    assert {path.name for path in left} <= {"error.json"}
    for path in left:
        path.unlink()
        path.parent.rmdir()


def producers() -> list[int]:
    """Processes of this test that make rows."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if b"dstrain.data.streaming.producer" in words and os.environ["DSTRAIN_CACHE"].encode() in words:
            found.append(int(path.parts[2]))
    return found


def test_stopped_and_resumed_with_other_replicas_it_trains_on_the_same(
    streamed: Path, dstrain: Callable[..., Said]
) -> None:
    whole = dstrain("run", "--config", "stream.yaml", "--name", "whole")
    assert whole.code == 0, whole.out + whole.err
    assert "streamed: tokens are counted while training" in whole.out
    first = dstrain(
        "run", "--config", "stream.yaml", "--name", "part", "--steps", "3", "--data-parallel", "4"
    )
    assert first.code == 0, first.out + first.err
    for steps, *layout in (("5", "--data-parallel", "2", "--pipeline", "2"), ("8", "--data-parallel", "4")):
        said = dstrain("resume", "part", "--steps", steps, *layout, *(["--pipeline", "1"] * (steps == "8")))
        assert said.code == 0, said.out + said.err
    found, expected = losses_of(streamed, "part"), losses_of(streamed, "whole")
    assert [loss for loss, _ in found[1:]] == pytest.approx([loss for loss, _ in expected[1:]], rel=1e-5)
    assert found[4][1] == pytest.approx(expected[4][1], rel=1e-5)
    assert found[8][1] == pytest.approx(expected[8][1], rel=1e-5)
    assert len({loss for loss, _ in expected}) == 9
    assert_nothing_is_left()


def test_a_killed_process_ends_the_run_which_goes_on_later(
    streamed: Path, dstrain: Callable[..., Said]
) -> None:
    options = ("--config", "stream.yaml", "--steps", "400", "--set", "save_every=5", "--set", "eval_every=0")
    command = start(streamed, os.environ, "run", *options, "--name", "killed", "--data-parallel", "2")
    metrics = RunFolder(streamed / "runs" / "killed").metrics
    until = time.monotonic() + 100
    while not metrics.exists() or len(read_metrics(metrics)) < 8:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(producers()[0], signal.SIGKILL)
    said = command.said(100)
    assert said.code == 1
    assert "has been killed" in said.err + said.out
    assert "Traceback" not in said.err + said.out
    remove_errors()
    done = read_metrics(metrics)[-1]["step"]
    again = dstrain("resume", "killed", "--steps", str(done + 5), "--data-parallel", "4")
    assert again.code == 0, again.out + again.err
    whole = dstrain("run", *options, "--name", "whole", "--steps", str(done + 5))
    assert whole.code == 0, whole.out + whole.err
    found, expected = ([loss for loss, _ in losses_of(streamed, name)] for name in ("killed", "whole"))
    assert found[1:] == pytest.approx(expected[1:], rel=1e-4)
    assert_nothing_is_left()


@pytest.mark.parametrize("steps", [8, pytest.param(0, marks=pytest.mark.heavy)])
def test_a_disk_that_does_not_answer_is_the_end_of_the_run_with_the_file(streamed: Path, steps: int) -> None:
    """As a process that waits for a disk, one that is stopped does nothing, and is not gone."""
    options = ("--config", "stream.yaml", "--steps", "40000", "--set", "eval_every=0")
    command = start(streamed, os.environ, "run", *options, "--name", "stuck", "--set", "hang_after=6s")
    metrics = RunFolder(streamed / "runs" / "stuck").metrics
    until = time.monotonic() + 100
    while not (metrics.exists() and len(read_metrics(metrics)) >= steps) if steps else len(producers()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    texts = next(pid for pid in producers() if b"-0.ring" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(texts, signal.SIGSTOP)
    said = command.said(100)
    assert said.code == 1
    assert "(hang_after: 6 s); rank 0 waits for data, which reads " in said.err, said.err
    assert re.search(r"reads \S*texts/[0-4]\.jsonl in " if steps else r"reads \S*texts", said.err), said.err
    assert "Traceback" not in said.err + said.out
    until = time.monotonic() + 20
    while left := producers():
        assert time.monotonic() < until, left
        time.sleep(0.05)
    clear_leftovers(Path(os.environ["DSTRAIN_CACHE"]))  # as the next plan does: the ranks were killed
    left = list(Path(os.environ["DSTRAIN_CACHE"]).glob("streams/*"))
    assert {path.suffix for path in left} == {".lock"}
    for path in left:
        path.unlink()


def test_a_record_that_can_not_be_read_is_the_end_of_the_run_with_its_place(
    streamed: Path, dstrain: Callable[..., Said]
) -> None:
    # Behind what the plan looks at.
    lines = [json.dumps({"text": "x" * 4000})] * 300
    (streamed / "texts" / "5.jsonl").write_text("\n".join([*lines, "{no"]))
    said = dstrain("run", "--config", "stream.yaml", "--name", "bad", "--steps", "5000")
    assert said.code == 1, said.out + said.err
    assert "texts/5.jsonl:301" in said.err and "not JSON" in said.err
    assert "Traceback" not in said.err + said.out
    remove_errors()


def test_a_changed_file_is_another_run(streamed: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain("run", "--config", "stream.yaml", "--name", "run", "--steps", "2")
    assert said.code == 0, said.out + said.err
    with (streamed / "texts" / "2.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    resumed = dstrain("resume", "run", "--steps", "4")
    assert resumed.code == 2
    assert "data" in resumed.err and "start a new run" in resumed.err


WRONG = {
    "steps": (("--data", "texts"), ["needs the number of steps", "--steps N"]),
    "code": (("--data", "my_module:documents", "--steps", "2"), ["can't be streamed", "write files"]),
    "tokens": (("--data", "tokens.jsonl", "--steps", "2"), ["nothing to tokenize", "data_stream to false"]),
    "too little": (
        ("--data", "texts", "--steps", "2", "--seq-len", "100000", "--set", "validation=0"),
        ["but one row needs 100,000", "smaller seq_len"],
    ),
    "validation": (
        ("--data", "texts", "--steps", "2", "--set", "validation=0.001"),
        ["validation: 0.001 chooses", "larger fraction"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_streamed(streamed: Path, dstrain_here: Callable[..., Said], case: str) -> None:
    (streamed / "tokens.jsonl").write_text('{"input_ids": [1, 2, 256]}\n')
    arguments, words = WRONG[case]
    said = dstrain_here(
        "plan", "--model", "model", "--tokenizer", "bytes", "--set", "data_stream=true", *arguments
    )
    one_message(said, words)


def test_the_first_samples_of_a_stream_are_shown(streamed: Path, dstrain: Callable[..., Said]) -> None:
    only = ("--config", "stream.yaml", "--data", "texts", "--set", "validation=0.1")
    said = dstrain("data", "show", *only, "-n", "5", "--json")
    assert said.code == 0, said.err
    samples = json.loads(said.out)
    planned = dstrain("plan", *only, "--json")
    held = json.loads(planned.out)["data"]["held_until"]
    request = StreamRequest("texts", "bytes", 128, 5, held=Held(0.1, *held))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(streamed)
        made = next(make_rows(Stream.open(request), StreamState()))
    rows = made.rows.rows(made.order[:5]).input_ids
    for number, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        assert sample["number"] == number
        text = "".join(piece["text"] for piece in sample["pieces"] if not piece["beyond"])
        assert text == "".join("<|endoftext|>" if token == 256 else chr(token) for token in row)
    said = dstrain("data", "show", "--config", "stream.yaml", "-n", "8")
    assert said.code == 0, said.err
    assert "sample 7 " in said.out and "chat: " in said.out and "texts: " in said.out
    assert re.search(r"about \d+ training samples an epoch", said.out)
    assert_nothing_is_left()


def test_a_limit_of_a_stream(streamed: Path, dstrain: Callable[..., Said]) -> None:
    source = "data=[{path: texts, limit: 40}]"
    said = dstrain("run", "--config", "stream.yaml", "--name", "few", "--set", source, "--steps", "6")
    assert said.code == 0, said.out + said.err
    plan = json.loads((streamed / "runs/few/plan.json").read_text())["data"]
    assert (plan["documents"], plan["limit_until"]) == (40, [1, 10])
    resumed = dstrain("resume", "few", "--steps", "8", "--data-parallel", "2")
    assert resumed.code == 0, resumed.out + resumed.err
    whole = dstrain("run", "--config", "stream.yaml", "--name", "whole", "--set", source, "--steps", "8")
    assert whole.code == 0, whole.out + whole.err
    found, expected = ([loss for loss, _ in losses_of(streamed, name)] for name in ("few", "whole"))
    assert found[1:] == pytest.approx(expected[1:], rel=1e-5)


def test_there_are_no_statistics_of_a_stream(streamed: Path, dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("data", "stats", "--config", "stream.yaml")
    one_message(said, ["a stream has no statistics", "data_stream=false"])

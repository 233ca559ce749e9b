"""Run folders from others through the command line: nothing that leads out is followed, and their code is not run."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import MANIFEST, FileRecord, checksum, make_manifest
from dstrain.runs.run_folder import RunFolder
from tests.support.e2e import Said, one_message

CANARY = "alias ls='ls --color'\n"
RUN_ID = "0123456789abcdef"
CONFIG = "model: model\ndata: text.jsonl\nsteps: 4\nseq_len: 32\nglobal_batch: 8\n"
LINKED = [
    *(
        "config.yaml",
        "plan.json",
        "ds_config.json",
        "launch.sh",
        "launch.sbatch",
        "environment",
        ".environment",
    ),
    *(
        ".lock",
        ".lock-claim",
        ".lock-node-1",
        ".launch",
        ".shared",
        "stop",
        "hostfile",
        "metrics.jsonl",
        "result.json",
    ),
    *("record.json", "launches.jsonl", "reproduction.json", "run-id", "source-0123.diff", "slurm-17.log"),
    *("mlflow.db", "mlflow.db-wal", ".plan-node-1.json", ".anything"),
    *("logs", "logs/launcher.log", "logs/launcher-node-1.log", "logs/rank-0.log", "logs/rank-0.status.json"),
    *(
        "logs/rank-0.stacks.txt",
        "checkpoints",
        "checkpoints/step-000004",
        "checkpoints/step-000002/manifest.json",
    ),
    *(
        "checkpoints/step-000002/DAMAGED",
        "checkpoints/step-000002/state",
        "checkpoints/step-000002/state/model.pt",
    ),
    *(
        "checkpoints/.step-000006.partial",
        "checkpoints/.step-000001.removed",
        "model",
        "model/config.json",
        "weights",
    ),
    *(
        "weights/stage-0.safetensors",
        "trackers",
        "trackers/wandb.json",
        "profile",
        "profile/rank-0.pt.trace.json",
    ),
    *("tensorboard", "tensorboard/events.out.tfevents.1", "wandb", "wandb/run-1"),
]
HARD_LINKED = [".lock", "launches.jsonl", "logs/launcher.log", "logs/rank-0.log", "mlflow.db"]
COMMANDS = [
    ["resume", "given", "--steps", "6"],
    ["run", "--config", "good.yaml", "--resume", "--name", "given"],
    ["reproduce", "given"],
    ["export", "given", "out"],
    ["checkpoints", "given", "--verify"],
    ["config", "diff", "given", "given"],
]


@pytest.fixture
def given(place: Path) -> Path:
    """What a run leaves, as far as it is looked at before anything is started."""
    folder = RunFolder(place / "runs" / "given")
    folder.make("private")
    checkpoint = folder.checkpoints / "step-000002"
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "model.pt").write_bytes(b"1" * 100)
    files = {"state/model.pt": FileRecord(100, checksum(checkpoint / "state" / "model.pt"))}
    manifest = make_manifest(
        step=2, run=RUN_ID, identity={}, config={}, versions={}, saved_at=1e9, files=files
    )
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    folder.config.write_text(CONFIG)
    (place / "good.yaml").write_text(CONFIG)
    folder.run_id.write_text(RUN_ID + "\n")
    folder.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    return folder.path


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    started: list[object] = []
    monkeypatch.setattr("dstrain.api.launch_attempt.supervise", lambda *a, **k: started.append(a))
    yield started
    assert not started


def put_link(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


def outside_of(place: Path) -> tuple[Path, Path]:
    """A file and a folder that nothing may touch."""
    folder = place / "outside"
    folder.mkdir()
    (folder / ".bashrc").write_text(CANARY)
    return folder, folder / ".bashrc"


@pytest.mark.parametrize("name", LINKED)
def test_links_are_refused_at_every_name(
    name: str, place: Path, given: Path, dstrain_here: Callable[..., Said]
) -> None:
    folder, file = outside_of(place)
    if name == "config.yaml":
        file.write_text(CONFIG)
    before = file.read_text()
    is_folder = "." not in name.rpartition("/")[2].lstrip(".") or ".step" in name
    put_link(given / name, folder if is_folder and name not in ("launch", "stop") else file)
    for command in COMMANDS if name in ("logs", "launches.jsonl", "config.yaml") else COMMANDS[:1]:
        said = dstrain_here(*command)
        one_message(
            said, [f"runs/given: {name} is a link to ", "no link is followed", "hint: put what it links to"]
        )
    assert file.read_text() == before and list(folder.iterdir()) == [file]


@pytest.mark.parametrize("name", HARD_LINKED)
def test_hard_links_are_refused_where_files_are_written_in_place(
    name: str, place: Path, given: Path, dstrain_here: Callable[..., Said]
) -> None:
    _, file = outside_of(place)
    os.link(file, given / name)
    one_message(dstrain_here("resume", "given"), [f"{name} is a hard link", "cp -r --no-preserve=links"])
    assert file.read_text() == CANARY


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["plan.json", ".lock", "metrics.jsonl", "logs/rank-0.log", "checkpoints/step-000002/x"]
)
def test_pipes_are_refused_and_never_waited_for(
    name: str, given: Path, dstrain_here: Callable[..., Said]
) -> None:
    (given / name).unlink(missing_ok=True)
    os.mkfifo(given / name)
    one_message(dstrain_here("resume", "given"), [f"{name} is a pipe, and not a file"])


def test_links_of_the_users_own_are_not_ours(
    given: Path, place: Path, dstrain_here: Callable[..., Said]
) -> None:
    """Names that dstrain does not use, W&B's link to its newest run, and the run folder itself on another disk."""
    (given / "best").symlink_to(given / "checkpoints" / "step-000002")
    (given / "wandb" / "offline-run-1").mkdir(parents=True)
    (given / "wandb" / "latest-run").symlink_to("offline-run-1")
    (given / "wandb" / "offline-run-1" / "logs").mkdir()
    (given / "wandb" / "offline-run-1" / "logs" / "debug-core.log").symlink_to(place / "cache" / "core.log")
    given.rename(place / "disk")
    given.symlink_to(place / "disk")
    assert dstrain_here("checkpoints", "given").code == 0
    (given / "wandb" / "debug.log").symlink_to("../../good.yaml")
    one_message(dstrain_here("checkpoints", "given"), ["wandb/debug.log is a link"])


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be another user's: by its owner where that can be changed, else by who we are."""
    if os.geteuid() == 0:
        for each in (path, *path.rglob("*")):
            os.chown(each, 12345, -1)
    else:
        own = os.geteuid()
        monkeypatch.setattr("dstrain.runs.received.os.geteuid", lambda: own + 1)


def write_code(place: Path) -> Path:
    marker = place / "canary"
    (place / "theirs").mkdir()
    (place / "theirs" / "their_code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n\ndef documents():\n    yield 'text ' * 100\n\nclass Hook: pass\n"
    )
    return marker


NAMED = {
    "hooks": "hooks: ['their_code:Hook']",
    "dataset": "data: their_code:documents",
    "optimizer": "optimizer: their_code:Hook",
    "loss": "loss: their_code:documents",
    "lr_schedule": "lr_schedule: their_code:documents",
    "deepspeed": "deepspeed: {torch_autocast: {lower_precision_safe_modules: [their_code.Hook]}}",
}


@pytest.mark.parametrize("key", NAMED)
def test_code_that_another_user_names_is_not_imported(
    key: str, place: Path, given: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = write_code(place)
    lines = CONFIG.replace("data: text.jsonl\n", "") if key == "dataset" else CONFIG
    (given / "config.yaml").write_text(f"{lines}{NAMED[key]}\ncode_dirs: [{place}/theirs]\n")
    give_away(given, monkeypatch)
    said = dstrain_here("resume", "given", "--steps", "6")
    one_message(
        said, ["this run folder belongs to user 12345" if os.geteuid() == 0 else "belongs to", "their_code"]
    )
    assert "add --trust" in said.err and not marker.exists()


def test_what_was_typed_is_ones_own(
    place: Path, given: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_code(place)
    monkeypatch.setenv("PYTHONPATH", f"{place}/theirs:{os.environ['PYTHONPATH']}")
    give_away(given, monkeypatch)
    said = dstrain_here(
        "resume", "given", "--hook", "their_code:Hook", "--set", f"code_dirs=[{place}/theirs]"
    )
    assert "--trust" not in said.err + said.out


def test_whose_it_is_and_where_it_writes_is_said(
    place: Path, given: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    (given / "config.yaml").write_text(
        CONFIG
        + "trackers: [{name: mlflow, uri: 'file:///tmp/elsewhere'}]\nhooks: ['their_code:Hook']\n"
        + f"code_dirs: [{place}]\nnvme_path: /tmp/swap\n"
        + "deepspeed: {csv_monitor: {enabled: true, output_path: /tmp/theirs}}\n"
    )
    give_away(given, monkeypatch)
    said = dstrain_here("resume", "given")
    for words in (
        "runs/given belongs to ",
        "its config has DeepSpeed use csv_monitor.output_path = /tmp/theirs",
        "its config has mlflow use uri = file:///tmp/elsewhere",
        "nvme_path = /tmp/swap",
    ):
        assert words in said.out, said.out
    (given / "plan.json").write_text(json.dumps({"config": {"data": "their_code:documents"}}))
    said = dstrain_here("export", "given", "out")
    assert said.code == 2 and "dataset their_code:documents" in said.err and "--no-loss" in said.err
    assert "belongs to" in said.err and not (place / "out").exists()


def test_a_folder_that_all_may_write_to_is_anybodys(given: Path, dstrain_here: Callable[..., Said]) -> None:
    (given / "config.yaml").write_text(CONFIG + "hooks: ['their_code:Hook']\n")
    (given / "config.yaml").chmod(0o666)
    one_message(dstrain_here("resume", "given"), ["belongs to everybody", "hook their_code:Hook", "--trust"])
    assert stat.S_IMODE((given / "config.yaml").stat().st_mode) == 0o666


def test_a_folder_of_ones_own_needs_no_trust(
    place: Path, given: Path, dstrain_here: Callable[..., Said]
) -> None:
    write_code(place)
    (given / "config.yaml").write_text(
        CONFIG + f"hooks: ['their_code:Hook']\ncode_dirs: [{place}/theirs]\nruns_dir: /somewhere/else\n"
    )
    said = dstrain_here("resume", "given")
    assert "given was made at another place; it imports hook their_code:Hook from" in said.out, said
    assert "--trust" not in said.err

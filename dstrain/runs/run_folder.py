"""The run folder: the paths of all files of a run, and the status files of its ranks.

``runs/<name>/`` alone is enough to resume, report or repeat the run. This file is the one owner of
the names inside it.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dstrain.files import (
    make_folder,
    make_shared_folder,
    naming,
    open_to_write,
    parse_json,
    read_bounded,
    write_atomically,
)
from dstrain.renamed_keys import METRICS, with_new_names
from dstrain.runs.protocol import MAX_RANK_MESSAGE_BYTES, ProtocolError, RankStatus, parse_status, status_text

NOTE = "dstrain: note: "
"""In front of a line of rank 0 that is for the user's eyes."""
Access = Literal["private", "group", "umask"]
"""Who may read a run folder: its owner; his group too; or as the umask says."""
FILES = (
    *(
        "config.yaml",
        "plan.json",
        "ds_config.json",
        "launch.sh",
        "launch.sbatch",
        "environment",
        "hostfile",
        "stop",
    ),
    *(
        "metrics.jsonl",
        "result.json",
        "record.json",
        "source-*.diff",
        "launches.jsonl",
        "reproduction.json",
        "run-id",
    ),
    *(
        "mlflow.db*",
        "slurm-*.log",
        ".environment",
        ".lock*",
        ".launch*",
        ".plan-node-*.json",
        ".shared",
        ".control-key*",
    ),
)
"""Names of the files in a run folder, as patterns."""
FOLDERS = ("logs", "checkpoints", "model", "weights", "trackers", "profile", "tensorboard", "wandb")
"""Names of the folders in a run folder."""

NODE_RANK = "DSTRAIN_NODE_RANK"
"""The environment variable that tells a rank of the launcher ``none`` the number of its node."""
DIRECTORY = "DSTRAIN_DIRECTORY"
"""The environment variable with the folder that a rank goes to first, where it was not started there."""
QUOTED = "DSTRAIN_QUOTED"
"""The environment variable with the names of those that reach a rank in quotes that its launcher has added."""


def make_open_to(path: Path, access: Access) -> None:
    """Make a folder for runs, or of one; one that is there keeps its permissions. Raises OSError."""
    if path.exists():
        return
    with suppress(FileExistsError):  # another node was faster
        make_new(path, access)


def make_new(path: Path, access: Access) -> None:
    """Make a folder for runs, or of one, and those above it. Raises OSError, FileExistsError where there is one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
    if access == "umask":
        path.mkdir()
    else:
        make_shared_folder(path, 0o750 if access == "group" else 0o700)


class RunFolder:
    """Paths inside a run folder. Holds no state and creates nothing until asked to.

    ``node``: where several nodes watch their own ranks in one folder (the launcher ``none``), the number of this one.
    """

    def __init__(self, path: str | os.PathLike[str], node: int = 0) -> None:
        self.path = Path(path).absolute()
        self.node = node

    def make(self, access: Access) -> None:
        """Make the folder and ``logs/``, as far as they are not there. One that is there keeps its permissions.

        Raises:
            OSError: it can't be made.
        """
        make_open_to(self.path, access)
        make_folder(self.logs, below=self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The run config as it was resolved: every value, no defaults left out."""
        return self.path / "config.yaml"

    @property
    def plan(self) -> Path:
        """Each node that watches its own ranks has made it by itself; the ranks find out whether all are the same."""
        return self.path / (f".plan-node-{self.node}.json" if self.node else "plan.json")

    @property
    def deepspeed_config(self) -> Path:
        """The DeepSpeed JSON that the engine is given."""
        return self.path / "ds_config.json"

    @property
    def launch_script(self) -> Path:
        """The exact launch command; can be run manually."""
        return self.path / "launch.sh"

    @property
    def batch_script(self) -> Path:
        """The Slurm job that `dstrain submit` made of the run."""
        return self.path / "launch.sbatch"

    @property
    def environment(self) -> Path:
        """``NAME=value`` lines that travel to every host (DeepSpeed's ``DS_ENV_FILE``)."""
        return self.path / "environment"

    @property
    def supervised_environment(self) -> Path:
        """The same with the address of the supervisor, for as long as that lives."""
        return self.path / ".environment"

    @property
    def control_key(self) -> Path:
        """The key of the launch that goes on, where a rank's environment can't bring it privately."""
        return self.path / ".control-key"

    @property
    def lock(self) -> Path:
        """Held by the process that watches the run, so that no second one starts in the same folder."""
        return self.path / (f".lock-node-{self.node}" if self.node else ".lock")

    @property
    def lock_claim(self) -> Path:
        """Stands for the lock where the file system has none."""
        return self.lock.with_name(f"{self.lock.name}-claim")

    @property
    def launch(self) -> Path:
        """Names the launch that goes on: a rank that reads it sees the supervisor's own folder, and not one of its
        host's at the same place."""
        return self.path / (f".launch-node-{self.node}" if self.node else ".launch")

    @property
    def shared(self) -> Path:
        """Written by rank 0 for the others to see, while they find out whether they share this folder."""
        return self.path / ".shared"

    @property
    def stop_request(self) -> Path:
        """While it exists, the ranks leave after their current step, and save."""
        return self.path / "stop"

    @property
    def hostfile(self) -> Path:
        return self.path / "hostfile"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """What rank 0 says at the end: steps, the last validation loss, the prompt and its continuation."""
        return self.path / "result.json"

    @property
    def record(self) -> Path:
        """What the newest launch is made of: versions, data, model, choices."""
        return self.path / "record.json"

    def source_diff(self, changes: str) -> Path:
        """What was not committed in the user's folder when a launch began whose record names these ``changes``."""
        return self.path / f"source-{changes}.diff"

    @property
    def launches(self) -> Path:
        """A line for each launch that came as far as to train: its record, its first step and its devices."""
        return self.path / "launches.jsonl"

    @property
    def reproduction(self) -> Path:
        """Of a run that repeats another: what came of comparing the two."""
        return self.path / "reproduction.json"

    @property
    def model(self) -> Path:
        """A copy of the model's config, and of the tokenizer's files where it has any."""
        return self.path / "model"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def launcher_log(self) -> Path:
        return self.logs / (f"launcher-node-{self.node}.log" if self.node else "launcher.log")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def run_id(self) -> Path:
        """The run's id, drawn when it first starts: its checkpoints bear it."""
        return self.path / "run-id"

    @property
    def weights(self) -> Path:
        """With ``save_weights``: the last weights that were computed with, as fp32, by Hugging Face names."""
        return self.path / "weights"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def rank_stacks(self, rank: int) -> Path:
        """Where the rank's threads stood when the run hung."""
        return self.logs / f"rank-{rank}.stacks.txt"

    def rank_status(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.status.json"

    def write_status(self, status: RankStatus) -> None:
        """Replace the rank's word by one rename, so that a reader never sees half of it.

        On a full disk it is written over the word before, which has its place there already.
        """
        path = self.rank_status(status.rank)
        text = status_text(replace(status, time=time.time()))
        try:
            write_atomically(path, text, below=self.path)
        except OSError:
            with open(open_to_write(path, os.O_WRONLY, below=self.path), "w", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def read_status(self, rank: int) -> RankStatus | None:
        """The rank's last word, or None when it has not said any, or what stands there is none."""
        try:
            return parse_status(read_bounded(self.rank_status(rank), MAX_RANK_MESSAGE_BYTES))
        except (FileNotFoundError, ProtocolError, ValueError):
            return None

    def clear_statuses(self, ranks: Sequence[int]) -> None:
        """Forget the words of an earlier launch, so that an old ``done`` can't be taken for a new one."""
        for rank in ranks:
            self.rank_status(rank).unlink(missing_ok=True)


_LONGEST_LINE = 4_000_000
"""Bytes of one record in a .jsonl file."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, of 0.1 too; what a killed run left half written is no line."""
    return [record for each in json_lines(path) if (record := _metrics_record(each)) is not None]


def metrics_record(line: bytes) -> dict[str, Any] | None:
    """A line of a metrics.jsonl, of 0.1 too; None where it is no whole one.

    A loss that is null was no number; a norm is null where fp16 skipped the step.
    """
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return _metrics_record(record) if isinstance(record, dict) else None


def _metrics_record(record: dict[str, Any]) -> dict[str, Any] | None:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        return None
    renamed = with_new_names(record, METRICS)
    losses = [key for key in renamed if key == "loss" or is_validation_loss(key)]
    return renamed | {key: math.nan for key in losses if renamed[key] is None}


def is_validation_loss(key: str) -> bool:
    """Whether a key of a metrics.jsonl is a validation loss: that of all sets, or of one."""
    return key.partition("/")[0] == "validation_loss"


def losses_by_set(record: Mapping[str, Any]) -> dict[str, float]:
    """The validation losses of a metrics.jsonl's line, by the names of several sets; empty for a single one."""
    return {key.partition("/")[2]: record[key] for key in record if is_validation_loss(key) and "/" in key}


def last_validation_losses(metrics: Path) -> dict[str, float]:
    """The last ones that a metrics.jsonl has, by their keys, nan included; none where there are none."""
    found: dict[str, float] = {}
    for record in read_metrics(metrics):
        if losses := {key: value for key, value in record.items() if is_validation_loss(key)}:
            found = losses
    return found


def json_lines(path: Path, longest: int = _LONGEST_LINE) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line; what is none is passed over. Nothing where there is no file.

    Args:
        longest: bytes of a line; where one has more, it is no file of ours, and the rest is not read.

    Raises:
        OSError: the file can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    with open(descriptor, "rb") as file, naming(path):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        while line := file.readline(longest + 1):
            if len(line) > longest:
                return
            with suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict):
                    yield record


def last_step(metrics: Path) -> int:
    """The last step that was trained, as a metrics.jsonl has it; 0 for none."""
    return max((record["step"] for record in read_metrics(metrics)), default=0)

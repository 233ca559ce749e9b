"""The result of a run: its outputs, or why it failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.errors import RESUMABLE, DstrainError
from dstrain.files import read_json
from dstrain.renamed_keys import METRICS, with_new_names
from dstrain.runs.checkpoint.manifest import newest_complete
from dstrain.runs.run_folder import (
    RunFolder,
    is_validation_loss,
    last_step,
    last_validation_losses,
    losses_by_set,
)
from dstrain.supervise.failure_cause import Cause, Outcome

FAILED = 1


@dataclass(frozen=True)
class RunResult:
    """A run that ended in order.

    Attributes:
        folder: the run folder.
        step: the last step that was trained.
        completed: whether that is the last step of the config. Otherwise the run was asked to stop before (a signal,
            the time limit): `resume` continues from its checkpoint.
        saved: whether the state after ``step`` lies in a checkpoint.
        checkpoint: the newest complete checkpoint.
        validation_loss: the last one, of several validation sets the mean over their label tokens; None without any.
        validation_losses: of each of several validation sets, by name.
        prompt, continuation: the text that the model was given at the end and what it wrote; None where no text was
            wanted, or the run did not complete.
    """

    folder: Path
    step: int
    completed: bool
    saved: bool
    checkpoint: Path | None = None
    validation_loss: float | None = None
    prompt: str | None = None
    continuation: str | None = None
    validation_losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0; 75 for "resume me"; 1 where a stopped run can't be resumed."""
        if self.completed:
            return 0
        return RESUMABLE if self.saved else FAILED


class RunFailedError(DstrainError):
    """The ranks did not come to their end.

    Attributes:
        folder: the run folder.
        rank, host: of the rank that failed first; None where no single one is known.
        reason: why, in one line.
    """

    def __init__(
        self,
        message: str,
        *,
        folder: Path,
        hint: str | None,
        exit_code: int,
        cause: Cause | None = None,
    ) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)
        self.folder = folder
        self.rank = cause.rank if cause else None
        self.host = cause.host if cause else None
        self.reason = cause.reason if cause else message


def result_of(outcome: Outcome, folder: RunFolder, *, saves: bool) -> RunResult:
    """The result of a run that ended in order.

    Args:
        saves: whether the run makes checkpoints.

    Raises:
        RunFailedError: it did not end in order.
    """
    checkpoint = newest_complete(folder.checkpoints)
    if outcome.stopped_after is not None:
        return RunResult(
            folder.path, outcome.stopped_after, completed=False, saved=saves, checkpoint=checkpoint
        )
    if not outcome.ok:
        raise _failure(outcome, folder)
    if folder.node != 0:  # the first node's supervisor knows what came out
        return RunResult(folder.path, last_step(folder.metrics), True, saves, checkpoint)
    result = with_new_names(read_json(folder.result), METRICS)
    losses = {key: value for key, value in result.items() if is_validation_loss(key)}
    if None in losses.values():  # null where there is none, or it is no number
        losses |= last_validation_losses(folder.metrics)
    return RunResult(
        folder=folder.path,
        step=result["steps"],
        completed=True,
        saved=saves,
        checkpoint=checkpoint,
        validation_loss=losses["validation_loss"],
        prompt=result["prompt"] if result["continuation"] else None,
        continuation=result["continuation"] or None,
        validation_losses=losses_by_set(losses),
    )


def _failure(outcome: Outcome, folder: RunFolder) -> RunFailedError:
    """The one cause, behind the last lines of the log that it stands in."""
    cause = outcome.cause
    if cause is None:
        return RunFailedError(
            "the run failed",
            folder=folder.path,
            hint=f"see {folder.logs}",
            exit_code=outcome.exit_code or FAILED,
        )
    who = f"rank {cause.rank} on {cause.host}: " if cause.rank is not None else ""
    tail = "".join(f"  | {line}\n" for line in cause.log_tail)
    resumable = newest_complete(folder.checkpoints)
    hint = (
        f"`dstrain resume {folder.path}` continues from {resumable.name}"
        if resumable and str(resumable) not in cause.reason  # not from the one that was at fault
        else f"see the logs: {folder.logs}"
    )
    # A rank's own message stands in its log behind "error: ", and says all; a traceback's end does not.
    told = "\n".join(cause.log_tail).endswith(f"error: {cause.reason}")
    what = "the run failed: " if told else f"the run failed. Last lines of {_log(cause, folder)}:\n{tail}"
    return RunFailedError(
        f"{what}{who}{cause.reason}",
        folder=folder.path,
        hint=hint,
        # 2 means that nothing was started; a rank's own error ends with that code as well.
        exit_code=FAILED if outcome.exit_code == 2 else outcome.exit_code,
        cause=cause,
    )


def _log(cause: Cause, folder: RunFolder) -> str:
    """The log that the cause stands in, and the host that has it where it can't be read here."""
    if cause.rank is None:
        return str(folder.launcher_log)
    log = folder.rank_log(cause.rank)
    return str(log) if log.exists() else f"{log} (on {cause.host})"

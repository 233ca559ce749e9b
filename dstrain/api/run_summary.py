"""The end of a run in words: what came out, or why it failed."""

from __future__ import annotations

import json

from rich.console import Console
from rich.text import Text

from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.manifest import newest_complete
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.outcome import Cause, Outcome

FAILED = 1


def error_of(outcome: Outcome, folder: RunFolder, *, saves: bool) -> DstrainError:
    """What to raise for a run that was not trained to its end.

    Args:
        saves: whether it makes checkpoints.
    """
    if outcome.stopped_after is None:
        return _failure(outcome, folder)
    if not saves:
        return DstrainError(
            f"stopped after step {outcome.stopped_after}, and nothing is saved (save_every: never)",
            hint=f"`dstrain resume {folder.path}` begins anew",
            exit_code=FAILED,
        )
    return DstrainError(
        f"stopped after step {outcome.stopped_after}, which is saved",
        hint=f"`dstrain resume {folder.path}` goes on from there",
        exit_code=outcome.exit_code,
    )


def _failure(outcome: Outcome, folder: RunFolder) -> DstrainError:
    """The one cause, behind the last lines of the log that it stands in."""
    cause = outcome.cause
    if cause is None:
        return DstrainError(
            "the run failed", hint=f"see {folder.logs}", exit_code=outcome.exit_code or FAILED
        )
    who = f"rank {cause.rank} on {cause.host}: " if cause.rank is not None else ""
    tail = "".join(f"  | {line}\n" for line in cause.log_tail)
    resumable = newest_complete(folder.checkpoints)
    hint = (
        f"`dstrain resume {folder.path}` goes on from {resumable.name}"
        if resumable and str(resumable) not in cause.reason  # not from the one that was at fault
        else f"the logs: {folder.logs}"
    )
    # A rank's own message stands in its log behind "error: ", and says all; a traceback's end does not.
    told = "\n".join(cause.log_tail).endswith(f"error: {cause.reason}")
    what = "the run failed: " if told else f"the run failed. The end of {_log(cause, folder)}:\n{tail}"
    return DstrainError(
        f"{what}{who}{cause.reason}",
        hint=hint,
        # 2 means that nothing was started; a rank's own error ends with that code as well.
        exit_code=FAILED if outcome.exit_code == 2 else outcome.exit_code,
    )


def _log(cause: Cause, folder: RunFolder) -> str:
    """The log that the cause stands in, and the host that has it where it can't be read here."""
    if cause.rank is None:
        return str(folder.launcher_log)
    log = folder.rank_log(cause.rank)
    return str(log) if log.exists() else f"{log} (on {cause.host})"


def tell_the_end(folder: RunFolder, console: Console) -> None:
    """Of a run that was trained to its end."""
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    if result["validation_loss"] is not None:
        console.print(Text.assemble(("validation loss  ", "bold"), f"{result['validation_loss']:.4f}"))
    if result["continuation"]:
        console.print(Text.assemble(("the model continues ", "bold"), repr(result["prompt"])))
        console.print(Text(result["continuation"], style="cyan"))
    rows = [
        ("run folder", folder.path),
        ("metrics", folder.metrics),
        ("checkpoint", newest_complete(folder.checkpoints)),
        ("logs", folder.logs),
    ]
    for label, path in rows:
        if path is not None:
            console.print(Text.assemble((f"{label:<11}", "bold"), str(path)), soft_wrap=True)

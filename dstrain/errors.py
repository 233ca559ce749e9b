"""The exception that is shown to the user, and the exit codes."""

from __future__ import annotations

RESUMABLE = 75
"""The exit code of a run that left in order before its end: BSD's EX_TEMPFAIL, "try again later"."""


class DstrainError(Exception):
    """An error that the user can fix: shown as a message without a traceback, exit code 2.

    Args:
        message: what is wrong, and why, in one or two sentences.
        hint: the nearest thing that works.
        where: the place that it came from: ``file:line``, a flag, or an environment variable.
        exit_code: the process's exit code; 2 before anything was started, 1 for a run that failed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        where: str | None = None,
        exit_code: int = 2,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.exit_code = exit_code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{place}{self.message}{hint}"

"""metrics.jsonl: one JSON object per step, without gaps or duplicates across resumes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError
from dstrain.files import open_to_write, write_atomically
from dstrain.runs.run_folder import read_metrics
from dstrain.strict_json import to_json


class MetricsFile:
    """Appends one line a step; opened by rank 0 alone.

    Args:
        path: of the file. It is appended to; where something is dropped, a new file takes its place.
        after_step: the step that the run goes on from; later lines, of steps that will be repeated,
            and a line that was cut off are dropped.

    Raises:
        DstrainError: the disk takes no more.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        # Step 0, the loss before training, is written anew by a run that starts from the beginning.
        kept = [line for line in read_metrics(path) if after_step and line["step"] <= after_step]
        text = "".join(to_json(line) + "\n" for line in kept)
        # Who follows the file goes on with it where it stays what it is.
        try:
            if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_atomically(path, text)
            self._file = open(open_to_write(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise self._not_written(error) from error

    def write(self, record: dict[str, Any]) -> None:
        """Raises DstrainError where the disk takes no more."""
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted while the run trained")
            self._file.write(to_json(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._not_written(error) from error

    def flush_to_disk(self) -> None:
        """Raises DstrainError where the disk takes no more."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        self._file.close()

    def _not_written(self, error: OSError) -> DstrainError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return DstrainError(
            f"the metrics could not be written: {error.strerror}",
            where=str(self._path),
            hint=("make room on this disk; " if full else "")
            + "`dstrain resume` then continues from the newest checkpoint",
            exit_code=1,
        )

"""A hook as a user may write it, for runs on several hosts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any


class OnEveryRank:
    """Writes down where it was called and for which steps, a file a rank."""

    every_rank = True

    def on_start(self, info: Any) -> None:
        self.file = Path(info.folder) / f"watched-{info.rank}.json"
        self.steps: list[int] = []

    def on_step(self, info: Any) -> None:
        self.steps.append(info.step)

    def on_end(self, info: Any) -> None:
        self.file.write_text(json.dumps({"host": socket.gethostname(), "steps": self.steps}))

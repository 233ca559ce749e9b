"""What a config says of the records of its data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

CHATML = "chatml"
"""The chat template that dstrain brings."""


@dataclass(frozen=True)
class RecordOptions:
    """How the records of JSON-lines files are read: the config's keys of these names.

    Attributes:
        template_text: the chat template itself, where a plan holds it: its file may be gone.
    """

    data_format: str = "auto"
    data_fields: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    train_on: str = "assistant"
    train_stop_token: bool = True
    on_bad_record: str = "error"
    too_long: str = "error"
    template_text: str = ""

    @classmethod
    def of(cls, config: Any) -> RecordOptions:
        """Those of a config, or of anything else with attributes of these names."""
        names = (one.name for one in fields(cls) if one.name != "template_text")
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def state(self) -> list[Any]:
        """What tells it from other choices, the content of the template's file included, as JSON values."""
        content = ""
        # Whether it can be read is said where it is.
        with suppress(OSError, RuntimeError, ValueError):
            if self.chat_template:
                content = hashlib.sha256(Path(self.chat_template).expanduser().read_bytes()).hexdigest()
        names = sorted(self.data_fields.items())
        return [
            self.data_format,
            names,
            self.chat_template,
            content,
            self.train_on,
            self.on_bad_record,
            self.too_long,
            *([] if self.train_stop_token else ["without stop tokens"]),
        ]

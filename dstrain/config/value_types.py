"""The types of config values that stand in several keys, and what is refused for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from dstrain.plugins import CODE_NAME, is_code

LARGEST = 10**12
"""Of what is counted: more is a slip, and would be counted through where the plan looks for divisors."""
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

# fmt: off
DataFormat = Literal[
    "auto", "text", "messages", "sharegpt", "alpaca", "prompt-completion", "tokens", "megatron", "nanogpt", "llm.c",
    "text-0.1",
]
# fmt: on
Precision = Literal["fp32", "bf16", "fp16"]
# It goes into command lines: nothing that an option parser or a shell could read as anything but a name.
HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:][A-Za-z0-9._:-]*$", max_length=253)]


@dataclass(frozen=True)
class TypeInWords:
    """What a key takes, in words, where its Python type does not say it."""

    words: str


def json_schema_of_names(table: Iterable[str]) -> WithJsonSchema:
    """For editors: a name of the table, or the user's own code."""
    own = f"^{CODE_NAME.pattern}$"
    return WithJsonSchema({"type": "string", "anyOf": [{"enum": [*table]}, {"pattern": own}]})


def check_name(value: Any, table: Iterable[str], example: str) -> Any:
    """Raises ValueError for a text that is neither a name of the table nor ``module:name``."""
    if isinstance(value, str) and value not in table and not is_code(value):
        *others, last = map(repr, table)
        known = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"must be {known}, or one of your own like {example}")
    return value


def as_json(value: Any) -> Any:
    """The value as JSON gives it back: DeepSpeed and plans are JSON, which knows no infinity and no other types.

    Raises:
        ValueError: it can't be written as JSON.
    """
    try:
        _refuse_other_keys(value)
        # As the run folder will give it back: a tuple is a list there.
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be valid JSON: {error}") from None


def _refuse_other_keys(value: Any) -> None:
    """JSON would make texts of numbers. Raises ValueError."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key must be a string, not {key!r}")
            _refuse_other_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)

"""The config sections ``hooks``, ``trackers`` and ``profile``: their shape, not what they name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from dstrain.plugins import CODE_NAME, is_code

_TEXT = "a text"
_MODES = ("online", "offline")
# Tracker -> option -> what it may be: a text, a list of texts, or one of these words.
TRACKERS: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {
    "tensorboard": {},
    "wandb": {
        "project": _TEXT,
        "entity": _TEXT,
        "group": _TEXT,
        "tags": "a list of texts",
        "mode": _MODES,
    },
    "mlflow": {"uri": _TEXT, "experiment": _TEXT},
}
"""The built-in trackers, and the options of each."""

_HOOK_KEYS = ("name", "options", "optional")
# A config is copied into run folders and reports, which are shown to others.
_SECRET = re.compile(r"(^|[_-])(api[_-]?key|key|token|password|passwd|secret)$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"//[^/\s]*@")


class Profile(BaseModel):
    """``profile: {steps: [10, 13], ranks: [0]}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    steps: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] = Field(
        description="first and last step to record"
    )
    ranks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        [0], description="ranks to record, each to its own file"
    )

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        if value[0] > value[1]:
            raise ValueError(f"the first step ({value[0]}) must not be after the last ({value[1]})")
        return value


def name_of(choice: str | Mapping[str, Any]) -> str:
    """The name in an entry of ``hooks`` or ``trackers``, which may stand alone or with options."""
    return choice if isinstance(choice, str) else str(choice["name"])


def options_of_tracker(choice: str | Mapping[str, Any]) -> dict[str, Any]:
    """The options beside a tracker's name."""
    return {} if isinstance(choice, str) else {key: value for key, value in choice.items() if key != "name"}


def check_hooks(value: Any) -> Any:
    """Raises ValueError where an entry of ``hooks`` has another shape than it may have."""
    for choice in _entries(value, "my_module:MyHook"):
        if not is_code(name_of(choice)):
            raise ValueError(f"{name_of(choice)!r} must have the form my_module:MyHook")
        if isinstance(choice, str):
            continue
        unknown = [str(key) for key in choice if key not in _HOOK_KEYS]
        if unknown:
            raise ValueError(
                f"unknown key {unknown[0]!r}{_near(unknown[0], _HOOK_KEYS) or _known('keys', _HOOK_KEYS)}"
            )
        if not isinstance(choice.get("options", {}), dict):
            raise ValueError(f"the options of {choice['name']} must be a mapping of KEY: VALUE")
        if not isinstance(choice.get("optional", False), bool):
            raise ValueError(f"optional of {choice['name']} must be true or false")
    return value


def check_trackers(value: Any) -> Any:
    """Raises ValueError for an unknown tracker or option, one that is named twice, and credentials."""
    names = [name_of(choice) for choice in _entries(value, "tensorboard")]
    for name, choice in zip(names, value, strict=True):
        if name not in TRACKERS:
            raise ValueError(
                f"unknown tracker {name!r}{_near(name, TRACKERS) or _known('trackers', TRACKERS)}"
            )
        if names.count(name) > 1:
            raise ValueError(f"{name} is listed twice")
        options = options_of_tracker(choice)
        _refuse_secrets(name, options)
        for key, given in options.items():
            _check_option(name, str(key), given)
    return value


def _entries(value: Any, example: str) -> list[str | dict[str, Any]]:
    """The entries of a list of names, each alone or with more. Raises ValueError where it is no such list."""
    if not isinstance(value, list):
        raise ValueError(f"must be a list: [{example}]")
    for choice in value:
        named = choice.get("name") if isinstance(choice, dict) else choice
        if not isinstance(named, str):
            raise ValueError(f"each entry must be a name such as {example}, or {{name: {example}, ...}}")
        try:
            json.dumps(choice, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{named} must be valid JSON: {error}") from None
    return value


def _check_option(tracker: str, key: str, given: Any) -> None:
    known = TRACKERS[tracker]
    if key not in known:
        near = _near(key, known) or (_known("options", known) if known else " (it has none)")
        raise ValueError(f"unknown option {key!r} of {tracker}{near}")
    allowed = known[key]
    texts = given if isinstance(given, list) else [given]
    right = isinstance(given, list) == (allowed == "a list of texts") and all(
        isinstance(t, str) for t in texts
    )
    if isinstance(allowed, tuple):
        right = given in allowed
    if not right:
        words = " or ".join(allowed) if isinstance(allowed, tuple) else allowed
        raise ValueError(f"{key} of {tracker} must be {words}")


def _refuse_secrets(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for what looks like credentials."""
    for key, value in options.items():
        if _SECRET.search(str(key)) or (isinstance(value, str) and _USER_IN_URL.search(value)):
            raise ValueError(
                f"{key} of {name} looks like a credential; a config must not contain any: set it in the environment"
                " of rank 0's host"
            )


def _near(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower(), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _known(what: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    return f" (known {what}: {', '.join(known)})"


def json_schema_of_hooks() -> dict[str, Any]:
    """One entry of ``hooks``, for editors."""
    name = {"type": "string", "pattern": f"^{CODE_NAME.pattern}$"}
    options = {"type": "object"}
    long = _object({"name": name, "options": options, "optional": {"type": "boolean"}})
    return {"type": "array", "items": {"anyOf": [name, long]}}


def json_schema_of_trackers() -> dict[str, Any]:
    """One entry of ``trackers``, for editors."""
    long = [
        _object({"name": {"const": name}} | {key: _option(allowed) for key, allowed in options.items()})
        for name, options in TRACKERS.items()
    ]
    return {"type": "array", "items": {"anyOf": [{"enum": list(TRACKERS)}, *long]}}


def _option(allowed: str | tuple[str, ...]) -> dict[str, Any]:
    if isinstance(allowed, tuple):
        return {"enum": list(allowed)}
    text = {"type": "string"}
    return text if allowed == _TEXT else {"type": "array", "items": text}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False}

"""Every JSON that dstrain writes is JSON as RFC 8259 has it."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dstrain
from dstrain.files import write_json
from dstrain.strict_json import to_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(VALUES)
def test_whatever_holds_no_number_holds_null(value: Any) -> None:
    assert json.loads(to_json(value), parse_constant=refuse) == finite(value)


def test_what_json_does_not_know_is_still_an_error() -> None:
    for value in (object(), [math.nan, object()]):
        with pytest.raises(TypeError):
            to_json(value)


def test_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": math.nan, "steps": (1, math.inf)})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == {
        "loss": None,
        "steps": [1, None],
    }


# Where the module's own writer is right: values for the eyes, values that are refused, a copy of another's file, and
# what ranks send each other, whose numbers arrive as they are, and what a chat template may have written.
ALLOWED = {
    "strict_json.py", "planning/deepspeed/user_keys.py", "planning/deepspeed/composition.py", "config/loader.py",
    "config/deepspeed_keys.py", "config/value_types.py", "config/hook_choices.py", "config/template.py",
    "config/foreign_keys.py", "api/verifying.py", "json_collectives.py", "data/chat/template.py",
    "data/chat/formats.py",
}  # fmt: skip


def test_nothing_else_writes_json() -> None:
    package = Path(dstrain.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps"):
                found.add(path.relative_to(package).as_posix())
    assert found <= ALLOWED, "dstrain.strict_json.to_json writes it"

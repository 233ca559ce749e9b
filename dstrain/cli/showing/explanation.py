"""``dstrain plan --explain KEY``: explains a key of dstrain's or DeepSpeed's, as text or JSON."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import click

from dstrain.planning.explain import Explanation, explain
from dstrain.planning.plan import Plan
from dstrain.strict_json import to_json

_WIDTH = 110


def show_explanation(plan: Plan, name: str, *, as_json: bool) -> None:
    """Print what ``name`` does, its value in this plan, why, and its origin. Raises DstrainError for no such key."""
    found = explain(plan, name)
    if as_json:
        click.echo(to_json([each.to_record() for each in found], indent=2))
        return
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)
    click.echo("\n\n".join(format_explanation(each, width) for each in found))


def format_explanation(found: Explanation, in_all: int = _WIDTH) -> str:
    """An explanation as lines of a heading and a text, of ``in_all`` letters at most."""
    of_deepspeed = found.key.startswith("deepspeed.")
    is_block = found.takes.startswith("keys of its own")
    default = ("in DeepSpeed" if of_deepspeed else "by default", _value(found.default))
    absent = of_deepspeed and not found.set
    here = _value(found.value)
    rows = [
        ("does", found.does),
        ("takes", found.takes),
        *([("changes", found.effects)] if found.effects else []),
        *([] if is_block else [default]),
        ("here", ("not set" if is_block else f"not set: {here}") if absent else here),
        ("why", found.why),
        ("from", found.origin),
    ]
    if found.decided_by:
        rows.append(("change", f"set {found.decided_by} instead"))
    rows += [
        ("decides" if number == 0 else "", f"deepspeed.{key} = {_value(value)}")
        for number, (key, value) in enumerate(found.decides)
    ]
    width = max(len(heading) for heading, _ in rows) + 2
    lines = [found.key]
    for heading, text in rows:
        first, *rest = textwrap.wrap(text, max(1, in_all - width - 2), break_on_hyphens=False) or [""]
        lines.append(f"  {heading:<{width}}{first}".rstrip())
        lines += [" " * (width + 2) + line for line in rest]
    return "\n".join(lines)


def _value(value: Any) -> str:
    return to_json(value)

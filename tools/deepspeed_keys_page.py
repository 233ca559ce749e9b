"""docs/deepspeed-keys.md: what each of DeepSpeed's keys does to a run, and which of them a user can set.

``python -m tools.deepspeed_keys_page > docs/deepspeed-keys.md`` writes it; a test keeps it current.
"""

from __future__ import annotations

from collections.abc import Iterator

from dstrain.config.deepspeed_keys import GONE, all_keys, deepspeed_version, effects
from dstrain.config.values import KeyPath
from dstrain.planning.deepspeed.keys import KEYS, owner_of
from tools.deepspeed_keys.effects import KINDS

_HEAD = """# DeepSpeed keys

Written by `make docs` from the table that the plan obeys; do not edit it.

Keys of DeepSpeed {version} that can stand in the file of `--ds-config` or below `deepspeed:`, and what each does to a
run beside its speed, where it has another value than the plan gives it. `dstrain plan --explain deepspeed.KEY` says
what a key is for, what it takes, and its value in a plan.

| Kind | Meaning |
| --- | --- |
{kinds}

The plan lists keys of the kind *arithmetic* that have another value than its own under "not covered by the equality
proof": the tests that prove all layouts equal know nothing of them. `dstrain verify` says so too, and compares the
layouts. *decided by*: a key of dstrain's own decides it, and DeepSpeed's may repeat it, not change it. *refused*: some
values, in some runs, with the reason and what to do instead.
"""


def page() -> str:
    """The whole page."""
    kinds = "\n".join(f"| {kind} | {meaning} |" for kind, meaning in KINDS.items())
    lines = [_HEAD.format(version=deepspeed_version(), kinds=kinds)]
    block: str | None = None
    for path in sorted(_keys(), key=lambda path: (len(path) > 1, path)):
        first = path[0] if len(path) > 1 else ""
        if first != block:
            heading = f"## `{first}`" if first else "## At top level"
            lines += ["", heading, "", "| Key | Changes | |", "| --- | --- | --- |"] if block is not None else [
                heading, "", "| Key | Changes | |", "| --- | --- | --- |"
            ]  # fmt: skip
            block = first
        name = ".".join(path[1:] if first else path)
        lines.append(
            f"| `{name}` | {', '.join(kind for kind in KINDS if kind in effects(path))} | {_note(path)} |"
        )
    return "\n".join(lines) + "\n"


def _keys() -> Iterator[KeyPath]:
    for path, node in all_keys():
        if "keys" not in node and not GONE & set(node):
            yield path


def _note(path: KeyPath) -> str:
    owner = owner_of(path)
    if owner is not None:
        return f"decided by `{owner}`"
    within = (KEYS.get(path[:depth]) for depth in range(1, len(path) + 1))
    return "refused" if any(key is not None and key.unfit is not None for key in within) else ""


if __name__ == "__main__":
    print(page(), end="")

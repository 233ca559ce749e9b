"""docs/modules.md: every module of the package with the first line of its docstring, package by package.

``python -m tools.modules_page > docs/modules.md`` writes it; tests/unit/test_docs.py keeps it current. Nothing is
imported: the docstrings are read from the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import dstrain

_ROOT = Path(dstrain.__file__).parent
# In the order in which a run passes through them; a package that is not named here comes after them.
_ORDER = (
    "api", "cli", "config", "planning", "estimate", "runs", "launch", "supervise", "diagnostics", "data", "model",
    "engine", "train", "hooks", "report", "exporting",
)  # fmt: skip

_HEAD = """\
# Modules

<!-- Written by `make docs` from the docstrings. Do not edit. -->

Each package of `dstrain/` with its modules, and the first line of each docstring. [Architecture](architecture.md) says
how they work together, and which may import which.
"""


def page(root: Path = _ROOT) -> str:
    """The page as Markdown."""
    rooms = sorted(
        (folder for folder in root.iterdir() if (folder / "__init__.py").is_file()),
        key=lambda folder: (_ORDER.index(folder.name) if folder.name in _ORDER else len(_ORDER), folder.name),
    )
    lines = [_HEAD, "\n## dstrain\n", *_table(root)]
    for room in rooms:
        lines.append(f"\n## dstrain.{room.name}\n\n{first_line(room / '__init__.py')}\n")
        lines += _table(room)
        for inner in sorted(folder for folder in room.rglob("*") if (folder / "__init__.py").is_file()):
            name = ".".join(inner.relative_to(root).parts)
            lines.append(f"\n### dstrain.{name}\n\n{first_line(inner / '__init__.py')}\n")
            lines += _table(inner)
    return "".join(lines)


def _table(folder: Path) -> Iterator[str]:
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    if modules:
        yield "\n| Module | Purpose |\n| --- | --- |\n"
    for path in modules:
        yield f"| `{path.name}` | {first_line(path).replace('|', chr(92) + '|')} |\n"


def first_line(path: Path) -> str:
    """The first sentence or line of a module's docstring; empty where it has none.

    A first paragraph over several lines is given whole: its first line alone would end in mid-sentence.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")

"""User code named in a config as ``module:name``: checks that it exists, and loads it.

`check_plugin` runs none of it, so that the command line stays light and does not carry a fault of it; `load_plugin`
is for the ranks.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import re
import socket
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError

CODE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""``package.module:Name``: a Python name in a module that can be imported."""


@dataclass(frozen=True)
class Plugin:
    """User code that a config names.

    Attributes:
        key: of the config.
        what: what it is, for messages: ``hook``.
        name: ``module:name``.
    """

    key: str
    what: str
    name: str

    def __str__(self) -> str:
        return f"{self.what} {self.name}"


def is_code(name: str) -> bool:
    """Whether a name has the form ``module:name``. It is code then, also where a file is called so."""
    return CODE_NAME.fullmatch(name) is not None


class PluginError(DstrainError):
    """A module or a name in it is not there, or can't be loaded. The message names what was asked for."""


def check_plugin(name: str, folders: Sequence[str], *, what: str, where: str) -> None:
    """Refuse a module or a name in it that does not exist. Nothing of it is run.

    Args:
        name: ``module:name``.
        folders: where modules are looked for besides Python's own places.
        what: what it is, for the message: ``hook``.
        where: the place that named it.

    Raises:
        PluginError: there is no such module, it can't be read as Python, or it has no such name.
    """
    module, _, attribute = name.partition(":")
    spec = _find(module, folders)
    if spec is None:
        places = ", ".join(folders) or "Python's own folders"
        raise PluginError(
            f"{what} {name}: there is no module {module!r} in {places}",
            where=where,
            hint=(f"{module.removesuffix('.py')}:{attribute}, without .py" if module.endswith(".py") else "")
            or _near(module, set(_modules_in(folders)) - {module.partition(".")[0]})
            or "set code_dirs: [FOLDER] to the folder that contains it",
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or a folder without __init__.py: it shows when it is loaded
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), filename=spec.origin)
    except (OSError, SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise PluginError(
            f"{what} {name}: {spec.origin}{line} can't be read: {reason}", where=where, hint="fix that file"
        ) from None
    names = set(_bound(tree.body))
    if attribute not in names and not names & {"*", "__getattr__"}:
        known = sorted(each for each in names if not each.startswith("_"))
        raise PluginError(
            f"{what} {name}: {spec.origin} has no {attribute!r}",
            where=where,
            hint=_hidden(module, spec.origin, folders)
            or _near(attribute, known)
            or (f"it has: {', '.join(known[:12])}" if known else "it has no names"),
        )


def load_plugin(name: str, folders: Sequence[str], *, what: str) -> Any:
    """What ``module:name`` names.

    Only for a module that is not in Python's own places the ``folders`` become places of modules, the last ones: they
    hide nothing, and what an installed module looks for and does not find is not taken from them.

    Raises:
        PluginError: it can't be imported, or has no such name; the traceback goes to standard error.
    """
    module_name, _, attribute = name.partition(":")
    if _find(module_name.partition(".")[0], ()) is None:
        sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        if missing:
            raise PluginError(
                f"{what} {name}: {socket.gethostname()} has no module {module_name!r} in {', '.join(folders)}",
                hint="every host needs it at the same place",
                exit_code=1,
            ) from None
        traceback.print_exc()
        raise PluginError(
            f"{what} {name} can't be imported: {type(error).__name__}: {error}", exit_code=1
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PluginError(f"{what} {name}: {module.__file__} has no {attribute!r}", exit_code=1) from None


def _find(module: str, folders: Sequence[str]) -> ModuleSpec | None:
    """Where a module lies, without importing the packages that it lies in."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        spec = None
    spec = spec or PathFinder.find_spec(first, list(folders))
    path = first
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))
    return spec


def _bound(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that a module's statements bind; ``*`` where they import all of another."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
        else:
            yield from (
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            )
            for field in ("body", "orelse", "finalbody"):
                yield from _bound(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _bound(handler.body)


def _modules_in(folders: Sequence[str]) -> list[str]:
    found = []
    for folder in folders:
        try:
            found += [path.stem for path in Path(folder).iterdir() if path.suffix == ".py" or path.is_dir()]
        except OSError:
            continue
    return found


def _hidden(module: str, found: str, folders: Sequence[str]) -> str:
    """The user's own module of this name, which Python does not come to."""
    path = Path(*module.split("."))
    for file in (Path(folder, path).with_suffix(".py") for folder in folders):
        if file.is_file() and not file.samefile(found):
            return f"rename {file}: it is hidden by the module of the same name"
    return ""


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""

"""A run folder of somebody else: whose it is, where it lets a run write, and what code it names, is said."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dstrain.api.events import Events
from dstrain.config.hook_choices import name_of, options_of_tracker
from dstrain.config.loader import ResolvedConfig
from dstrain.config.text_file import shown
from dstrain.config.values import leaves
from dstrain.errors import DstrainError
from dstrain.plugins import is_code
from dstrain.runs.checkpoint.manifest import named_checkpoints
from dstrain.runs.received import first_owner
from dstrain.runs.run_folder import RunFolder

_TYPED = ("set", "flag")
_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
# DeepSpeed imports the modules of these classes.
_IMPORTED = ("torch_autocast", "lower_precision_safe_modules")
_SHOWN = 8


def check_received(
    folder: RunFolder, resolved: ResolvedConfig, named_in: Sequence[Path], *, trust: bool, events: Events
) -> None:
    """Say whose a run folder is, and refuse to import what it names if it is another user's.

    Args:
        resolved: its config, with what was typed now.
        named_in: its files that the config was read from.
        trust: the user has said that its code may be imported.

    Raises:
        DstrainError: it names code, and nobody has said so.
    """
    found = first_owner(folder.path, *named_in)
    code = list(code_named_by(resolved))
    if found is None:
        _say_if_moved(folder, resolved, code, events)
        note_owner(events, folder.plan, folder.checkpoints, *named_checkpoints(folder.checkpoints))
        return
    path, owner = found
    note_owner(events, path)
    for line in _reaches(resolved):
        events.note(line, "owner")
    if code and not trust:
        raise refused(code, path, owner)
    if code:
        events.note(f"imports {', '.join(code)} from {_places(resolved)}", "trust")


def check_image(folder: RunFolder, image: str, *, trust: bool) -> None:
    """Refuse to start the container image that a run folder of another user names. Raises DstrainError."""
    found = first_owner(folder.path, folder.launches)
    if found is not None and not trust:
        path, owner = found
        raise DstrainError(
            f"this run folder belongs to {owner}, and would have the image {shown(image)} started",
            where=shown(path),
            hint="--image NAME starts one that you know; or add --trust",
        )


def refused(code: Sequence[str], path: Path, owner: str) -> DstrainError:
    """For code that a folder names which is somebody else's."""
    more = f", and {len(code) - _SHOWN} more" if len(code) > _SHOWN else ""
    return DstrainError(
        f"this run folder belongs to {owner}, and would have code imported: {', '.join(code[:_SHOWN])}{more}",
        where=shown(path),
        hint="look at that code, then add --trust",
    )


def code_named_by(resolved: ResolvedConfig) -> Iterator[str]:
    """What a config has imported, but for what was typed with the command, folders included."""
    config = resolved.config
    own_folders = config.code_dirs is None or resolved.origin("code_dirs").kind in _TYPED
    for plugin in config.plugins:
        if not (own_folders and resolved.origin(plugin.key).kind in _TYPED):
            yield shown(str(plugin))
    for path, value in _deepspeed(resolved):
        if path == _IMPORTED and resolved.origin("deepspeed", *path).kind not in _TYPED:
            names = value if isinstance(value, list) else [value]
            yield from (shown(str(name)) for name in names if not str(name).startswith("torch.nn."))


def _deepspeed(resolved: ResolvedConfig) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The user's DeepSpeed keys: of the file, and of the config."""
    document = resolved.ds_config
    if document is not None and not isinstance(document, DstrainError):
        yield from leaves(document.values)
    yield from leaves(resolved.config.deepspeed)


def _reaches(resolved: ResolvedConfig) -> Iterator[str]:
    """A line for each place outside of the run folder that its config has something written or sent to."""
    config = resolved.config
    for path, value in _deepspeed(resolved):
        is_path = isinstance(value, str) and ("/" in value or value.startswith("~"))
        switches_on = len(path) == 2 and path[0] in _MONITORS and path[1] == "enabled" and value is True
        if is_path or switches_on:
            yield f"its config has DeepSpeed use {'.'.join(path)} = {shown(str(value))}"
    for choice in config.trackers:
        options = options_of_tracker(choice)
        if options:
            told = ", ".join(f"{key} = {value}" for key, value in options.items())
            yield f"its config has {name_of(choice)} use {shown(told)}"
    keys = ("nvme_path", "hostfile", "master_addr", "ds_config", "model", "tokenizer")
    named = [*((key, getattr(config, key)) for key in keys)]
    named += [("data", source.path) for source in config.read_sources]
    outside = [
        f"{key} = {shown(str(value))}"
        for key, value in named
        if value is not None
        and ("/" in str(value) or key in ("hostfile", "master_addr"))
        and resolved.origin(key).kind not in _TYPED
    ]
    if outside:
        yield f"its config names {', '.join(outside)}"


def _places(resolved: ResolvedConfig) -> str:
    return ", ".join(shown(folder) for folder in resolved.config.code_dirs or ()) or "Python's own folders"


def _say_if_moved(folder: RunFolder, resolved: ResolvedConfig, code: Sequence[str], events: Events) -> None:
    """A folder that was unpacked belongs to whoever unpacked it: what it names is said where it was made elsewhere."""
    config = resolved.config
    name_is_another = config.name is not None and config.name != folder.name
    runs = Path(config.runs_dir)
    moved = name_is_another or (
        runs.is_absolute() and os.path.realpath(runs) != os.path.realpath(folder.path.parent)
    )
    if code and moved:
        events.note(
            f"{folder.name} was made at another place; it imports {', '.join(code)} from {_places(resolved)}",
            "code",
        )


def note_owner(events: Events, *paths: Path) -> None:
    """Say whose the first of these is that is another user's."""
    found = first_owner(*paths)
    if found is not None:
        events.note(f"{shown(found[0])} belongs to {found[1]}", "owner")


def note_other_owners(resolved: ResolvedConfig, events: Events) -> None:
    """Say whose the model and data are that a run reads, where they are another user's."""
    config = resolved.config
    read = [("model", config.model), ("tokenizer", config.tokenizer)]
    for key, value in (*read, *(("data", source.path) for source in config.read_sources)):
        if is_code(value):
            continue
        found = first_owner(Path(value).expanduser())
        if found is not None:
            events.note(f"{key} {shown(found[0])} belongs to {found[1]}; it is read as data", "owner")

"""Combines config layers into one run config: defaults < recipe < file < --set < flags."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dstrain.config.deepspeed_keys import find, homes_of, what_is_wrong
from dstrain.config.deepspeed_scheduler import keys_of_scheduler
from dstrain.config.files import recipe_path, recipes
from dstrain.config.foreign_keys import FOREIGN_KEYS, translate, translate_value
from dstrain.config.json_reader import read_json
from dstrain.config.origins import DEFAULT, Origin, flag_origin, path_of
from dstrain.config.schema import RunConfig, field_names
from dstrain.config.values import leaves
from dstrain.config.yaml_reader import Document, dump_yaml, parse_scalar, read_yaml
from dstrain.errors import DstrainError
from dstrain.renamed_keys import CONFIG_KEYS, MEANT_BEFORE

DEFAULT_RECIPE = "quickstart"
CONVERSATIONS_RECIPE = "sft"
PRETRAINED_RECIPE = "fine-tune"
"""What lies below a config that starts from pretrained weights and names no recipe: in their place, the quickstart's
learning rate, or that of the defaults, would destroy them."""
_NEAR = 0.77  # of 1, how alike a misspelt key must be
_NEAR_FOREIGN = (
    0.87  # to another trainer's: there are many of them, and some that are spelled alike mean other things
)
_MOVED = frozenset(
    {"zero_optimization", "fp16", "bf16", "activation_checkpointing", "checkpoint", "optimizer"}
)
"""Blocks of DeepSpeed's whose keys people write without them. Others have names that mean something else elsewhere:
aio.block_size, comms_logger.debug, tensor_parallel.tp."""
_MOST_SHOWN = 300  # characters of a value, which may be a path
# Keys of one overlay, each nested mapping opened: ("deepspeed", "zero_optimization", "stage").
Path_ = tuple[str, ...]


@dataclass(frozen=True)
class ResolvedConfig:
    """A run config and the origin of each of its keys (of each leaf, inside ``deepspeed``).

    ``blocks``: where the mappings inside ``deepspeed`` begin in a file. ``notes``: what the user should know, such as a
    deprecated key. ``ds_config``: what the DeepSpeed JSON file of that key holds, with the line of each key, or why it
    can't be read, which matters to a plan alone. ``recipe_by_default``: nobody has named the recipe.
    """

    config: RunConfig
    origins: Mapping[Path_, Origin]
    blocks: Mapping[Path_, Origin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ds_config: Document | DstrainError | None = None
    recipe_by_default: bool = False

    def origin(self, *path: str) -> Origin:
        """The origin of a key; of the first that stands in it, or of its nearest parent, where it has none itself."""
        within = (origin for known, origin in self.origins.items() if known[: len(path)] == path)
        nearest = next(within, DEFAULT)
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return nearest

    def to_yaml(self) -> str:
        """The whole config as YAML, each line with its origin in a comment."""
        lines = []
        for key, value in self.config.model_dump().items():
            first, *rest = dump_yaml({key: value}).rstrip("\n").split("\n")
            place = str(self.origin(key))
            lines.append(f"{first}  # {place if place.isprintable() else ascii(place)}")
            lines.extend(rest)
        return "\n".join(lines) + "\n"


class ConfigError(DstrainError):
    """All that is wrong with a config at once. Shown as the first; `dstrain config check` shows them all.

    Attributes:
        errors: each with its own place and hint.
        rest: the config without what is wrong: the defaults stand for it.
    """

    def __init__(self, errors: Sequence[DstrainError], rest: ResolvedConfig) -> None:
        first = errors[0]
        super().__init__(first.message, hint=first.hint, where=first.where)
        self.errors = tuple(errors)
        self.rest = rest


def load_config(
    *,
    recipe: str | None = None,
    config_file: str | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> ResolvedConfig:
    """Lay the layers on top of each other and check the whole.

    Args:
        recipe: name of a recipe; without one and without ``config_file`` it is the quickstart, and
            for pretrained weights in any case ``fine-tune``.
        config_file: YAML file of the user's own; may name its recipe under the key ``recipe``.
        settings: ``KEY=VALUE`` strings; a dotted KEY reaches into ``deepspeed``.
        flags: values of flags that were given, by config key.

    Raises:
        DstrainError: an unknown key, a wrong type or an impossible value, with its place and the
            nearest valid key.
    """
    values: dict[str, Any] = {}
    origins: dict[Path_, Origin] = {}
    blocks: dict[Path_, Origin] = {}
    notes: list[str] = []

    def lay(document: Document, kind: str, name: str) -> None:
        notes.extend(_rename_deprecated(document, name))
        blocks.update({path: Origin(kind, f"{name}:{line}") for path, line in document.lines.items()})
        for path, value in leaves(document.values):
            line = document.lines.get(path)
            place = f"{name}:{line}" if line else name
            _put(values, origins, path, value, Origin(kind, place))

    where_named = "--recipe"
    own = read_yaml(Path(config_file), where="--config") if config_file is not None else None
    if own is not None:
        named = own.values.pop("recipe", None)
        if named is not None and not isinstance(named, str):
            raise DstrainError(
                "recipe must be a name",
                where=f"{config_file}:{own.lines[('recipe',)]}",
                hint=f"known: {', '.join(recipes())}",
            )
        if recipe is None and named is not None:
            recipe, where_named = named, f"{config_file}:{own.lines[('recipe',)]}"
    by_default = recipe is None
    if by_default and _init(own, settings, flags or {}) == "pretrained":
        recipe = PRETRAINED_RECIPE
    elif by_default and own is None:
        recipe = DEFAULT_RECIPE
    if recipe is not None:
        path = recipe_path(recipe, where=where_named)
        lay(read_yaml(path, where="--recipe"), "recipe", path.name)
    if own is not None:
        lay(own, "file", str(config_file))
    beside = None if config_file is None else Path(config_file).parent
    resolved = _finish(values, origins, settings, flags or {}, blocks, notes, beside=beside)
    return replace(resolved, recipe_by_default=by_default)


def _init(own: Document | None, settings: Sequence[str], flags: Mapping[str, Any]) -> Any:
    """What the layers above a recipe say of ``init``; None where they say nothing."""
    if "init" in flags:
        return flags["init"]
    given = [text for key, _, text in (setting.partition("=") for setting in settings) if key == "init"]
    if given:
        return given[-1].strip("'\"")
    return own.values.get("init") if own is not None else None


def read_config(path: Path, *, name: str | None = None) -> ResolvedConfig:
    """Read a run folder's config.yaml: complete, so that no recipe lies below it.

    ``name``: the file as places name it, where more than one run is looked at; by default without its folder.
    """
    document = read_yaml(path, where=str(path))
    name = name or path.name
    _rename_deprecated(document, name)  # an earlier dstrain wrote it: nothing for its user to change
    values = {**MEANT_BEFORE, **document.values}
    origins = {keys: Origin("file", f"{name}:{line}") for keys, line in document.lines.items()}
    return _finish(values, origins, (), {}, origins)


def override(base: ResolvedConfig, flags: Mapping[str, Any], settings: Sequence[str] = ()) -> ResolvedConfig:
    """The same config with some values laid on top (a resumed run's own flags)."""
    values = json.loads(base.config.model_dump_json())
    origins = dict(base.origins)
    return _finish(values, origins, settings, flags, base.blocks, base=base)


def replace_values(base: ResolvedConfig, values: Mapping[str, Any], origin: Origin) -> ResolvedConfig:
    """The same config with these values of the given origin; those that it has already keep theirs.

    Raises:
        ConfigError: a value that is none for its key.
    """
    present = json.loads(base.config.model_dump_json())
    origins = dict(base.origins)
    for key, value in values.items():
        if key not in present or value != present[key]:
            _put(present, origins, (key,), value, origin)
    return _finish(present, origins, (), {}, base.blocks, base=base)


def _finish(
    values: dict[str, Any],
    origins: dict[Path_, Origin],
    settings: Sequence[str],
    flags: Mapping[str, Any],
    blocks: Mapping[Path_, Origin],
    notes: Sequence[str] = (),
    base: ResolvedConfig | None = None,
    beside: Path | None = None,
) -> ResolvedConfig:
    """Lay ``--set`` and the flags on top, refuse unknown keys, check the values, read the DeepSpeed JSON file.

    ``base``: what the values were laid on, whose DeepSpeed JSON need not be read again. ``beside``: the folder of the
    user's config file.
    """
    notes = list(notes)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise DstrainError(
                f"{_shown(setting)} is not KEY=VALUE", where="--set", hint="for example --set lr=1e-3"
            )
        if key in CONFIG_KEYS:
            notes.append(_deprecated(f"--set {key}", key))
            key = CONFIG_KEYS[key]
        for path, value in leaves({key: _parse_setting(key, text)}):
            _put(values, origins, (*key.split("."), *path[1:]), value, Origin("set", f"--set {key}"))
    for key, value in flags.items():
        _put(values, origins, (key,), value, flag_origin(key))
    known = {key: value for key, value in values.items() if key in field_names()}
    found = [_unknown_key(key, values[key], origins) for key in values if key not in known]
    config, wrong = _validate(known, origins)
    if config.plugins:
        config = config.model_copy(update={"code_dirs": _code_dirs(config.code_dirs, beside)})
    by_default = base is not None and base.recipe_by_default
    resolved = ResolvedConfig(config, origins, blocks, tuple(notes), recipe_by_default=by_default)
    resolved = _follow_scheduler(replace(resolved, ds_config=_read_ds_config(resolved, base)))
    if found or wrong:
        raise ConfigError([*found, *wrong], resolved)
    return resolved


def _read_ds_config(resolved: ResolvedConfig, base: ResolvedConfig | None) -> Document | DstrainError | None:
    """What the file of ``ds_config`` holds; or the error, where it can't be read."""
    name, where = resolved.config.ds_config, resolved.origin("ds_config")
    if name is None:
        return None
    if base is not None and (base.config.ds_config, base.origin("ds_config")) == (name, where):
        return base.ds_config
    try:
        return read_json(Path(name), where=str(where))
    except DstrainError as error:
        return error


def _follow_scheduler(resolved: ResolvedConfig) -> ResolvedConfig:
    """Take the schedule from a scheduler block of the user's DeepSpeed JSON that leaves the rest to the trainer."""
    name, document = resolved.config.ds_config, resolved.ds_config
    if not isinstance(document, Document):
        return resolved
    kinds = {key: resolved.origin(key).kind for key in ("lr_schedule", "lr_final")}
    keys = keys_of_scheduler(document.values.get("scheduler"), kinds)
    if not keys:
        return resolved
    place = Origin("file", f"{name}:{document.lines[('scheduler', 'type')]}")
    told = ", ".join(f"{key}: {value}" for key, value in keys.items())
    note = f"{place}: {document.values['scheduler']['type']} is {told} in dstrain, with a linear warm-up"
    return replace(
        resolved,
        config=resolved.config.model_copy(update=keys),
        origins={**resolved.origins, **{(key,): place for key in keys}},
        notes=(*resolved.notes, note),
    )


def _rename_deprecated(document: Document, name: str) -> list[str]:
    """Give a document's deprecated keys their new names, in place; a note for each. Raises DstrainError for both."""
    notes = []
    for old, new in CONFIG_KEYS.items():
        if old not in document.values:
            continue
        line = document.lines.pop((old,), None)
        place = f"{name}:{line}" if line else name
        if new in document.values:
            raise DstrainError(
                f"both {new} and its old name {old} are given", where=place, hint=f"remove {old}"
            )
        document.values[new] = document.values.pop(old)
        if line:
            document.lines[(new,)] = line
        notes.append(_deprecated(place, old))
    return notes


def _deprecated(place: str, old: str) -> str:
    return f"{place}: {old} is deprecated, the key is now {CONFIG_KEYS[old]}"


def _code_dirs(chosen: Sequence[str] | None, beside: Path | None) -> list[str]:
    """Where modules of the user's are looked for, as absolute paths: a run may be resumed from anywhere."""
    folders = [Path(folder).expanduser() for folder in chosen or ()]
    if chosen is None:
        folders = [*([beside] if beside else []), Path()]
    return list(dict.fromkeys(str(folder.absolute()) for folder in folders))


def _put(
    values: dict[str, Any], origins: dict[Path_, Origin], path: Path_, value: Any, origin: Origin
) -> None:
    """Set the value at ``path``, opening mappings on the way, and note its origin in place of older ones."""
    if len(path) == 1:
        path = path_of(path[0], value)
    target = values
    for depth, key in enumerate(path[:-1], start=1):
        inner = target.get(key)
        if not isinstance(inner, dict):
            inner = target[key] = {}
            origins.pop(path[:depth], None)
        target = inner
    target[path[-1]] = value
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = origin


def _parse_setting(key: str, text: str) -> Any:
    """The value of ``--set KEY=text``: a text key takes it as it stands, unless it is in quotes or null."""
    field = RunConfig.model_fields.get(key)
    if field is None or field.annotation not in (str, str | None):
        return parse_scalar(text)
    null = field.annotation is not str and text in ("null", "~")
    return parse_scalar(text) if null or text[:1] in ("'", '"') else text


def _unknown_key(key: str, value: Any, origins: Mapping[Path_, Origin]) -> DstrainError:
    origin = next((origin for path, origin in origins.items() if path[0] == key), None)
    homes = [home for home in homes_of(key) if home[0] in _MOVED and what_is_wrong(home, value) is None]
    near = difflib.get_close_matches(key.lower(), field_names(), n=1, cutoff=_NEAR)
    near += difflib.get_close_matches(key.lower(), FOREIGN_KEYS, n=1, cutoff=_NEAR_FOREIGN)
    near.sort(key=lambda name: difflib.SequenceMatcher(None, key.lower(), name).ratio(), reverse=True)
    hint = f"the keys are: {', '.join(field_names())}"
    if find((key,)) is not None and (isinstance(value, dict) or key not in FOREIGN_KEYS):
        hint = f"DeepSpeed keys belong under `deepspeed:` (--set deepspeed.{key}...)"
    elif translated := translate(key, value):
        hint = f"in dstrain: {translated}"
    elif len(homes) == 1:
        hint = f"DeepSpeed keys belong under `deepspeed:` (--set deepspeed.{'.'.join(homes[0])}=...)"
    elif near:
        hint = (
            f"did you mean {near[0]}?"
            if near[0] in field_names()
            else f"in dstrain: {translate(near[0], value)}"
        )
    return DstrainError(f"unknown key {key!r}", where=str(origin) if origin else None, hint=hint)


def _validate(
    values: Mapping[str, Any], origins: Mapping[Path_, Origin]
) -> tuple[RunConfig, list[DstrainError]]:
    """Check types and ranges. The config of what is right, and one error with its place for each key that is not."""
    try:
        return RunConfig.model_validate(dict(values)), []
    except ValidationError as errors:
        wrong = {str(error["loc"][0]): error for error in reversed(errors.errors())}
    found = [_wrong_value(field, wrong[field], values[field], origins) for field in values if field in wrong]
    right = {field: value for field, value in values.items() if field not in wrong}
    return RunConfig.model_validate(right), found


def _wrong_value(field: str, error: Any, given: Any, origins: Mapping[Path_, Origin]) -> DstrainError:
    origin = origins.get((field,)) or next(
        (origin for known, origin in origins.items() if known[0] == field), DEFAULT
    )
    within = f"{error['loc'][1]}: " if isinstance(given, dict) and len(error["loc"]) > 1 else ""
    return DstrainError(
        f"{field} = {_shown(given)}: {within}{_describe(error)}",
        where=str(origin),
        hint=_hint(field, given, error),
    )


def _shown(given: Any) -> str:
    """A value for a message: all of it, unless that would fill the screen."""
    text = repr(given)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _describe(error: Any) -> str:
    """pydantic's message in the tone of the others."""
    if error["type"] == "string_pattern_mismatch":  # of host names alone
        return "must be a host name or an address: letters, digits and . _ : - only"
    if error["type"] in ("too_short", "too_long"):
        return f"must have {error['ctx'].get('min_length') or error['ctx']['max_length']} items"
    message = (
        str(error["msg"])
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    return message[:1].lower() + message[1:]


def _hint(field: str, given: Any, error: Any) -> str:
    info = RunConfig.model_fields[field]
    if translated := translate_value(field, given):
        return f"in dstrain: {translated}"
    if error["type"] == "string_type" and isinstance(given, (bool, int, float)):
        return f'write it in quotes: {field}: "{given}"'
    if isinstance(given, str) and isinstance(parse_scalar(given), (int, float)):
        return "write the number without quotes"
    if info.default is None or info.default == []:
        return str(info.description)
    example = dump_yaml({field: info.default}).strip()
    if isinstance(info.default, list | dict):
        example = f"{field}: {json.dumps(info.default)}"  # in one line
    example = f"for example {example}"
    return f"{info.description}; {example}" if info.description else example

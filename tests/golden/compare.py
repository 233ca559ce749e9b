"""Compare JSON of this dstrain with that of 0.1, through explicit tables of what was changed on purpose."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RENAMED: dict[str, str] = {
    "held_out": "validation",
    "held_out_loss": "validation_loss",
    "held_out_rows": "validation_rows",
    "held_out_documents": "validation_documents",
    "spans": "chunks",
}
"""Old name -> new name. A name without dots is that key wherever it stands; with dots it is a path from the root, list
indices left out (``layout.ranks.spans``), and stands for all below it. Only the first entry that fits is applied."""

NEW: set[str] = {
    *(
        "max_document_bytes",
        "access",
        "pass_env",
        "code_dirs",
        "hooks",
        "trackers",
        "profile",
        "not_covered",
        "adapter",
    ),
    *("model.adapter_parameters", "model.base_fingerprint", "model.bits"),
    *("begin_token", "data.begins_with", "data.ends_with", "data.kinds", "data.left_out", "data.commit"),
    *("data_weight_by", "data_phases", "data.sources", "data.phases", "data.limit_until", "config.data.path"),
    *("data_stream", "data.streamed", "data.held_until"),
    *(
        "data_format",
        "data_fields",
        "chat_template",
        "train_on",
        "train_stop_token",
        "on_bad_record",
        "too_long",
    ),
    *(
        "data.format",
        "data.text_field",
        "data.trained_tokens",
        "data.cut_documents",
        "data.dropped_documents",
        "data.stop_tokens",
        "data.train_stop_token",
    ),
    *("data.documents_hash", "config.loss", "origins.loss"),
    *("communication_timeout", "attention", "fused"),
    *("data_options", "loss_options", "optimizer_options", "lr_schedule_options"),
    *("time.utilisation", "time.matrices", "traffic_replicas", "traffic_stages"),
}
"""Keys that 0.1 did not have; named as in `RENAMED`."""

NEW_FILES: set[str] = set()
"""Files of a run folder that 0.1 did not have. Those that it had keep their names."""

NO_LONGER_SENT = " + 8 B of positions"
"""What 0.1 sent from stage to stage beside the hidden states, and dualpipev still does."""

REWORDED: dict[str, str] = {"--set held_out": "--set validation"}
"""Old words -> new words inside of text values, such as the key in an origin ``lr (--lr)``."""

CORRECTED: dict[str, tuple[str, re.Pattern[str]]] = {
    "config.attention": ("auto", re.compile("sdpa")),
    "origins.attention": ("default", re.compile("--set attention")),
    "origins.deepspeed": ("default", re.compile(r"choices\.yaml:\d+")),
    "time.traffic.reason": (
        "ZeRO-3 gathers 1.94 x 8,030,261,248 of them for forward and backward pass of the one micro-batch:"
        " 15/16 x 1 x 15,560,522,496 x 2 B",
        re.compile(r"ZeRO-3 gathers 1\.88 x .* 15/16 x 15,098,445,824 x 2 B"),
    ),
    "warnings": (
        "ZeRO-2 with a pipeline reduces the gradients of each of the 2 micro-batches, 6.1 GB a step from each rank more"
        " than --zero 1, which reduces them once a step, but holds a stage's gradients whole and not 1/8 of them",
        re.compile(
            r"ZeRO-2 with a pipeline .* of the 2 micro-batches: 12\.[23] GB .* --zero 1 sends 6\.1 GB, .*"
        ),
    ),
}
"""Where 0.1 said something false, or less, or is asked otherwise: what it said, and what is true. A mapping comes from
where its first key stands."""

ESTIMATED: dict[str, tuple[float, float]] = {
    **{f"stage_memory.{name}": (0.5, 2.5) for name in ("gradients", "buffers", "together", "total")},
    **{f"time.{name}": (0.9, 1.11) for name in ("total", "run_seconds", "mfu", "tokens_per_second")},
    "time.optimizer": (0.35, 1.0),
    "time.data_parallel": (0.95, 1.05),
    "time.traffic.bytes": (0.95, 1.05),
    "checkpoint_bytes": (0.99, 1.01),
    "disk_bytes": (0.99, 1.01),
    "time.traffic.messages": (0.5, 1.0),
    "stage_memory.activations": (0.5, 1.4),
    "time.overhead": (0.95, 1.0),
    "time.pipeline": (0.95, 1.0),
    **{f"time.{name}": (0.95, 1.05) for name in ("bubble", "bubble_fraction")},
}
"""What 0.1 estimated less well: the least and the most that it may be now, as a fraction. It knew no fused AdamW, which
takes no memory beside the states, and not what ZeRO-3 keeps; ``memory_verdict`` says the total. Its pipelines sent
positions, and kept what they had sent."""

PROSE = ("memory_verdict", "time.assumptions", "time.traffic.reason", "warnings")
"""Sentences for people: they may be worded anew, and the numbers in them must stay."""

NEW_SENTENCES = ("is deprecated, the key is now",)
"""In sentences of lists that 0.1 did not say: of the keys' old names, which the cells use."""

VOLATILE = ("dstrain", "format")
"""What is another in each version."""

_CLOSE = 1e-12  # floats: the last bit may differ with the C library's pow and log
_NUMBER = re.compile(r"\d+(?:[,.]\d+)*")

Leaves = dict[tuple[str, tuple[int, ...]], Any]
"""Values by dotted path and list indices."""


def differences(stored: Any, now: Any, *, place: Path | None = None) -> list[str]:
    """What is not the same, a line each.

    Args:
        stored: written by `normalised`.
        now: what this dstrain gave.
        place: the folder that the command ran in.
    """
    old = {(renamed(path), indices): value for (path, indices), value in leaves(stored).items()}
    new = leaves(normalised(now, place))
    found = [f"{_name(*key)} is gone (was {old[key]!r})" for key in old.keys() - new.keys()]
    found += [
        f"{_name(*key)} is new ({new[key]!r})"
        for key in new.keys() - old.keys()
        if not _is_named(key[0], NEW)
    ]
    found += [
        f"{_name(*key)} was {old[key]!r} and is {new[key]!r}"
        for key in old.keys() & new.keys()
        if not _same(key[0], old[key], new[key])
    ]
    return sorted(found)


def key_differences(stored: list[str], now: list[str]) -> list[str]:
    """The same for lists of dotted keys."""
    old, new = {renamed(path) for path in stored}, set(now)
    gone = [f"{path} is gone" for path in old - new]
    return sorted(gone + [f"{path} is new" for path in new - old if not _is_named(path, NEW)])


def normalised(value: Any, place: Path | None = None) -> Any:
    """Without what depends on the version, the checkout and the folder that the command ran in."""
    if isinstance(value, Mapping):
        return {key: normalised(item, place) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        said = [
            item for item in value if not any(isinstance(item, str) and new in item for new in NEW_SENTENCES)
        ]
        return [normalised(item, place) for item in said]
    if isinstance(value, str):
        text = value.replace(str(place), "<place>") if place else value
        text = re.sub(r"^/.*/(ds_configs/\S+)$", r"<dstrain>/\1", text)
        return re.sub(r"\bquickstart\.yaml:\d+", "quickstart.yaml", text)  # the recipe may get other comments
    return value


def leaves(value: Any) -> Leaves:
    """A JSON value, flat. Empty objects and lists are values too."""
    return dict(_leaves(value, "", ()))


def key_paths(value: Any, *, opaque: tuple[str, ...] = ()) -> list[str]:
    """Every dotted key of a JSON value; of what is below ``opaque`` paths nothing is told."""
    paths = set()
    for path, _ in leaves(value):
        above = next((name for name in opaque if path.startswith(f"{name}.")), path)
        paths.add(above)
    return sorted(paths)


def renamed(path: str) -> str:
    """The path of 0.1 as it is called now."""
    for old, new in RENAMED.items():
        if "." in old and (path == old or path.startswith(f"{old}.")):
            return new + path[len(old) :]
    return ".".join(RENAMED.get(part, part) for part in path.split("."))


def _leaves(
    value: Any, path: str, indices: tuple[int, ...]
) -> Iterator[tuple[tuple[str, tuple[int, ...]], Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key), indices)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, path, (*indices, index))
    else:
        yield (path, indices), value


def _is_named(path: str, names: set[str]) -> bool:
    beginnings = any(path == name or path.startswith(f"{name}.") for name in names)
    return beginnings or not names.isdisjoint(path.split("."))


def _same(path: str, old: Any, new: Any) -> bool:
    said, true = CORRECTED.get(path, (None, None))
    if true is not None and old == said and true.fullmatch(str(new)):
        return True
    if path in ESTIMATED and type(old) is type(new):
        least, most = ESTIMATED[path]
        return bool(least * old <= new <= most * old)
    if isinstance(old, str) and isinstance(new, str):
        if path == "memory_verdict":
            return _NUMBER.sub("N", old) == _NUMBER.sub("N", new)
        if path in {renamed(prose) for prose in PROSE}:
            said = _reworded(old)
            numbers = [sorted(_NUMBER.findall(text)) for text in (said, said.replace(NO_LONGER_SENT, ""))]
            return sorted(_NUMBER.findall(new)) in numbers
        return _reworded(old) == new
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=_CLOSE, abs_tol=1e-300)
    return type(old) is type(new) and bool(old == new)


def _reworded(text: str) -> str:
    for old, new in REWORDED.items():
        text = text.replace(old, new)
    return text


def _name(path: str, indices: tuple[int, ...]) -> str:
    return path + "".join(f"[{index}]" for index in indices)

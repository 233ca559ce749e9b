"""Explains a config key: what it does, its value in a plan, why, and where it came from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dstrain.config.deepspeed_keys import GONE, canonical, deepspeed_version, find, homes_of, nearest
from dstrain.config.schema import RunConfig, field_names
from dstrain.config.template import describe_type
from dstrain.config.values import KeyPath, leaves
from dstrain.errors import DstrainError
from dstrain.planning.deepspeed.keys import AS_DEFAULT, owner_of, why
from dstrain.planning.plan import Plan

_PREFIX = "deepspeed."


@dataclass(frozen=True)
class Explanation:
    """A key in a plan.

    Attributes:
        key: dotted; ``deepspeed.`` in front of DeepSpeed's.
        does: what it is for.
        takes: its type and limits, in words.
        default: what it is where nobody sets it: in DeepSpeed, or in dstrain.
        set: whether it stands in the plan; if not, ``value`` is the default.
        value: what it is in this plan; of a block, all that stands in it.
        why: the reason for this value.
        origin: the place that decided it.
        decided_by: the key of dstrain's that decides this one of DeepSpeed's, with its value and origin.
        effects: what a key of DeepSpeed's changes, as docs/deepspeed-keys.md says it.
        decides: DeepSpeed's keys that follow from this one of dstrain's, with their values.
    """

    key: str
    does: str
    takes: str
    default: Any
    set: bool
    value: Any
    why: str
    origin: str
    decided_by: str | None = None
    decides: tuple[tuple[str, Any], ...] = ()
    effects: str = ""

    def to_record(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return asdict(self) | {"decides": dict(self.decides)}


def keys_meant(name: str) -> list[str]:
    """The keys that ``name`` stands for: dstrain's own of this name, and DeepSpeed's, whose parents may be left out.

    DeepSpeed's begin with ``deepspeed.``. Two, where both have the name (``gradient_clipping``).

    Raises:
        DstrainError: neither has it, or DeepSpeed has it in several blocks.
    """
    name = name.strip()
    of_deepspeed = name.removeprefix(_PREFIX)
    own = [name] if name in field_names() else []
    path = tuple(of_deepspeed.split("."))
    if of_deepspeed and find(path) is not None:
        return [*own, _PREFIX + ".".join(canonical(path))]
    homes = homes_of(of_deepspeed) if not own else []
    if len(homes) > 1:
        places = ", ".join(".".join(home) for home in homes[:8])
        raise DstrainError(
            f"{of_deepspeed!r} occurs in several DeepSpeed blocks",
            where="--explain",
            hint=f"name one: {places}{' ...' if len(homes) > 8 else ''}",
        )
    if own or homes:
        return own or [_PREFIX + ".".join(homes[0])]
    near = difflib.get_close_matches(name, field_names(), n=1, cutoff=0.7)
    near += [key for key in nearest(of_deepspeed) if key not in near]
    raise DstrainError(
        f"neither dstrain nor DeepSpeed {deepspeed_version()} has a key {name!r}",
        where="--explain",
        hint=f"did you mean {' or '.join(near[:3])}?" if near else "`dstrain config schema` lists them all",
    )


def explain(plan: Plan, name: str) -> list[Explanation]:
    """What ``name`` means in this plan. Raises DstrainError as `keys_meant` does."""
    return [
        _of_deepspeed(plan, tuple(key.removeprefix(_PREFIX).split(".")))
        if key.startswith(_PREFIX)
        else _of_dstrain(plan, key)
        for key in keys_meant(name)
    ]


def _of_deepspeed(plan: Plan, path: KeyPath) -> Explanation:
    node = find(path)
    assert node is not None, path
    dotted = ".".join(path)
    gone = node.get("removed") or node.get("deprecated")
    if gone:
        state = "removed" if "removed" in node else "deprecated"
        return Explanation(
            _PREFIX + dotted, f"{state}: {gone}", "nothing", None, False, None, "it is not used", ""
        )
    value = _at(plan.deepspeed, path)
    is_set = value is not _NOTHING
    owner = owner_of(path)
    origins = plan.deepspeed_origins
    within = list(dict.fromkeys(origins[key] for key in origins if key.startswith(f"{dotted}.")))
    origin = origins.get(dotted) or ", ".join(within) or "DeepSpeed's default"
    return Explanation(
        key=_PREFIX + dotted,
        does=str(node.get("description", "not documented by DeepSpeed")),
        takes=_takes(node),
        default=node.get("default"),
        set=is_set,
        value=value if is_set else node.get("default"),
        why=_why(dotted, origin, is_set=is_set, is_block="keys" in node),
        origin=origin,
        decided_by=_choice(plan, owner) if owner else None,
        effects=str(node.get("effects", "")),
    )


def _choice(plan: Plan, key: str) -> str:
    """A key of dstrain's with its value and origin: ``zero = 2 (--zero)``."""
    value = plan.config[key]
    return f"{key} ({plan.origins[key]})" if value is None else f"{key} = {value} ({plan.origins[key]})"


def _why(dotted: str, origin: str, *, is_set: bool, is_block: bool) -> str:
    if not is_set:
        return "neither dstrain nor you set it"
    if is_block:
        return "see the reason of each of its keys"
    if origin.startswith("ds_configs/"):
        return why(tuple(dotted.split(".")))
    if origin == "DeepSpeed's default":
        return AS_DEFAULT
    if origin.startswith("--") or re.search(r":[0-9]+$", origin):
        return "you set it"
    if " (" in origin or origin.startswith(("the ", "accelerator ", "global_batch ")):
        return f"it follows from {origin}"
    return "you set it"


def _takes(node: Mapping[str, Any]) -> str:
    if "keys" in node:
        return f"keys of its own: {', '.join(k for k, v in node['keys'].items() if not GONE & set(v))}"
    words = str(node.get("type", "any"))
    if "choices" in node:
        words += f", one of {', '.join(map(str, node['choices']))}"
    limits = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return ", ".join([words, *(f"{text} {node[key]}" for key, text in limits.items() if key in node)])


def _of_dstrain(plan: Plan, key: str) -> Explanation:
    field = RunConfig.model_fields[key]
    value, why = plan.config[key], "it is the default"
    origin = plan.origins[key]
    if origin != "default":
        why = "it was chosen there"
    if value is None:
        derived = {
            "micro_batch": (
                plan.batch.micro_batch,
                "the largest that divides a replica's share, at most 8, and leaves four micro-batches per stage",
            ),
            "data_parallel": (plan.layout.data_parallel, "as many as the devices allow"),
        }
        value, why = derived.get(key, (None, why))
    return Explanation(
        key=key,
        does=field.description or "",
        takes=describe_type(field.rebuild_annotation()),
        default=field.get_default(),
        set=origin != "default",
        value=value,
        why=why,
        origin=origin,
        decides=tuple(_decided_by(plan, key)),
    )


def _decided_by(plan: Plan, key: str) -> Iterator[tuple[str, Any]]:
    """DeepSpeed's keys in this plan that follow from a key of dstrain's."""
    for path, value in leaves(plan.deepspeed):
        if owner_of(path) == key or plan.deepspeed_origins[".".join(path)].startswith(f"{key} ("):
            yield ".".join(path), value


_NOTHING = object()


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            return _NOTHING
        values = values[key]
    return values

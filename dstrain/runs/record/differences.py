"""Differences between two launches that can change the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.values import leaves
from dstrain.runs.record.source import UNKNOWN

# What a run is called, how it is watched, kept and told of: nothing of it reaches the numbers.
_SAME_NUMBERS = frozenset(
    (
        "name", "runs_dir", "hostfile", "launcher", "nodes", "processes", "master_addr", "master_port", "restarts",
        "elastic", "hang_after", "communication_timeout",
        "check_every", "save_every", "save_weights", "keep", "keep_every", "background_save",
        "prompt", "sample_tokens", "time_limit", "nvme_path", "eval_every", "trackers", "profile", "code_dirs",
        "access", "pass_env",
        # Compared as what they came to: fingerprints, the layout, the batch, DeepSpeed's JSON.
        "model", "data", "data_options", "tokenizer", "data_parallel", "micro_batch", "partition", "ds_config",
        "deepspeed", "max_document_bytes",
    )
)  # fmt: skip
# The packages that compute stand in front.
_FIRST_PACKAGES = ("torch", "deepspeed", "transformers", "triton", "numpy", "tokenizers", "datasets")


@dataclass(frozen=True)
class Difference:
    """One thing that was recorded of both, and is not the same."""

    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {_said(self.was)} -> {_said(self.now)}"


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two records of launches; what most likely changes the numbers stands in front."""
    return list(_differences(was, now))


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for what in ("data", "tokenizer", "model"):
        yield from _of(what, was, now, ("fingerprint", "weights"))
    yield from _of("config", was, now, [key for key in was["config"] if key not in _SAME_NUMBERS])
    yield from _of("layout", was, now, ("data_parallel", "cut", "ranks_a_host"))
    yield from _of("batch", was, now, ("micro_batch",))
    yield from _values("loss_chunk", was["loss_chunk"], now["loss_chunk"])
    yield from _mapping("deepspeed", _flat(was["deepspeed"]), _flat(now["deepspeed"]))
    yield from _devices(was.get("devices", []), now.get("devices", []))
    yield from _mapping("", _in_order(was["packages"]), _in_order(now["packages"]))
    for what in ("python", "dstrain", "image"):
        yield from _values(what, was[what], now[what])
    yield from _mapping("variable", was["variables"], now["variables"])
    before, after = was["source"], now["source"]
    if before and after:  # a container may see no repository
        yield from _values("the folder's git revision", before["revision"], after["revision"])
        if before["changes"] != after["changes"] or UNKNOWN in (before["changes"], after["changes"]):
            yield Difference("the folder's git changes", before["changes"], after["changes"])


def _of(part: str, was: Mapping[str, Any], now: Mapping[str, Any], keys: Any) -> Iterator[Difference]:
    for key in keys:
        name = key if part == "config" else f"{part} {key}"
        yield from _values(name, was[part].get(key), now[part].get(key))


def _mapping(what: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    for key in dict.fromkeys((*was, *now)):
        yield from _values(f"{what} {key}".strip(), was.get(key), now.get(key))


def _devices(was: list[Mapping[str, Any]], now: list[Mapping[str, Any]]) -> Iterator[Difference]:
    """Rank by rank; what is the same difference on all of them is said once."""
    said = set()
    for rank, (before, after) in enumerate(zip(was, now, strict=False)):
        for difference in _mapping("", before, after):
            if str(difference) not in said:
                said.add(str(difference))
                yield Difference(f"rank {rank}'s {difference.what}", difference.was, difference.now)


def _values(what: str, was: Any, now: Any) -> Iterator[Difference]:
    if was != now:
        yield Difference(what, was, now)


def _in_order(packages: Mapping[str, str]) -> dict[str, str]:
    first = {name: packages[name] for name in _FIRST_PACKAGES if name in packages}
    return first | dict(packages)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join(path): value for path, value in leaves(values)}


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)

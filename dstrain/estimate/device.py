"""Device descriptions: from ``ds_configs/devices/``, from a user's file, or of this machine's CPU."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.config.files import ds_configs
from dstrain.config.yaml_reader import Document, read_yaml
from dstrain.errors import DstrainError

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Link:
    """A way for data.

    Attributes:
        bandwidth: bytes a second, in one direction, for one device.
        latency: seconds that a message takes however short it is.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Device:
    """One kind of device, and how several of them are connected. Bandwidths are those of the data sheets.

    Attributes:
        name: of its file, or of the processor that is here.
        kind: ``cuda`` or ``cpu``.
        memory_bytes: of one device; None: not known.
        flops: peak floating point operations a second in each precision, of one device; of a CPU: of all its
            cores, which its ranks share.
        utilisation: fraction of that peak that the layers of a large transformer reach.
        memory_bandwidth: bytes a second; of a CPU: of the whole machine.
        host_link: to the host's memory, for offloaded states.
        inside: between devices of one host.
        between: between hosts.
        gpus_per_node: of the usual machine with this device; of a CPU: its cores.
        precisions: those that it computes in.
        layer_overhead: seconds that a layer's forward pass costs however small it is: kernel launches.
        source: where the numbers are from.
        host_memory_bandwidth: bytes a second of a host's main memory, for the optimizer of offloaded states.
        disk_bandwidth: bytes a second of a host's local disk, for states that lie there.
        measured: where the utilisation was measured, in words; empty: it is that of its file, or assumed.
    """

    name: str
    kind: str
    memory_bytes: int | None
    flops: Mapping[str, float]
    utilisation: float
    memory_bandwidth: float
    host_link: Link
    inside: Link
    between: Link
    gpus_per_node: int
    precisions: tuple[str, ...]
    layer_overhead: float
    source: str
    host_memory_bandwidth: float = 200e9
    disk_bandwidth: float = 3e9
    measured: str = ""


def known_devices() -> list[str]:
    """Names of the devices in ``ds_configs/devices``."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def find_device(name_or_file: str, where: str) -> Device:
    """A device by its name, or from a YAML file of the same form as those in ``ds_configs/devices``.

    Raises:
        DstrainError: neither a known name nor a file; a file with an unknown, missing or wrong value.
    """
    if name_or_file in known_devices():
        return read_device(_folder() / f"{name_or_file}.yaml", where=where)
    path = Path(name_or_file).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_device(path, where=where)
    name = name_or_file.lower()
    near = [known for known in known_devices() if name and known.startswith(name)]
    near = near[:1] or difflib.get_close_matches(name, known_devices(), n=1, cutoff=0.4)
    known = f"known: {', '.join(known_devices())}; or a YAML file like {_folder() / 'h200.yaml'}"
    raise DstrainError(
        f"unknown device {name_or_file!r}",
        where=where,
        hint=f"did you mean {near[0]}? {known}" if near else known,
    )


def device_like(names: Sequence[str]) -> Device | None:
    """The device of these names, as nvidia-smi gives them; None where one is not known, or they differ."""
    if len(set(names)) != 1:
        return None
    for path in sorted(_folder().glob("*.yaml")):
        # Only a file that mentions it is parsed: YAML takes its time.
        if (
            names[0] in path.read_text(encoding="utf-8")
            and names[0] in _document(path, str(path)).values["names"]
        ):
            return read_device(path, where=str(path))
    return None


def read_device(path: Path, *, where: str) -> Device:
    """The device that a YAML file describes. Raises DstrainError as `find_device` does."""
    document = _document(path, where)
    values = document.values
    links = {
        key: Link(values[key]["gigabytes_per_second"] * 1e9, values[key]["latency_microseconds"] * 1e-6)
        for key in ("host_link", "inside", "between")
    }
    return Device(
        name=path.stem,
        kind=values.get("kind", "cuda"),
        memory_bytes=values["memory_mib"] * 2**20,
        flops={precision: tera * 1e12 for precision, tera in values["teraflops"].items()},
        utilisation=values["utilisation"],
        memory_bandwidth=values["memory_gigabytes_per_second"] * 1e9,
        gpus_per_node=values["gpus_per_node"],
        precisions=tuple(precision for precision in PRECISIONS if precision in values["teraflops"]),
        layer_overhead=values["layer_microseconds"] * 1e-6,
        source=values["source"],
        host_memory_bandwidth=values["host_memory_gigabytes_per_second"] * 1e9,
        disk_bandwidth=values["disk_gigabytes_per_second"] * 1e9,
        host_link=links["host_link"],
        inside=links["inside"],
        between=links["between"],
    )


def cpu_device(
    name: str, *, cores: int, hertz: float, flops_a_cycle: Mapping[str, float], memory_bytes: int | None
) -> Device:
    """The processor that is here, by what it says of itself.

    Args:
        cores: that this process may use.
        hertz: of one core.
        flops_a_cycle: of one core, in each precision that it computes in.

    Ranks on CPUs talk over gloo: through the loopback device on one host, over the network between hosts. What these
    give is taken from measurements on common servers, and is the least certain number here.
    """
    return Device(
        name=name,
        kind="cpu",
        memory_bytes=memory_bytes,
        flops={precision: cores * hertz * flops for precision, flops in flops_a_cycle.items()},
        utilisation=0.5,
        memory_bandwidth=10e9 * max(1, min(cores, 16)),
        host_link=Link(10e9, 1e-6),
        inside=Link(1.5e9, 100e-6),
        between=Link(1e9, 200e-6),
        gpus_per_node=cores,
        precisions=tuple(precision for precision in PRECISIONS if precision in flops_a_cycle),
        layer_overhead=1e-3,
        source="/proc/cpuinfo: cores x clock x what a core's vector units do in a cycle",
        host_memory_bandwidth=10e9 * max(1, min(cores, 16)),
    )


def _folder() -> Path:
    return ds_configs() / "devices"


_LINK = {"gigabytes_per_second": float, "latency_microseconds": float}
# What a device's file holds: a type, or the keys of a mapping. All are needed but the precisions and the kind.
_FORM: dict[str, Any] = {
    "kind": str,
    "names": list,
    "memory_mib": int,
    "teraflops": dict.fromkeys(PRECISIONS, float),
    "utilisation": float,
    "memory_gigabytes_per_second": float,
    "host_link": _LINK,
    "inside": _LINK,
    "between": _LINK,
    "gpus_per_node": int,
    "layer_microseconds": float,
    "host_memory_gigabytes_per_second": float,
    "disk_gigabytes_per_second": float,
    "source": str,
}


def _document(path: Path, where: str) -> Document:
    """The file's values, each of the right type and in its range."""
    document = read_yaml(path, where=where)
    _check(document.values, _FORM, (), document, str(path))
    if not document.values["teraflops"]:
        raise DstrainError("teraflops lists no precision", where=str(path), hint="for example fp32: 19.5")
    if document.values.get("kind", "cuda") not in ("cuda", "cpu"):
        where = f"{path}:{document.lines[('kind',)]}"
        raise DstrainError(
            "kind must be cuda, or cpu for the cores of a host", where=where, hint="kind: cuda"
        )
    if document.values["utilisation"] > 1:
        line = document.lines[("utilisation",)]
        raise DstrainError(
            "utilisation must be a fraction of the peak, at most 1",
            where=f"{path}:{line}",
            hint="for example 0.45",
        )
    return document


def _check(
    values: Mapping[str, Any], form: Mapping[str, Any], path: tuple[str, ...], document: Document, name: str
) -> None:
    """Each value as the form says. Raises DstrainError with the line of the first that is not."""
    for key, value in values.items():
        here = (*path, key)
        place = f"{name}:{document.lines.get(here, 1)}"
        dotted = ".".join(here)
        if key not in form:
            near = difflib.get_close_matches(key, form, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the keys are: {', '.join(form)}"
            raise DstrainError(f"unknown key {dotted!r}", where=place, hint=hint)
        wanted = form[key]
        if isinstance(wanted, Mapping):
            if not isinstance(value, dict):
                raise DstrainError(
                    f"{dotted} must contain {', '.join(wanted)}", where=place, hint="indent these below it"
                )
            _check(value, wanted, here, document, name)
        elif not _is(value, wanted):
            raise DstrainError(f"{dotted} = {value!r}: must be {_WORDS[wanted]}", where=place)
    missing = [key for key in form if key not in {"kind", *values} and form is not _FORM["teraflops"]]
    if missing:
        dotted = ".".join((*path, missing[0]))
        raise DstrainError(
            f"{dotted} is missing", where=name, hint=f"see {_folder() / 'h200.yaml'} for a complete file"
        )


_WORDS = {
    float: "a number above 0",
    int: "a whole number above 0",
    str: "a text",
    list: "a list of the names that nvidia-smi gives it; [] for none",
}


def _is(value: Any, wanted: type) -> bool:
    if isinstance(value, bool):
        return False
    if wanted is list:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if wanted is str:
        return isinstance(value, str)
    numbers = (int, float) if wanted is float else int
    return isinstance(value, numbers) and 0 < value < float("inf")

"""From choices to a plan: look at the machine, measure the model, prepare the data, decide."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstrain.cli.child import run_module
from dstrain.cli.model_lookup import check_pretrained, find_model
from dstrain.config.files import cache_folder
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.launch.devices import Devices, has_async_io, local_devices
from dstrain.launch.site import Site, find_site
from dstrain.plan.attention import FLASH_PACKAGES
from dstrain.plan.layout import Host
from dstrain.plan.plan import Machines, Plan, make_plan
from dstrain.plan.refusals import refuse
from dstrain.plan.shape import ModelShape


@dataclass(frozen=True)
class Planned:
    """A plan, the local devices that it was made for, and where it is to run."""

    plan: Plan
    devices: Devices
    site: Site
    make: Callable[[ResolvedConfig, tuple[Host, ...]], Plan]
    """The plan of the same model and data with other choices, on other hosts of the same kind."""


def plan_for(resolved: ResolvedConfig) -> Planned:
    """Make the plan, measuring the model and preparing the data where that was not done before.

    Raises:
        DstrainError: whatever can't work; nothing of the run has been started then.
    """
    config = resolved.config
    refuse(resolved)  # before the model and the data are looked at: this needs neither
    if config.offload == "nvme" and not has_async_io():
        raise DstrainError(
            "DeepSpeed writes to the disk through libaio, which is not installed",
            where=str(resolved.origin("offload")),
            hint="install it (Debian: apt-get install libaio-dev), or --offload cpu",
        )
    devices = local_devices()
    site = find_site(resolved, devices)
    hosts = site.hosts or (Host("localhost", devices.count),)
    flash = tuple(package for package in FLASH_PACKAGES.values() if find_spec(package))
    model = find_model(resolved)
    shape = _measure_model(model.config_file)
    if config.init == "pretrained":
        check_pretrained(model)
    data = _prepare_data(resolved, model.tokenizer if config.tokenizer == "auto" else config.tokenizer)
    fingerprint = hashlib.sha256(model.config_file.read_bytes()).hexdigest()[:16]
    folder = str(model.folder) if model.folder else None

    def make(resolved: ResolvedConfig, hosts: tuple[Host, ...]) -> Plan:
        machines = Machines(
            hosts, devices.kind, devices.names, devices.precisions, devices.memory_bytes, flash
        )
        return make_plan(resolved, machines, shape, data, str(model.config_file), fingerprint, folder)

    plan = make(resolved, hosts)
    if site.launcher == "none" and len(plan.layout.hosts) < len(site.hosts):
        raise DstrainError(
            f"{plan.layout.world_size} ranks leave {len(site.hosts) - len(plan.layout.hosts)} of {len(site.hosts)}"
            " nodes without any",
            where=str(resolved.origin("nodes")),
            hint="fewer --nodes, fewer --processes a node, or more --data-parallel",
        )
    if site.told is not None:
        plan = replace(plan, warnings=(*plan.warnings, site.told))
    return Planned(plan, devices, site, make)


def _measure_model(model_file: Path) -> ModelShape:
    """The model's shape: measured once for a config file and a version of transformers, then kept."""
    version = importlib.metadata.version("transformers")
    key = hashlib.sha256(version.encode() + model_file.read_bytes()).hexdigest()[:24]
    kept = cache_folder() / "shapes" / f"{key}.json"
    if kept.exists():
        try:
            return ModelShape.read(kept)
        except (ValueError, KeyError):  # written by another version: measured again
            kept.unlink()
    kept.parent.mkdir(parents=True, exist_ok=True)
    run_module("dstrain.model.measuring.measure", str(model_file), str(kept))
    return ModelShape.read(kept)


def _prepare_data(resolved: ResolvedConfig, tokenizer: str) -> dict[str, Any]:
    """Tokenise the data into the cache, where the ranks will find them, and say what they hold."""
    config = resolved.config
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "summary.json"
        request.write_text(
            json.dumps(
                {
                    "source": config.data,
                    "tokenizer": tokenizer,
                    "seq_len": config.seq_len,
                    "held_out": config.held_out,
                    "cache_dir": str(cache_folder() / "data"),
                    "pack": config.pack,
                }
            ),
            encoding="utf-8",
        )
        run_module("dstrain.data.prepare", str(request), str(answer))
        summary: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return summary

"""From a config to a plan: reads the config, finds the machines, measures the model, prepares the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dstrain.api.events import SILENT, Events, progress_to
from dstrain.api.hub_data import Commits
from dstrain.api.machines import Elsewhere, elsewhere, find_machines
from dstrain.api.model_lookup import check_pretrained, find_model, find_tokenizer, fingerprint_of_base
from dstrain.api.prepare_data import check_plugin_here, prepare_data
from dstrain.config import loader
from dstrain.config.files import cache_folder
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.launch.devices import Devices
from dstrain.launch.placement import Placement
from dstrain.lora import Adapter
from dstrain.planning.adapter_start import check_start, follow_adapter
from dstrain.planning.checks import refuse
from dstrain.planning.deepspeed.user_keys import check_packages_here
from dstrain.planning.hook_specs import check_trackers_here
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import FORMAT as SHAPE_FORMAT
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.plan import Machines, Plan
from dstrain.planning.recipe_values import fit_recipe, follow_data, within_positions
from dstrain.shared_caches import is_own, write_own


@dataclass(frozen=True)
class Planned:
    """A plan, the local devices that it was made for, where it is to run, and the measured shape of its model."""

    plan: Plan
    devices: Devices
    placement: Placement
    shape: ModelShape
    make: Callable[[ResolvedConfig, tuple[Host, ...]], Plan]
    """The plan of the same model and data with other choices, on other hosts of the same kind."""
    hosts: tuple[Host, ...] = ()
    """The hosts that there are, of which the plan may leave some out."""

    def settled(self, resolved: ResolvedConfig) -> ResolvedConfig:
        """The config that was planned for, without what gave way in the plan: a run folder keeps it so."""
        fitting = fit_recipe(follow_adapter(resolved), self.shape, self.plan.layout.world_size)
        return follow_data(fitting, self.plan.data)


@dataclass(frozen=True)
class Prepared:
    """All that a plan follows from but the choices: the model's shape, its data, the machines."""

    devices: Devices
    placement: Placement
    shape: ModelShape
    machines: Machines
    make: Callable[[ResolvedConfig, tuple[Host, ...]], Plan]
    """The plan of these choices on these hosts."""


def plan(
    config: ResolvedConfig,
    *,
    device: str | None = None,
    gpus_per_node: int | None = None,
    events: Events = SILENT,
) -> Plan:
    """What `run` would do with this config; nothing is started.

    The model is measured and the data are tokenized in processes of their own, where that was not done before.

    Args:
        config: from `load_config`.
        device: plan for machines that are not here: a name such as ``h100-80g``, or a YAML file that describes one.
            The number of nodes is the config's ``nodes``, or that of its hostfile.
        gpus_per_node: with ``device``; by default what such machines usually have.
        events: told of the progress.

    Raises:
        DstrainError: the config can't be trained: the reason, and what to do instead.
    """
    made = plan_for(config, elsewhere(device, gpus_per_node), events).plan
    events.planned(made)
    return made


def plan_for(
    resolved: ResolvedConfig,
    described: Elsewhere | None = None,
    events: Events = SILENT,
    *,
    earlier: Planned | None = None,
    commits: Commits | None = None,
) -> Planned:
    """Make the plan, measuring the model and preparing the data where that was not done before.

    Args:
        described: machines that are not here; None: those that are.
        earlier: a plan of the same model and data on the same machines: neither is looked at again.
        commits: of data sets on the hub that the run has begun with.

    Raises:
        DstrainError: whatever can't work; nothing of the run has been started then.
    """
    refuse(resolved)  # before the model and the data are looked at: this needs neither
    resolved = follow_adapter(resolved)
    if earlier is not None:
        return replace(earlier, plan=earlier.make(resolved, earlier.hosts))
    if described is None:
        check_code_here(resolved)
    prepared = prepare(resolved, described, events, commits=commits)
    placement = prepared.placement
    plan = prepared.make(resolved, prepared.machines.hosts)
    if placement.launcher == "none" and described is None and len(plan.layout.hosts) < len(placement.hosts):
        raise DstrainError(
            f"{plan.layout.world_size} ranks leave {len(placement.hosts) - len(plan.layout.hosts)} of"
            f" {len(placement.hosts)} nodes without a rank",
            where=str(resolved.origin("nodes")),
            hint="fewer --nodes, fewer --processes a node, or more --data-parallel",
        )
    if placement.told is not None:
        plan = replace(plan, warnings=(*plan.warnings, placement.told))
    return Planned(plan, prepared.devices, placement, prepared.shape, prepared.make, prepared.machines.hosts)


def check_code_here(resolved: ResolvedConfig) -> None:
    """Refuse code of the user's own that this machine does not have; nothing of it is run. Raises DstrainError."""
    for plugin in resolved.config.plugins:
        check_plugin_here(plugin, resolved)
    check_trackers_here(resolved)
    check_packages_here(resolved)


def prepare(
    resolved: ResolvedConfig,
    described: Elsewhere | None = None,
    events: Events = SILENT,
    *,
    commits: Commits | None = None,
) -> Prepared:
    """Look at the machines, measure the model and prepare the data, where that was not done before.

    Args:
        described: machines that are not here; None: those that are.
        commits: as of `plan_for`.

    Raises:
        DstrainError: one of them can't be used.
    """
    config = resolved.config
    devices, placement, machines = find_machines(resolved, described)
    model = find_model(resolved, events)
    shape = _measure_model(model.config_file, config.adapter, events)
    check_start(resolved, shape)
    resolved = within_positions(resolved, shape)
    if config.init == "pretrained":
        check_pretrained(model, events)
    tokenizer = find_tokenizer(resolved, model, events)
    data = prepare_data(resolved, tokenizer, events, commits=commits)
    fingerprint = hashlib.sha256(model.config_file.read_bytes()).hexdigest()[:16]
    folder = str(model.folder) if model.folder else None
    adapts_files = config.adapter is not None and config.init == "pretrained"
    base = fingerprint_of_base(model) if adapts_files else None

    def make(resolved: ResolvedConfig, hosts: tuple[Host, ...]) -> Plan:
        on = replace(machines, hosts=hosts)
        return make_plan(resolved, on, shape, data, str(model.config_file), fingerprint, folder, base)

    return Prepared(devices, placement, shape, machines, make)


def _measure_model(model_file: Path, adapter: Adapter | None, events: Events) -> ModelShape:
    """The model's shape: measured once for a config file, its adapters and the libraries' versions, then kept."""
    made_of = [SHAPE_FORMAT, importlib.metadata.version("transformers")]
    adapters = ""
    if adapter is not None:
        made_of.append(_version_of_peft())
        # The values that they start from have no part in the shape.
        adapters = adapter.model_copy(update={"start": None}).model_dump_json()
    content = " ".join(map(str, made_of)) + f" {adapters}"
    key = hashlib.sha256(content.encode() + model_file.read_bytes()).hexdigest()[:24]
    kept = cache_folder() / "shapes" / f"{key}.json"
    if is_own(kept):
        with suppress(ValueError, KeyError, RecursionError):  # damaged: measured again
            return ModelShape.read(kept)
    from dstrain.child_process import run_module

    with tempfile.TemporaryDirectory() as place:
        measured = Path(place) / kept.name
        arguments = [str(model_file), str(measured)]
        if adapters:
            (Path(place) / "adapter.json").write_text(adapters, encoding="utf-8")
            arguments.append(str(Path(place) / "adapter.json"))
        run_module("dstrain.model.measuring.measure", *arguments, say=progress_to(events))
        try:
            write_own(kept, measured.read_text(encoding="utf-8"))
        except OSError as error:
            raise DstrainError(
                f"cannot write the measurement: {error.strerror}",
                where=str(kept),
                hint="name a cache folder on a writable disk: DSTRAIN_CACHE=FOLDER",
            ) from None
        return ModelShape.read(measured)


def _version_of_peft() -> str:
    """Raises DstrainError where there is none."""
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise DstrainError("adapters need PEFT, which is not installed", hint="pip install peft") from None


def load_config(
    file: str | PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    **choices: Any,
) -> ResolvedConfig:
    """Lay choices on top of each other and check the whole: defaults < recipe < file < settings < choices.

        dstrain.load_config("my-run.yaml", zero=2, pipeline=4)

    Args:
        file: a YAML file. Without one and without ``recipe`` everything that is not chosen comes from the recipe
            ``quickstart``.
        recipe: a name of ``ds_configs/recipes``.
        settings: ``KEY=VALUE`` strings, as for ``--set``; a dotted KEY reaches into ``deepspeed``.
        flags: config keys with their values, as the command line's flags set them.
        choices: the same as keyword arguments.

    Raises:
        ConfigError: unknown keys, wrong types or impossible values, each with its place and the nearest valid key.
    """
    return loader.load_config(
        recipe=recipe,
        config_file=str(file) if file is not None else None,
        settings=settings,
        flags={**(flags or {}), **choices},
    )

"""``dstrain plan --fit``: from a config to the best layouts for it, each with its plan."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from dstrain.api.events import SILENT, Events
from dstrain.api.machines import Elsewhere, elsewhere
from dstrain.api.planning import Prepared, prepare
from dstrain.config.loader import ResolvedConfig, override, replace_values
from dstrain.config.origins import as_flags
from dstrain.errors import DstrainError
from dstrain.estimate.memory import memory_needed
from dstrain.planning.adapter_start import follow_adapter
from dstrain.planning.checks import refusals_in_any_layout
from dstrain.planning.fitting.candidates import Candidate, fixed_choices
from dstrain.planning.fitting.search import Fit, Scored
from dstrain.planning.fitting.search import fit as search
from dstrain.planning.layout import Host
from dstrain.planning.model_checks import check_precision
from dstrain.planning.plan import Machines, Plan


@dataclass(frozen=True)
class FitRow:
    """A layout, the flags that choose it, and its plan."""

    scored: Scored
    flags: str
    plan: Plan


@dataclass(frozen=True)
class FitResult:
    """The layouts that suit a config best.

    Attributes:
        fit: what was found.
        rows: the best first.
        machines: what for, in words.
        fixed: the choices that the user made, as flags.
        helps: where nothing fits: the choices of the user's without which something would, as flags.
    """

    fit: Fit
    rows: tuple[FitRow, ...]
    machines: str
    fixed: tuple[str, ...]
    helps: tuple[str, ...]

    def to_record(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "machines": self.machines,
            "fixed": list(self.fixed),
            "fits": self.fit.fits,
            "limit_bytes": self.fit.limit,
            "looked_at": self.fit.looked_at,
            "fallen": self.fit.fallen,
            "helps": list(self.helps),
            "rows": [
                {
                    "choices": row.scored.candidate.flags,
                    "flags": row.flags,
                    "memory_bytes": row.scored.memory,
                    "binds": row.scored.binds,
                    "time": asdict(row.scored.time),
                }
                for row in self.rows
            ],
        }


def fit(
    config: ResolvedConfig,
    *,
    device: str | None = None,
    gpus_per_node: int | None = None,
    events: Events = SILENT,
) -> FitResult:
    """Search the layouts that train this config fastest on the devices that are here, or on described ones.

    What the config sets stays as it is; the global batch never changes.

    Args:
        config: from `load_config`.
        device: devices that are not here, as in `plan`.
        gpus_per_node: with ``device``, as in `plan`.
        events: told of the progress.

    Raises:
        DstrainError: nothing can be trained with these choices, or the devices' speed is not known.
    """
    return fit_for(config, elsewhere(device, gpus_per_node), events)


def fit_for(
    resolved: ResolvedConfig, described: Elsewhere | None = None, events: Events = SILENT
) -> FitResult:
    """The layouts that suit these choices best.

    Args:
        described: machines that are not here; None: those that are.

    Raises:
        DstrainError: nothing can be trained with these choices, or nothing is known of the machines' speed.
    """
    for mistake in refusals_in_any_layout(resolved):  # before the model and the data are looked at
        raise mistake
    resolved = follow_adapter(resolved)
    prepared = prepare(resolved, described, events)
    machines = _counted(prepared.machines, resolved)
    name = machines.device_names[0] if machines.device_names else machines.accelerator
    check_precision(resolved, machines.precisions, name)
    if machines.device is None or resolved.config.precision not in machines.device.flops:
        raise DstrainError(
            f"the speed of {name} is unknown",
            where="--fit",
            hint="--device NAME of a similar device, or --device FILE with its figures",
        )
    try:
        found = search(resolved, prepared.shape, machines, machines.device)
    except DstrainError:
        # What the user has chosen leaves nothing to search: what is wrong with it, `make_plan` knows better.
        fixed = fixed_choices(resolved)
        stages = {"pipeline": 2} if "schedule" in fixed and "pipeline" not in fixed else {}
        least = replace_values(resolved, stages, resolved.origin("schedule"))
        prepared.make(least, prepared.machines.hosts)
        raise
    rows, refused = _rows(found, resolved, prepared, machines)
    if not rows:
        raise refused[0]
    fallen = Counter(found.fallen) + Counter(error.message for error in refused)
    return FitResult(
        fit=replace(found, fallen=dict(fallen.most_common())),
        rows=rows,
        machines=_describe(machines),
        fixed=tuple(" ".join(as_flags(key, value)) for key, value in fixed_choices(resolved).items()),
        helps=() if found.fits else _helps(resolved, prepared, machines),
    )


def flags_for(candidate: Candidate, resolved: ResolvedConfig, slots: int | None) -> str:
    """What to type beside the same arguments for this choice: nothing that holds without being said."""
    config = resolved.config
    said = []
    for key, value in candidate.flags.items():
        if key == "data_parallel":
            default = slots // candidate.layout.pipeline if slots else 1
            stands = value == (config.data_parallel or default)
        else:
            stands = value == getattr(config, key)
        if not stands:
            said.append(" ".join(as_flags(key, value)))
    return " ".join(said)


def _rows(
    found: Fit, resolved: ResolvedConfig, prepared: Prepared, machines: Machines
) -> tuple[tuple[FitRow, ...], list[DstrainError]]:
    """The plan of each layout, as `dstrain plan` with these flags makes it; and what speaks against the others."""
    rows, refused = [], []
    for scored in found.best:
        chosen = override(resolved, scored.candidate.flags)
        try:
            plan = prepared.make(chosen, prepared.machines.hosts)
        except DstrainError as error:
            refused.append(error)
            continue
        if plan.time is not None:
            scored = replace(
                scored,
                layout=plan.layout,
                time=plan.time,
                memory=memory_needed(plan.layout, plan.stage_memory, plan.accelerator)[0],
            )
        rows.append(FitRow(scored, flags_for(scored.candidate, resolved, prepared.machines.slots), plan))
    return tuple(rows), refused


def _counted(machines: Machines, resolved: ResolvedConfig) -> Machines:
    """On CPUs, where processes can be had at will: as many as there are cores, or as the user's choices ask for."""
    if machines.slots is not None:
        return machines
    asked = fixed_choices(resolved)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slots = max(cores, asked.get("pipeline", 1) * asked.get("data_parallel", 1))
    return replace(machines, hosts=(Host(machines.hosts[0].name, slots),))


def _helps(resolved: ResolvedConfig, prepared: Prepared, machines: Machines) -> tuple[str, ...]:
    """The user's choices each of which alone keeps everything from fitting."""
    found = []
    for key, value in fixed_choices(resolved).items():
        origins = {path: origin for path, origin in resolved.origins.items() if path != (key,)}
        freed = replace(resolved, origins=origins)
        assert machines.device is not None
        if search(freed, prepared.shape, machines, machines.device, wanted=1).fits:
            found.append(" ".join(as_flags(key, value)))
    if prepared.shape.router_loss and "micro_batch" not in fixed_choices(resolved):
        # It is held: another one would train another model. That is for the user to choose.
        found.append(f"a micro-batch of {resolved.config.micro_batch} (--micro-batch 1)")
    return tuple(found)


def _describe(machines: Machines) -> str:
    total = sum(host.slots for host in machines.hosts)
    name = machines.device.name if machines.device else machines.accelerator
    if machines.accelerator == "cpu" and len(machines.hosts) == 1:
        return f"{total} rank{'s' if total > 1 else ''} on the cores of this machine ({name})"
    across = f" on {len(machines.hosts):,} hosts" if len(machines.hosts) > 1 else ""
    return f"{total:,} x {name}{across}"

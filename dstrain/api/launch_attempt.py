"""One launch of a run: writes its folder, starts the ranks, and supervises them to the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dstrain.api.events import SILENT, Events
from dstrain.api.folder_lock import locked
from dstrain.api.planning import Planned
from dstrain.api.preflight import not_writable
from dstrain.config.loader import ResolvedConfig
from dstrain.data.tokenizing.tokenizer_files import BYTES, TOKENIZER_FILES
from dstrain.files import make_folder, write_atomically, write_json
from dstrain.launch.command import USUAL_PORT, free_port, supervised_environment, write_launch_files
from dstrain.launch.environment import default_environment
from dstrain.launch.key_delivery import delivered
from dstrain.launch.launch_spec import LaunchSpec, runs_here
from dstrain.planning.hook_specs import variables_of
from dstrain.planning.plan import Plan
from dstrain.runs.control_key import new_key
from dstrain.runs.record.record import write_record
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.supervisor import Outcome, supervise


def launch(
    spec: LaunchSpec,
    planned: Planned,
    resolved: ResolvedConfig,
    folder: RunFolder,
    on_tick: Callable[[], None],
    events: Events = SILENT,
) -> Outcome:
    """Fill the run folder, start the ranks, and return when nothing of them is left.

    Raises:
        DstrainError: the folder can't be written, or is another's; or it was lost while the run trained.
    """
    plan = planned.plan
    with locked(folder, plan.run_config.access, say=lambda line: events.note(line, "lock")) as lock:

        def tick() -> None:
            lock.check()
            on_tick()

        fill_run_folder(spec, planned, resolved, folder, events)
        plan_text = folder.plan.read_text(encoding="utf-8")
        only_here = spec.runs_here or spec.launcher == "none"
        key = new_key()
        with (
            ControlServer(
                plan.layout.world_size, plan_text, key=key, only_here=only_here, ranks=spec.ranks
            ) as control,
            delivered(key, spec) as private,
        ):
            _name_launch(control, folder)
            outcome = supervise(
                ["bash", str(folder.launch_script)],
                environment=supervised_environment(spec, control.address()) | private,
                folder=folder,
                control=control,
                world_size=len(spec.ranks),
                first_rank=spec.ranks.start,
                hosts=spec.host_of_rank,
                on_tick=tick,
                hang_seconds=plan.run_config.hang_after_seconds,
                terminate=spec.may_terminate,
            )
        lock.check(now=True)  # what ranks say for want of their folder is not the cause
        return outcome


def _name_launch(control: ControlServer, folder: RunFolder) -> None:
    """For rank 0 to see, if this is its folder. Raises DstrainError where it can't be written."""
    try:
        write_atomically(folder.launch, control.launch + "\n")
    except OSError as error:
        raise not_writable(error, folder) from error


def fill_run_folder(
    spec: LaunchSpec,
    planned: Planned,
    resolved: ResolvedConfig,
    folder: RunFolder,
    events: Events = SILENT,
) -> None:
    """Write what a launch reads: afterwards launch.sh starts the run. Raises DstrainError where it can't be written."""
    try:
        folder.make(planned.plan.run_config.access)
        # Of several nodes that share the folder the first one says what the run is. Where they don't, each has its own.
        if folder.node == 0 or not folder.config.exists():
            write_atomically(folder.config, resolved.to_yaml())
            write_json(folder.deepspeed_config, planned.plan.deepspeed)
            for note in write_record(folder, planned.plan, os.environ | spec.environment):
                events.note(note)
            _keep_model_files(folder, planned.plan)
        write_json(folder.plan, planned.plan.to_record())
        write_launch_files(spec)
        folder.result.unlink(missing_ok=True)
    except OSError as error:
        raise not_writable(error, folder) from error


def launch_spec(planned: Planned, folder: RunFolder) -> LaunchSpec:
    layout, config = planned.plan.layout, planned.plan.run_config
    hosts = layout.hosts if planned.placement.hosts else ()
    processes = layout.hosts[0].slots
    # The hosts' names are numbers then, and the port must be the same on all.
    by_hand = planned.placement.launcher == "none"
    first = "127.0.0.1" if by_hand or not hosts else layout.hosts[0].name
    return LaunchSpec(
        run_folder=folder.path,
        hosts=hosts,
        processes_per_host=processes,
        accelerator=planned.plan.accelerator,
        master_addr=config.master_addr or first,
        master_port=config.master_port or (USUAL_PORT if by_hand else free_port()),
        environment=default_environment(
            planned.plan.accelerator,
            processes,
            len(hosts) == 1 if by_hand else runs_here(hosts),
            hosts=() if by_hand else [host.name for host in hosts],
            deterministic=config.deterministic,
            carried=(*variables_of(config), *config.pass_env),
        ),
        launcher=planned.placement.launcher,
        device_ids=planned.devices.ids,
        node=folder.node,
    )


def _keep_model_files(folder: RunFolder, plan: Plan) -> None:
    """Copies of the model's config and the tokenizer's files: small, and needed to repeat the run. Raises OSError.

    They are made once: what a resumed run finds there stays.
    """
    wanted = {"config.json": Path(plan.model.file)}
    if plan.data.tokenizer != BYTES:
        tokenizer = Path(plan.data.tokenizer).expanduser()
        wanted |= {name: tokenizer / name for name in TOKENIZER_FILES}
    for name, source in wanted.items():
        kept = folder.model / name
        if source.is_file() and not kept.exists():
            make_folder(folder.model, below=folder.path)
            write_atomically(kept, source.read_bytes(), below=folder.path)

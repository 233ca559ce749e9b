"""``verify``: trains one config in one process and in other layouts, and compares them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.api.events import SILENT, Events
from dstrain.api.launch_attempt import launch, launch_spec
from dstrain.api.outcome import result_of
from dstrain.api.planning import Planned, plan_for
from dstrain.api.preflight import make_numbered, new_run_folder, not_writable, refuse_full_disk
from dstrain.config.files import model_config_file
from dstrain.config.loader import ResolvedConfig, override
from dstrain.errors import DstrainError, os_error_shown
from dstrain.files import write_atomically, write_json
from dstrain.launch.devices import local_devices
from dstrain.planning.layout_names import LayoutChoice, layouts_for
from dstrain.planning.model_shape import ModelShape, describe_randomness
from dstrain.runs.run_folder import Access, RunFolder, make_open_to

if TYPE_CHECKING:
    from dstrain.report.comparison import Difference

# fp32 agrees to this at least; more only where one process itself spreads further.
FLOOR = 1e-5
STEPS = 8
"""Of each run, where the config does not say how many."""

COLUMNS = ("layout", "loss", "grad_norm", "weights", "verdict", "seconds")


@dataclass(frozen=True)
class VerifyRow:
    """One layout.

    Attributes:
        layout: its name, such as ``zero2-pp2-dp2``.
        verdict: ``equal``, ``DIFFERS``, ``refused: WHY`` or ``failed: WHY``.
        loss, grad_norm, weights: largest relative difference from one process; None where it was not trained.
        seconds: of its run.
    """

    layout: str
    verdict: str
    loss: float | None = None
    grad_norm: float | None = None
    weights: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class VerifyResult:
    """How other layouts train a config, beside one process.

    Attributes:
        rows: one a layout.
        bound: the largest relative differences that are allowed: of losses, gradient norms, weights.
        folder: of the runs, and of ``verify.json`` and ``verify.md``.
        unwritten: why these two don't have all rows; None where they do.
    """

    rows: tuple[VerifyRow, ...]
    bound: Mapping[str, float]
    folder: Path
    unwritten: DstrainError | None = None

    @property
    def equal(self) -> bool:
        """Whether at least one layout was trained, and each that was is equal to one process."""
        tried = [row for row in self.rows if row.verdict in ("equal", "DIFFERS")]
        failed = any(row.verdict.startswith("failed") for row in self.rows)
        return bool(tried) and not failed and all(row.verdict == "equal" for row in tried)

    def cells(self) -> list[list[str]]:
        """The table as text: ``COLUMNS``, a line a layout, and what is allowed."""
        allowed = {"layout": "allowed", **self.bound, "verdict": "", "seconds": ""}
        return [
            [_cell(row.get(column)) for column in COLUMNS]
            for row in [*(asdict(row) for row in self.rows), allowed]
        ]


def verify(
    config: ResolvedConfig,
    *,
    layouts: Sequence[str] | None = None,
    ranks: int | None = None,
    tiny: bool = False,
    events: Events = SILENT,
) -> VerifyResult:
    """Train a config in one process and in other layouts; compare every step and the last weights.

    Each layout is a real, launched run on this machine. Without ``steps`` in the config it has 8 steps.

    Args:
        layouts: names such as ``zero2-pp4`` or ``zero1-pp2-dp2``; by default all that ``ranks`` can hold.
        ranks: of the layouts; by default the GPUs, 4 on CPUs.
        tiny: shrink the model to a few small blocks, and samples to 64 tokens.
        events: told of the progress, in notes.

    Raises:
        DstrainError: a layout is refused for every model, the model draws random numbers that depend on the layout, or
            a run in one process fails.
    """
    if config.origin("steps").kind in ("default", "recipe"):
        config = override(config, {"steps": STEPS})
    precision = config.config.precision
    wanted = (
        list(dict.fromkeys(LayoutChoice.parse(name) for name in layouts))
        if layouts
        else layouts_for(ranks or local_devices().count or 4, precision)
    )
    for choice in wanted:
        refusal = choice.refusal(precision)
        if refusal:
            raise DstrainError(f"{choice.name}: {refusal.reason}", where="--layouts", hint=refusal.instead)
    folder = _new_folder(Path(config.config.runs_dir), config.config.access)
    quiet: dict[str, Any] = {
        "eval_every": 0, "sample_tokens": 0, "save_every": 0, "save_weights": True, "check_every": 1,
        "runs_dir": str(folder), "trackers": [], "profile": None,
        "hostfile": None, "launcher": "local", "nodes": None, "processes": None,
    }  # fmt: skip
    if tiny:
        make_open_to(folder, config.config.access)
        quiet |= {
            "model": str(shrink_model(config, folder / "model")),
            "seq_len": min(64, config.config.seq_len),
        }
    config = override(config, quiet)
    try:
        return _compare(config, wanted, folder, events)
    finally:
        with suppress(OSError):  # nothing was written: the config was refused
            folder.rmdir()


def _new_folder(runs: Path, access: Access) -> Path:
    """For the runs and the table of one `verify`. Raises DstrainError."""
    try:
        return make_numbered(runs / f"verify-{time.strftime('%Y-%m-%d-%H%M%S')}", access)
    except OSError as error:
        raise not_writable(error, RunFolder(runs)) from error


def _compare(
    config: ResolvedConfig, wanted: list[LayoutChoice], folder: Path, events: Events
) -> VerifyResult:
    """Run the references and the layouts, and write the table."""
    from dstrain.report.comparison import bound_from  # numpy

    choices = config.config
    alone = LayoutChoice(zero=0 if choices.precision == "fp32" else 1)
    sizes = _micro_batches(choices.global_batch, choices.micro_batch)
    events.note(f"{choices.model}, {choices.precision}, {choices.steps} steps; runs in {folder}", "verify")
    references = []
    first: Planned | None = None
    for size in sizes:
        if first is not None and first.shape.row_leak:
            break  # the only size that is accepted was the first
        if first is not None and first.shape.router_loss and choices.precision == "fp32":
            break  # another size is another model: their distance would be a bound for nothing
        events.note(f"one process, micro-batches of {size} ...", "verify")
        name = f"one-process-micro-batch-{size}"
        planned, reference = _plan(config, alone, {"micro_batch": size}, name, events, first)
        first = first or planned
        _refuse_incomparable(config, planned.shape)
        if planned is first and planned.plan.not_covered:
            told = ", ".join(planned.plan.not_covered)
            events.note(
                f"not covered by the equality proof: {told}; a layout may differ because of it", "verify"
            )
        make_open_to(folder, choices.access)
        references.append(_train(planned, reference)[0])
    bound = bound_from(references, FLOOR)
    result = VerifyResult((), asdict(bound), folder)
    for choice in wanted:
        result = _kept(result)  # what was measured, whatever happens to the next layout
        events.note(f"{choice.name} ...", "verify")
        row = _row(config, choice, references[0], bound, events, first)
        result = replace(result, rows=(*result.rows, row))
    return _kept(result)


def _row(
    config: ResolvedConfig,
    choice: LayoutChoice,
    reference: RunFolder,
    bound: Difference,
    events: Events,
    earlier: Planned | None,
) -> VerifyRow:
    """Train one layout, and compare it. What is wrong with it is its verdict: the others are compared all the same.

    Raises:
        _StoppedError: the user has stopped it.
    """
    from dstrain.report.comparison import compare_runs  # numpy

    try:
        planned, layout_config = _plan(config, choice, {}, choice.name, events, earlier)
    except DstrainError as error:  # this model, batch or machine can't have the layout
        return VerifyRow(choice.name, f"refused: {error.message}")
    except OSError as error:
        return VerifyRow(choice.name, f"failed: {error}")
    try:
        run, seconds = _train(planned, layout_config)
        found = compare_runs(run, reference)
    except _StoppedError:
        raise
    except (DstrainError, ValueError, OSError) as error:
        return VerifyRow(choice.name, f"failed: {str(error).splitlines()[0]}")
    verdict = "equal" if found.within(bound) else "DIFFERS"
    return VerifyRow(choice.name, verdict, **asdict(found), seconds=round(seconds, 1))


def _refuse_incomparable(config: ResolvedConfig, shape: ModelShape) -> None:
    """Refuse a model that layouts train alike on average only. Raises DstrainError."""
    if shape.dropout:
        raise DstrainError(
            "the model uses dropout, and which activations it drops depends on the layout",
            where=str(config.origin("model")),
            hint="set the dropout probabilities in its config.json to 0 to compare layouts",
        )
    if shape.adapter_drops_by_layout:
        raise DstrainError(
            "modules of this model are given tokens of unknown samples, and what the adapter drops there depends on"
            " the layout",
            where=str(config.origin("adapter")),
            hint="set adapter.dropout to 0 to compare layouts",
        )
    if shape.randomness is not None:
        raise DstrainError(
            f"the model draws random numbers in training ({describe_randomness(shape)}), which depend on the layout",
            where=str(config.origin("model")),
            hint="set it to 0 in its config.json to compare layouts"
            if shape.randomness
            else "a model of another family",
        )
    if shape.router_loss and config.config.micro_batch is None:
        raise DstrainError(
            "the experts' router loss is computed per micro-batch, whose size would follow from the layout",
            where=str(config.origin("micro_batch")),
            hint="--micro-batch N, one for all layouts",
        )


def _micro_batches(global_batch: int, wanted: int | None) -> list[int]:
    """Three sizes for one process: the sums of a step in three orders."""
    divisors = [size for size in range(1, global_batch + 1) if global_batch % size == 0 and size <= 32]
    first = wanted if wanted in divisors else divisors[len(divisors) // 2]
    return [first, *[size for size in divisors if size != first][:2]]


def _plan(
    resolved: ResolvedConfig,
    choice: LayoutChoice,
    more: dict[str, Any],
    name: str,
    events: Events,
    earlier: Planned | None,
) -> tuple[Planned, ResolvedConfig]:
    config = override(resolved, choice.flags() | {"name": name} | more)
    return plan_for(config, events=events, earlier=earlier), config


class _StoppedError(DstrainError):
    """The user has stopped a run, and so all of them."""


def _train(planned: Planned, config: ResolvedConfig) -> tuple[RunFolder, float]:
    """Run a plan to its end; the run folder, and how many seconds it took. Raises DstrainError."""
    folder = new_run_folder(config, resume=False)
    refuse_full_disk(planned.plan, folder)
    began = time.monotonic()
    outcome = launch(launch_spec(planned, folder), planned, config, folder, lambda: None)
    try:
        result = result_of(outcome, folder, saves=config.config.saves)
    except DstrainError as error:
        if outcome.by_user:
            raise _StoppedError(f"stopped in {folder.name}", exit_code=error.exit_code) from error
        raise
    if not result.completed:
        raise _StoppedError(
            f"stopped after step {result.step} of {folder.name}",
            where=str(folder.path.parent / "verify.md"),
            hint="the layouts before it are compared there",
            exit_code=result.exit_code,
        )
    return folder, time.monotonic() - began


def _kept(result: VerifyResult) -> VerifyResult:
    """The result, whose table is in its folder now; where the disk takes none, the other layouts are compared yet."""
    try:
        _write(result)
    except OSError as error:
        return replace(result, unwritten=os_error_shown(error, exit_code=1))
    return replace(result, unwritten=None)


def _write(result: VerifyResult) -> None:
    """The table as JSON and as Markdown. Raises OSError."""
    rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in result.rows]
    write_json(result.folder / "verify.json", {"bound": dict(result.bound), "layouts": rows})
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in result.cells()]
    lines += ["", "Allowed: 1e-5, or twice the spread of one-process runs with other micro-batches."]
    write_atomically(result.folder / "verify.md", "\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if isinstance(value, float) and value < 0.1 else str(value)


# Sizes by the names that Hugging Face configs use for them; a name that is not there stays away.
_SMALL_SIZES = {
    "num_hidden_layers": 6, "n_layer": 6, "num_layers": 6, "n_layers": 6,
    "hidden_size": 64, "n_embd": 64, "d_model": 64,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128, "moe_intermediate_size": 64,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def shrink_model(resolved: ResolvedConfig, folder: Path) -> Path:
    """Write ``config.json`` of the shrunk model into ``folder``, and return that.

    The vocabulary stays, since the data are tokenised with it. Whether the family can be built so is
    found out when it is measured.
    """
    source = model_config_file(resolved.config.model, where=str(resolved.origin("model")))
    try:
        config: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise DstrainError(
            f"not a model's config: {error}",
            where=str(source),
            hint='a config.json is one JSON object: {"model_type": "llama", ...}',
        ) from None
    for key, size in _SMALL_SIZES.items():
        if isinstance(config.get(key), int):
            config[key] = min(size, config[key])
    blocks = next((config[key] for key in _SMALL_SIZES if key in config), 6)
    for key, value in config.items():
        if key == "layer_types" and isinstance(value, list):
            config[key] = value[:blocks]
    folder.mkdir(parents=True, exist_ok=True)
    # As it was read: Infinity, where it is one, means something to the family.
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder

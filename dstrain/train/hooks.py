"""The hook interface, and the caller of all hooks.

A hook is a class with at most six methods, all optional, which get plain data. It is named in the config
(``hooks: ["my_module:MyHook"]``), made once a launch with its options as keyword arguments, and called on rank 0; with
``every_rank = True`` on all ranks. One that raises ends the run with its name, unless it is optional. The last call of
a launch is either ``on_end`` or ``on_failure``.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dstrain.errors import DstrainError
from dstrain.planning.hook_specs import HookSpec
from dstrain.planning.plan import Plan
from dstrain.plugins import PluginError, load_plugin
from dstrain.runs.run_folder import RunFolder

FAILURE_SECONDS = 15.0
"""So long hooks may take over a failure: the run has to end."""
END_SECONDS = 10.0
"""So long what hooks still do in the background is waited for at the end, all of them together."""


@dataclass(frozen=True)
class StartInfo:
    """Before the first step of a launch.

    Attributes:
        run: the run's name: that of its folder.
        folder: the run folder; a hook may make files and folders in it.
        run_id: 16 hexadecimal digits, the same after a restart or a resume.
        config: every key of the run config, and ``origins``: where each value came from.
        plan: what was decided: model, parameters, layout, batch, device, world size.
        first_step: the step that this launch begins with; above 1 the run resumes from a checkpoint.
        rank, world_size: of this process.
    """

    run: str
    folder: str
    run_id: str
    config: dict[str, Any]
    origins: dict[str, str]
    plan: dict[str, Any]
    first_step: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class StepInfo:
    """After a step: its metrics as in metrics.jsonl (loss, lr, grad_norm, tokens, seconds, memory, ...)."""

    step: int
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ValidationInfo:
    """After a validation, and so after the `StepInfo` of its step. Step 0 is before training.

    ``losses``: by their names in metrics.jsonl. ``tokens``: trained on so far.
    """

    step: int
    losses: dict[str, float]
    tokens: int


@dataclass(frozen=True)
class SaveInfo:
    """A checkpoint is complete; training may be some steps further. Only rank 0 is told."""

    step: int
    path: str


@dataclass(frozen=True)
class FailureInfo:
    """The training failed on this rank. ``step``: the last one that ended. ``error``: why, in a line."""

    step: int
    error: str


@dataclass(frozen=True)
class EndInfo:
    """The launch ends in order.

    ``completed``: whether the run has come to its last step, or leaves before (a signal, a time limit).
    ``result``: what stands in result.json; empty on other ranks than 0 and where the run is not complete.
    """

    step: int
    completed: bool
    result: dict[str, Any]


def start_info(plan: Plan, folder: RunFolder, *, run_id: str, first_step: int, rank: int) -> StartInfo:
    """What the hooks of a rank are told before its first step."""
    layout, batch = plan.layout, plan.batch
    return StartInfo(
        run=folder.name,
        folder=str(folder.path),
        run_id=run_id,
        config=dict(plan.config),
        origins=dict(plan.origins),
        plan={
            "dstrain": plan.dstrain,
            "model": plan.model.type,
            "parameters": plan.model.parameters,
            "device": plan.device,
            "world_size": layout.world_size,
            "pipeline": layout.pipeline,
            "data_parallel": layout.data_parallel,
            "micro_batch": batch.micro_batch,
            "gradient_accumulation": batch.accumulation,
            "tokens_per_step": batch.tokens,
        },
        first_step=first_step,
        rank=rank,
        world_size=layout.world_size,
    )


class Hook:
    """Base of hooks; any class with some of these methods will do.

    Attributes:
        optional: where it raises, this is said once and the run continues without it.
        every_rank: it is made and called on all ranks.
        returns_at_once: ``on_step`` takes no time that a supervisor would have to know of.
        say: tells the user a line: in the rank's log, and for rank 0 on the terminal too.
    """

    optional: ClassVar[bool] = False
    every_rank: ClassVar[bool] = False
    returns_at_once: ClassVar[bool] = False
    say: Callable[[str], None] = staticmethod(print)

    def on_start(self, info: StartInfo) -> None:
        """Before the first step of a launch."""

    def on_step(self, info: StepInfo) -> None:
        """After each step."""

    def on_validation(self, info: ValidationInfo) -> None:
        """After each validation."""

    def on_save(self, info: SaveInfo) -> None:
        """After a checkpoint is complete."""

    def on_failure(self, info: FailureInfo) -> None:
        """When the training failed on this rank, if there is time: a lost rank takes the others with it."""

    def on_end(self, info: EndInfo) -> None:
        """At the end of a launch that did not fail."""

    def wait(self, seconds: float) -> None:
        """For hooks that work in the background: after the last call, end it or give it up within so many seconds."""


@dataclass(frozen=True, eq=False)
class _Named:
    name: str
    hook: Any
    optional: bool


class Hooks:
    """The hooks of one launch on one rank.

    Args:
        say: takes a line for the user.
        busy: tells the supervisor that what happens within is no step, and may take its time.
    """

    def __init__(
        self,
        say: Callable[[str], None] = print,
        busy: Callable[[str], AbstractContextManager[None]] = lambda what: nullcontext(),
    ) -> None:
        self._say = say
        self._busy = busy
        self._hooks: list[_Named] = []
        self._step = 0

    def load(self, specs: Sequence[HookSpec], folders: Sequence[str]) -> None:
        """Make the hooks of this rank. Collective: rank 0 knows which are for every rank, and others import only those.

        Raises:
            DstrainError: one can't be loaded or made, and is not optional.
        """
        if not specs:
            return
        from torch import distributed  # here: a test of a hook needs this file, and no torch

        from dstrain.json_collectives import broadcast_json

        rank = distributed.get_rank()
        everywhere = [self._make(spec, folders) for spec in specs] if rank == 0 else []
        everywhere = broadcast_json(everywhere)
        if rank != 0:
            for spec, wanted in zip(specs, everywhere, strict=True):
                if wanted:
                    self._make(spec, folders)

    def started(self, info: StartInfo) -> None:
        self._step = info.first_step - 1
        self._call("on_start", info)

    def stepped(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._step = step
        if self._hooks:
            self._call("on_step", StepInfo(step, dict(metrics)))

    def validated(self, step: int, losses: Mapping[str, float], tokens: int) -> None:
        self._call("on_validation", ValidationInfo(step, dict(losses), tokens))

    def saved(self, checkpoints: Sequence[tuple[int, Path]]) -> None:
        """These have become complete since it was called last."""
        for step, path in checkpoints:
            self._call("on_save", SaveInfo(step, str(path)))

    @contextmanager
    def told_of_saves(self, completed: Callable[[], Sequence[tuple[int, Path]]]) -> Iterator[None]:
        """Tell the hooks at its end of what has been saved last, unless an error is on its way."""
        yield
        self.saved(completed())

    def failed(self, error: BaseException) -> None:
        """Best effort, in limited time: nothing that a hook does may hide the error or keep the run from ending."""
        text = str(error) if isinstance(error, DstrainError) else f"{type(error).__name__}: {error}"
        info = FailureInfo(self._step, text.split("\n", 1)[0])

        def tell() -> None:
            for each in self._hooks:
                try:
                    _method(each.hook, "on_failure")(info)
                except Exception:
                    print(f"dstrain: hook {each.name} failed in on_failure", flush=True)
                    traceback.print_exc()
            _wait(self._hooks)

        if self._hooks:
            thread = threading.Thread(target=tell, name="hooks", daemon=True)
            thread.start()
            thread.join(FAILURE_SECONDS)

    def ended(self, step: int, completed: bool, result: Mapping[str, Any]) -> None:
        info = EndInfo(step, completed, dict(result))
        all_of_them = list(self._hooks)
        while self._hooks:  # where one raises, those behind it are told of a failure
            self._call_one(self._hooks.pop(0), "on_end", info)
        _wait(all_of_them)

    def _make(self, spec: HookSpec, folders: Sequence[str]) -> bool:
        """Make a hook and keep it; returns whether it is for every rank."""
        optional = bool(spec.optional)
        every_rank = False
        try:
            made_by = load_plugin(spec.name, folders, what="hook")
            optional = bool(getattr(made_by, "optional", False)) if spec.optional is None else spec.optional
            every_rank = bool(getattr(made_by, "every_rank", False))
            hook = made_by(**spec.options)
            if isinstance(hook, Hook):
                hook.say = self._say
            self._hooks.append(_Named(spec.name, hook, optional))
        except Exception as error:
            self._failed_in(spec.name, "__init__", error, optional)
        return every_rank

    def _call(self, method: str, info: Any) -> None:
        for each in list(self._hooks):
            if not self._call_one(each, method, info):
                self._hooks.remove(each)

    def _call_one(self, each: _Named, method: str, info: Any) -> bool:
        """Whether it went well. Raises DstrainError where it did not, and the run can't do without it."""
        quick = method == "on_step" and getattr(each.hook, "returns_at_once", False)
        try:
            with nullcontext() if quick else self._busy(f"hook {each.name}"):
                _method(each.hook, method)(info)
        except Exception as error:
            self._failed_in(each.name, method, error, each.optional)
            return False
        return True

    def _failed_in(self, name: str, where: str, error: Exception, optional: bool) -> None:
        """Say why a hook is left out. Raises DstrainError where the run can't do without it."""
        if isinstance(error, PluginError):  # it says which hook it is
            reason = error.message
        else:
            traceback.print_exc()
            what = error.message if isinstance(error, DstrainError) else f"{type(error).__name__}: {error}"
            reason = f"hook {name} failed in {where}: {what}"
        if not optional:
            hint = "its traceback is in this rank's log; with `optional: true` a run continues without it"
            raise DstrainError(reason, hint=hint, exit_code=1) from error
        self._say(f"{reason}; the run continues without it")


def _wait(hooks: Sequence[_Named]) -> None:
    until = time.monotonic() + END_SECONDS
    for each in hooks:
        if isinstance(each.hook, Hook):
            each.hook.wait(max(0.0, until - time.monotonic()))


def _method(hook: Any, name: str) -> Callable[[Any], None]:
    """A hook's method; one that does nothing where it has none."""
    return getattr(hook, name, None) or (lambda info: None)

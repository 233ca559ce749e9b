"""The hooks of a run: those listed in the config, and those that its short forms stand for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.config.hook_choices import name_of, options_of_tracker
from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.planning.layout import Layout

_TRACKERS = {
    "tensorboard": "dstrain.hooks.tensorboard_tracker:TensorBoardTracker",
    "wandb": "dstrain.hooks.wandb_tracker:WandbTracker",
    "mlflow": "dstrain.hooks.mlflow_tracker:MlflowTracker",
}
_PROFILER = "dstrain.hooks.profiler:Profiler"
# What each needs that does not come with dstrain.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
_SQL = ("sqlalchemy", "alembic")  # for MLflow's database in the run folder
MLFLOW_URI = "MLFLOW_TRACKING_URI"
# Where a tracker sends what it gets. Credentials are not among them: rank 0 finds those on its own host.
_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "tensorboard": (),
    "wandb": ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),
    "mlflow": (MLFLOW_URI, "MLFLOW_EXPERIMENT_NAME"),
}


@dataclass(frozen=True)
class HookSpec:
    """A hook of a run.

    Attributes:
        name: ``module:Class``.
        options: the keyword arguments that it is made with.
        optional: whether the run continues without it if it fails; None: as its class says.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool | None = None


def hooks_of(config: RunConfig) -> tuple[HookSpec, ...]:
    """The hooks in the order in which they are called: dstrain's own, then those from outside."""
    own = [HookSpec(_TRACKERS[name_of(each)], options_of_tracker(each)) for each in config.trackers]
    if config.profile is not None:
        own.append(HookSpec(_PROFILER, config.profile.model_dump()))
    outside = [
        HookSpec(each)
        if isinstance(each, str)
        else HookSpec(each["name"], each.get("options", {}), each.get("optional"))
        for each in config.hooks
    ]
    return (*own, *outside)


def variables_of(config: RunConfig) -> tuple[str, ...]:
    """The environment variables that the run's trackers read, but for credentials."""
    return tuple(name for tracker in config.trackers for name in _VARIABLES[name_of(tracker)])


def refuse_profile(resolved: ResolvedConfig) -> None:
    """Refuse steps that the run does not have. Raises DstrainError."""
    profile, steps = resolved.config.profile, resolved.config.steps
    if profile is not None and profile.steps[1] > steps:
        raise DstrainError(
            f"profile covers steps {profile.steps[0]} to {profile.steps[1]}, but the run has only {steps}",
            where=str(resolved.origin("profile", "steps")),
            hint=f"profile: {{steps: [{max(1, steps - 3)}, {steps}]}}, or more --steps",
        )


def check_profiled_ranks(resolved: ResolvedConfig, layout: Layout) -> None:
    """Refuse ranks that the layout does not have. Raises DstrainError."""
    profile = resolved.config.profile
    if profile is not None and max(profile.ranks) >= layout.world_size:
        raise DstrainError(
            f"profile names rank {max(profile.ranks)}, but the ranks are 0 to {layout.world_size - 1}",
            where=str(resolved.origin("profile", "ranks")),
            hint=f"profile: {{ranks: [{layout.world_size - 1}]}}",
        )


def check_trackers_here(resolved: ResolvedConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse trackers that this machine does not have.

    Raises:
        DstrainError: a package is not installed, or the address of an MLflow server holds a password.
    """
    config = resolved.config
    for name in map(name_of, config.trackers):
        needed = _PACKAGES[name]
        if name == "mlflow":
            _refuse_password(environ)
            options = next(options_of_tracker(each) for each in config.trackers if name_of(each) == name)
            needed += () if options.get("uri") or environ.get(MLFLOW_URI) else _SQL
        missing = [package for package in needed if not is_installed(package)]
        if missing:
            raise DstrainError(
                f"the tracker {name} needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not"
                " installed",
                where=str(resolved.origin("trackers")),
                hint=f"pip install 'dstrain[{name}]', in the environment of rank 0's host",
            )


def is_installed(package: str) -> bool:
    """Whether a Python package is there to be imported; it is not."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder `wandb` of earlier runs is no package


def _refuse_password(environ: Mapping[str, str]) -> None:
    """An address stands in logs and messages. Raises DstrainError where it holds more than that."""
    if "@" in environ.get(MLFLOW_URI, "").partition("//")[2].partition("/")[0]:
        raise DstrainError(
            f"{MLFLOW_URI} contains a user name or password, and addresses are written to logs",
            where=MLFLOW_URI,
            hint="use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials",
        )

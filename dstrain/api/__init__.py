"""The Python API: the use cases of dstrain as functions, for scripts, notebooks and the command line.

Nothing here prints or exits. Errors are `DstrainError`, with what is wrong, the place, and a hint; progress is told to
an `Events` observer. None of it imports torch: what needs it runs in processes of its own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstrain.api.checkpoint_list import CheckpointInfo, checkpoints
    from dstrain.api.data_samples import data_samples
    from dstrain.api.diagnosing import DoctorResult, doctor
    from dstrain.api.events import Events, Step
    from dstrain.api.exporting import ExportResult, MergeResult, export, generate, merge
    from dstrain.api.fitting import FitResult, FitRow, fit
    from dstrain.api.outcome import RunFailedError, RunResult
    from dstrain.api.planning import load_config, plan
    from dstrain.api.rehearsing import RehearsalResult, rehearse
    from dstrain.api.reproducing import ReproduceResult, reproduce
    from dstrain.api.resuming import resume
    from dstrain.api.running import run
    from dstrain.api.submitting import SlurmJob, slurm_job, submit
    from dstrain.api.verifying import VerifyResult, VerifyRow, verify
    from dstrain.config.loader import ConfigError, ResolvedConfig
    from dstrain.errors import DstrainError
    from dstrain.planning.plan import Plan

__all__ = [
    "CheckpointInfo",
    "ConfigError",
    "DoctorResult",
    "DstrainError",
    "Events",
    "ExportResult",
    "FitResult",
    "FitRow",
    "MergeResult",
    "Plan",
    "RehearsalResult",
    "ReproduceResult",
    "ResolvedConfig",
    "RunFailedError",
    "RunResult",
    "SlurmJob",
    "Step",
    "VerifyResult",
    "VerifyRow",
    "checkpoints",
    "data_samples",
    "doctor",
    "export",
    "fit",
    "generate",
    "load_config",
    "merge",
    "plan",
    "rehearse",
    "reproduce",
    "resume",
    "run",
    "slurm_job",
    "submit",
    "verify",
]

_HOMES = {
    "CheckpointInfo": "dstrain.api.checkpoint_list",
    "ConfigError": "dstrain.config.loader",
    "DoctorResult": "dstrain.api.diagnosing",
    "DstrainError": "dstrain.errors",
    "Events": "dstrain.api.events",
    "ExportResult": "dstrain.api.exporting",
    "MergeResult": "dstrain.api.exporting",
    "FitResult": "dstrain.api.fitting",
    "FitRow": "dstrain.api.fitting",
    "Plan": "dstrain.planning.plan",
    "RehearsalResult": "dstrain.api.rehearsing",
    "ReproduceResult": "dstrain.api.reproducing",
    "ResolvedConfig": "dstrain.config.loader",
    "RunFailedError": "dstrain.api.outcome",
    "RunResult": "dstrain.api.outcome",
    "SlurmJob": "dstrain.api.submitting",
    "Step": "dstrain.api.events",
    "VerifyResult": "dstrain.api.verifying",
    "VerifyRow": "dstrain.api.verifying",
    "checkpoints": "dstrain.api.checkpoint_list",
    "data_samples": "dstrain.api.data_samples",
    "doctor": "dstrain.api.diagnosing",
    "export": "dstrain.api.exporting",
    "fit": "dstrain.api.fitting",
    "generate": "dstrain.api.exporting",
    "merge": "dstrain.api.exporting",
    "load_config": "dstrain.api.planning",
    "plan": "dstrain.api.planning",
    "rehearse": "dstrain.api.rehearsing",
    "reproduce": "dstrain.api.reproducing",
    "resume": "dstrain.api.resuming",
    "run": "dstrain.api.running",
    "slurm_job": "dstrain.api.submitting",
    "submit": "dstrain.api.submitting",
    "verify": "dstrain.api.verifying",
}


def __getattr__(name: str) -> Any:
    """Each name is imported when it is first used: a command pays for what it needs, and for nothing else."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

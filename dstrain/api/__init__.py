"""The use cases of dstrain as functions: what the command line calls, and what a script or a notebook may call.

Nothing here prints or exits. Errors are `DstrainError`, with what is wrong, the place, and a hint; progress is told to
an `Events` observer. None of it imports torch: what needs it runs in processes of its own.
"""

from dstrain.api.configuring import load_config
from dstrain.api.diagnosing import DoctorResult, doctor
from dstrain.api.events import Events, Step
from dstrain.api.exporting import ExportResult, export, generate
from dstrain.api.fitting import FitResult, FitRow, fit
from dstrain.api.listing import CheckpointInfo, checkpoints
from dstrain.api.outcome import RunFailedError, RunResult
from dstrain.api.planning import plan
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
    "Plan",
    "ReproduceResult",
    "ResolvedConfig",
    "RunFailedError",
    "RunResult",
    "SlurmJob",
    "Step",
    "VerifyResult",
    "VerifyRow",
    "checkpoints",
    "doctor",
    "export",
    "fit",
    "generate",
    "load_config",
    "plan",
    "reproduce",
    "resume",
    "run",
    "slurm_job",
    "submit",
    "verify",
]

"""dstrain: a configuration-driven trainer on DeepSpeed.

    import dstrain

    config = dstrain.load_config(zero=2, pipeline=4)
    print(dstrain.plan(config).memory_verdict)
    result = dstrain.run(config)

The rooms, in the order in which a run walks through them: ``config`` (what is wanted), ``planning`` and ``estimate``
(what will run), ``launch`` and ``supervise`` (how it starts and ends), ``data``, ``model``, ``engine`` and ``train``
(what each rank does), ``runs`` (what lies in a run folder), ``report`` and ``exporting`` (what came out). ``api`` has
the use cases as functions, and ``cli`` shows them.
"""

from __future__ import annotations

import sys

# `python -m dstrain...` comes here first, with the current folder in front of all other places of modules: a random.py
# there would hide Python's. (sys is part of the interpreter.) In a checkout the folder stays, as the last place.
_named = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
if (
    sys.argv[:1] == ["-m"]  # as long as the module is looked for
    and "".join(_named).startswith("dstrain.")
    and not getattr(sys.flags, "safe_path", False)
):
    _current = sys.path.pop(0)
    if __file__.startswith(_current.rstrip("/") + "/dstrain/"):
        sys.path.append(_current)

from typing import TYPE_CHECKING, Any  # noqa: E402

from dstrain.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from dstrain.api import (
        ConfigError,
        DstrainError,
        Events,
        Plan,
        ResolvedConfig,
        RunFailedError,
        RunResult,
        Step,
        checkpoints,
        data_samples,
        doctor,
        export,
        fit,
        generate,
        load_config,
        merge,
        plan,
        rehearse,
        reproduce,
        resume,
        run,
        verify,
    )

__all__ = [
    "ConfigError",
    "DstrainError",
    "Events",
    "Plan",
    "ResolvedConfig",
    "RunFailedError",
    "RunResult",
    "Step",
    "__version__",
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
    "verify",
]


def __getattr__(name: str) -> Any:
    """The API, imported when it is first used: ``import dstrain`` alone costs nothing."""
    if name in __all__:
        from dstrain import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

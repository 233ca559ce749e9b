"""Where this folder stands in PYTHONPATH, the launcher of a node imports all that its ranks need, and forks them.

A node's launcher is started by ssh, as a new interpreter. Python imports ``sitecustomize`` before all else.
"""

import os
import sys


def _module() -> str | None:
    """Behind ``python [flags] -m``."""
    words = sys.orig_argv
    return words[words.index("-m") + 1] if "-m" in words[1:4] else None


if _module() in ("deepspeed.launcher.launch", "torch.distributed.run"):
    environment = dict(os.environ)
    import tests.support.distributed.workers  # sets the environment in which the others are imported
    from tests.support.forking.becoming import fork_from_here, quick_polls

    fork_from_here()
    quick_polls()
    import tests.support.distributed.preload  # noqa: F401

    os.environ.clear()
    os.environ.update(environment)

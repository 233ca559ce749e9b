"""``python -m dstrain.rehearsal.rank_process REQUEST.json ANSWER.json``: rehearses one rank of a plan.

The order of what it does counts: the variables before DeepSpeed, the guard before torch, and the fake GPU between
transformers, which looks for one as it is imported, and DeepSpeed, which needs one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dstrain.child_process import child_main
from dstrain.files import write_json
from dstrain.planning.layout import Layout
from dstrain.planning.plan import Plan
from dstrain.rehearsal.device_guard import load_device_guard


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dstrain.rehearsal.rank_process REQUEST.json ANSWER.json", file=sys.stderr)
        return 2
    record = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    os.environ.update(_variables(Plan.from_record(record["plan"]).layout, record["rank"]))
    load_device_guard()

    import transformers

    from dstrain.rehearsal.fake_cuda import FakeGpu, FakeMemory, install_fake_cuda

    transformers.PreTrainedModel  # noqa: B018  (it is imported when it is named)
    memory, waits = FakeMemory(), list[Callable[[str], None]]()
    install_fake_cuda(
        FakeGpu.from_record(record["gpu"]), memory, lambda what: waits[0](what) if waits else None
    )

    from dstrain.rehearsal.rehearsed_rank import RehearsedRank, Request

    write_json(Path(argv[1]), RehearsedRank(Request.from_record(record), memory, waits).run())
    sys.stderr.flush()
    os._exit(0)  # torch would take its fake world apart


def _variables(layout: Layout, rank: int) -> dict[str, str]:
    """What a launcher sets."""
    return {
        "DS_ACCELERATOR": "cuda",
        "RANK": str(rank),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_RANK": "0",  # the one fake GPU
        "LOCAL_WORLD_SIZE": str(max(layout.slots)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

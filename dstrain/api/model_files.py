"""Copies of the model's config and of the tokenizer's files in the run folder: small, and needed to repeat the run."""

from __future__ import annotations

from pathlib import Path

from dstrain.data.tokenizer_files import BYTES, TOKENIZER_FILES
from dstrain.files import write_atomically
from dstrain.planning.plan import Plan
from dstrain.runs.run_folder import RunFolder


def keep_model_files(folder: RunFolder, plan: Plan) -> None:
    """Copy them once; what a resumed run finds there stays. Raises OSError."""
    wanted = {"config.json": Path(plan.model.file)}
    if plan.data.tokenizer != BYTES:
        tokenizer = Path(plan.data.tokenizer).expanduser()
        wanted |= {name: tokenizer / name for name in TOKENIZER_FILES}
    for name, source in wanted.items():
        kept = folder.model / name
        if source.is_file() and not kept.exists():
            write_atomically(kept, source.read_bytes())

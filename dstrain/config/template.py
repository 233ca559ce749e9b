"""The commented YAML file that ``dstrain config init`` writes: every key, its meaning and its default."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.config.words import describe_type
from dstrain.config.yaml_reader import dump_yaml
from dstrain.version import __version__

_WIDTH = 100
GROUPS = {
    "model": "Model and data.",
    "steps": "Training length and batch size.",
    "loss": "Loss, optimizer and learning rate.",
    "zero": "Parallelism, precision and memory.",
    "name": "Run folder, checkpoints and launch.",
    "trackers": "Trackers, profiler and hooks.",
    "ds_config": "DeepSpeed keys.",
}
"""The headings, each with the key that it stands in front of: those of `RunConfig`."""

_HEAD = f"""\
# Config of dstrain {__version__}: every key, its meaning and its default.
# `dstrain config check FILE` reports errors, `dstrain plan --config FILE` shows what would run,
# `dstrain run --config FILE` trains. A key that is left out keeps its default.
# Keys in this file override those of a recipe named in it (recipe: NAME).
"""
_EXAMPLES = {"deepspeed": "# deepspeed:\n#   zero_optimization:\n#     reduce_bucket_size: 5.0e+7\n"}


def template() -> str:
    """YAML that means the defaults. Keys whose default is null, which stands for "derived", are commented out."""
    lines = [_HEAD]
    for key, field in RunConfig.model_fields.items():
        if key in GROUPS:
            lines.append(f"\n# --- {GROUPS[key]}\n\n")
        value = field.get_default()
        words = describe_type(field.rebuild_annotation()).removesuffix(" or null").removesuffix(",")
        text = f"{field.description} ({words})" if field.description else words
        lines += [f"# {line}\n" for line in textwrap.wrap(text, _WIDTH - 2)]
        lines.append(_EXAMPLES.get(key) or _line(key, value))
        lines.append("\n")
    return "".join(lines).rstrip("\n") + "\n"


def _line(key: str, value: Any) -> str:
    if value is None:
        return f"# {key}:\n"
    return f"{key}: {json.dumps(value)}\n" if isinstance(value, list) else dump_yaml({key: value})

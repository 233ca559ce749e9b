"""Adapters that are none, that fit no module, or belong to another model."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.support.bad_inputs.row import MEASURED, BadInput, bare, config, run

MERGING = ("dstrain.exporting.merge_adapter",)

# What stands in the section, what is wrong.
_WRONG = [
    ("qlora", "must be 'lora', 'rslora' or 'dora'"),
    ("{type: ia3}", "must be 'lora', 'rslora' or 'dora'"),
    ("5", "must be lora, rslora, dora, none, or a mapping"),
    ("[lora]", "must be lora, rslora, dora, none, or a mapping"),
    ("true", "must be lora, rslora, dora, none, or a mapping"),
    ("{r: 0}", "r: must be greater than 0"),
    ("{r: -8}", "r: must be greater than 0"),
    ("{r: 1.5}", "r: must be an integer"),
    ("{r: true}", "r: must be a number"),
    ("{r: '8'}", "r: must be an integer"),
    ("{alpha: 0}", "alpha: must be greater than 0"),
    ("{alpha: .inf}", "alpha: must be a finite number"),
    ("{dropout: 1}", "dropout: must be less than 1"),
    ("{dropout: -0.1}", "dropout: must be greater than or equal to 0"),
    ("{lora_r: 8}", "lora_r: "),
    ("{targets: []}", "targets"),
    ("{targets: ['']}", "has an empty name"),
    ("{targets: 3}", "targets"),
    ("{exclude: [' ']}", "has an empty name"),
    ("{modules_to_save: lm_head}", "modules_to_save: must be a list"),
    ("{rank_pattern: {q_proj: 0}}", "rank_pattern"),
    ("{alpha_pattern: {q_proj: big}}", "alpha_pattern"),
    ("{targets: '(q_proj'}", "is no regular expression"),
    ("{rank_pattern: {'*q': 3}}", "is no regular expression"),
    ("{init: pissa}", "init: must be 'default', 'gaussian' or 'orthogonal'"),
    ("{init: orthogonal, r: 3}", "init: orthogonal needs an even r"),
    ("{init: orthogonal, base: 4bit}", "orthogonal is not made by PEFT beside quantized weights"),
    ("{base: 2bit}", "base: must be '4bit' or '8bit'"),
    ("{base: true}", "base: must be '4bit' or '8bit'"),
    ("{from: ''}", "from: must name a folder"),
    ("{from: 3}", "from: must be a string"),
    ("{type: dora, target_parameters: [x]}", "dora adapts linear layers alone"),
    ("{dropout: 0.1, target_parameters: [x]}", "target_parameters has no dropout"),
]


def _measured(section: str, reason: str, hint: str) -> BadInput:
    return run("--set", f"adapter={section}", place="adapter", reason=reason, hint=hint, looked=MEASURED)


def _safetensors(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A file of zeros in fp32."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "model",
    "r": 2,
    "target_modules": ["q_proj"],
}
_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora"


def _merge(
    files: dict[str, object], place: str, reason: str, hint: str, *more: str, looked: bool = True
) -> BadInput:
    return bare(
        *("merge", "a", "out", *more),
        files=files,
        place=place,
        reason=reason,
        hint=hint,
        looked=MERGING if looked else (),
    )


ADAPTERS: dict[str, BadInput] = {
    **{
        f"adapter section: {section}": config(f"adapter: {section}\n", 1, reason, "train low-rank adapters")
        for section, reason in _WRONG
    },
    "adapter: targets that match nothing": _measured("{targets: [nope]}", "'nope'", "all-linear"),
    "adapter: an expression that matches nothing": _measured("{targets: 'x.*y'}", "x.*y", "all-linear"),
    "adapter: everything excluded": _measured("{exclude: '.*'}", "excluded", "all-linear"),
    "adapter: one target of two that matches nothing": _measured("{targets: [q_proj, qq]}", "'qq'", "last parts"),
    "adapter: a parameter that there is not": _measured(
        "{targets: [q_proj], target_parameters: [experts.nope]}", "experts.nope", "target_parameters"
    ),
    "adapter: excluded is what there is not": _measured("{exclude: [head]}", "'head'", "names look like"),
    "adapter: a rank for what is not adapted": _measured("{rank_pattern: {lm_head: 4}}", "'lm_head'", "last parts"),
    "adapter: an alpha for nothing": _measured("{alpha_pattern: {q: 4}}", "'q'", "names look like"),
    "adapter: a module to save that there is not": _measured(
        "{modules_to_save: [score]}", "no module of llama is named 'score'", "names look like model."
    ),
    "adapter: and freeze": run(
        *("--adapter", "lora", "--set", "freeze=['*mlp*']"),
        place="--set freeze",
        reason="nothing else to freeze",
        hint="adapter.exclude",
        looked=MEASURED,
    ),
    "adapter: a stage without one": run(
        *("--set", "adapter={targets: '.*layers.0.*q_proj'}", "--pipeline", "2", "--partition", "1,1"),
        place="--set adapter",
        reason="would have only frozen parameters",
        hint="all-linear",
        looked=MEASURED,
    ),
    "--adapter: unknown": run("--adapter", "qlora", place="--adapter", reason="qlora", hint="lora"),
    "--adapter-r: 0": run("--adapter-r", "0", place="--adapter-r", reason="0 is not in the range", hint="x>=1"),
    "merge: no folder": _merge({}, "adapter_config.json", "is not an adapter folder", "dstrain export", looked=False),
    "merge: no JSON": _merge(
        {"a/adapter_config.json": "{"}, "adapter_config.json", "can't be read", "dstrain export", looked=False
    ),
    "merge: no base": _merge(
        {"a/adapter_config.json": {"peft_type": "LORA"}}, "adapter_config.json", "can't be read", "dstrain export",
        looked=False,
    ),
    "merge: a base that is not there": _merge(
        {"a/adapter_config.json": _CONFIG}, "--base", "nowhere is not a model folder", "--base MODEL",
        *("--base", "./nowhere"), looked=False,
    ),
    "merge: OUT is taken": _merge(
        {"a/adapter_config.json": _CONFIG, "out/x": "x"}, "OUT", "out is not empty", "does not exist yet",
        looked=False,
    ),
}  # fmt: skip

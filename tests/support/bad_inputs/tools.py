"""Machines that are not here, and the commands that look at configs."""

from __future__ import annotations

from tests.support.bad_inputs.row import FIFO, GOOD, bare

_RUN = {"runs/x/config.yaml": "steps: 3\n"}

DESCRIBED = {
    "device: mistyped": bare(
        "plan", "--device", "h100-80", place="--device", reason="unknown device"
        " 'h100-80'", hint="did you mean h100-80g?"
    ),
    "device: none": bare("plan", "--device", "", place="--device", reason="unknown device ''", hint="known: a100-40g"),
    "device: no file": bare(
        "plan", "--device", "none.yaml", place="--device", reason="there is no file none.yaml", hint="check the path"
    ),
    "device: a folder": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": None}, place="--device", reason="is a folder", hint="name a file"
    ),
    "device: a pipe": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": FIFO}, place="--device", reason="is a pipe", hint="to a file"
    ),
    "device: empty": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": ""},
        place="d.yaml", reason="the file is empty", hint="KEY: VALUE",
    ),
    "device: an unknown key": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": "kind: cuda\nmemory_byte: 3\n"},
        place="d.yaml:2", reason="unknown key 'memory_byte'", hint="memory",
    ),
    "device: a missing key": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": "kind: cuda\n"},
        place="d.yaml", reason="names is missing", hint="ds_configs/devices",
    ),
    "device: broken": bare(
        "plan", "--device", "d.yaml", files={"d.yaml": "kind: [cuda\n"},
        place="d.yaml:2", reason="not valid YAML", hint="close the bracket",
    ),
    "device: a precision that it does not have": bare(
        "plan", *GOOD, "--device", "v100-16g", "--precision", "bf16",
        place="--precision", reason="v100-16g can't compute in bf16", hint="fp16",
    ),
    "device: for a run": bare(
        "run", "--device", "h200", place="--device", reason="No such option", hint="run --help"
    ),
    "devices of a node without a device": bare(
        "plan", "--gpus-per-node", "4", place="--gpus-per-node", reason="requires --device", hint="--device NAME"
    ),
    "no devices of a node": bare(
        "plan", "--device", "h200", "--gpus-per-node", "0", place="--gpus-per-node", reason="x>=1", hint="plan --help"
    ),
    "devices, and a hostfile that is not there": bare(
        "plan", "--device", "h200", "--hostfile", "none", place="none", reason="hostfile not found", hint="name slots=N"
    ),
}  # fmt: skip

CONFIGS = {
    "explain: mistyped": bare(
        "plan", "--explain", "gradient_cliping",
        place="--explain", reason="'gradient_cliping'", hint="did you mean gradient_clipping?",
    ),
    "config init: over a file": bare(
        "config", "init", "c.yaml", files={"c.yaml": "steps: 3\n"},
        place="FILE", reason="c.yaml already exists", hint="another file",
    ),
    "config init: in a folder that is not there": bare(
        "config", "init", "none/c.yaml", place="FILE", reason="none/c.yaml", hint="folder"
    ),
    "config check: no file": bare("config", "check", place="FILE", reason="Missing argument", hint="check --help"),
    "config diff: one": bare("config", "diff", "x", files=_RUN, place="RUN_B", reason="Missing", hint="diff --help"),
    "config diff: nothing there": bare(
        "config", "diff", "a", "x", files=_RUN, place="RUN", reason="'a' is not a run folder",
        hint="run folders in runs/: x"
    ),
    "config diff: a spoilt one": bare(
        "config", "diff", "c.yaml", "x", files=_RUN | {"c.yaml": "stpes: 3\n"},
        place="c.yaml:1", reason="'stpes'", hint="did you mean steps?",
    ),
}  # fmt: skip

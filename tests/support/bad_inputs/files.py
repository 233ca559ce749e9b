"""Files that are no config, hostfile or DeepSpeed JSON: broken, in other encodings, or no files at all."""

from __future__ import annotations

from tests.support.bad_inputs.row import FIFO, BadInput, config, run

_FORM = "KEY: VALUE lines"
_BILLION = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)

YAML = {
    "key twice": config("lr: 1\nlr: 2\n", 2, "duplicate key 'lr' (first defined on line 1)", "remove one of the two"),
    "key twice, far apart": config(
        "steps: 3\nlr: 0.1\nsteps: 4\n", 3, "duplicate key 'steps' (first defined on line 1)", "remove one"
    ),
    "key twice inside": config(
        "deepspeed:\n  aio:\n    block_size: 1\n    block_size: 2\n", 4, "duplicate key 'deepspeed.aio.block_size'",
        "remove one"
    ),
    "tab": config("steps: 3\n\tlr: 1\n", 2, "'\\t'", "spaces, not with tabs"),
    "tab inside": config("deepspeed:\n\taio: {}\n", 2, "'\\t'", "spaces, not with tabs"),
    "two colons": config("steps: 3: 4\n", 1, "mapping values are not allowed", "quote a text"),
    "bracket left open": config(
        "steps: 3\nbetas: [0.1\nlr: 1\n", 3, "not valid YAML", "close the bracket [ of line 2"
    ),
    "brace left open": config("deepspeed: {a: 1\n", 2, "not valid YAML", "close the brace { of line 1"),
    "quote left open": config('steps: 3\nprompt: "def\nlr: 1\n', 4, "end of stream", "close the quote of line 2"),
    "other indentation": config("deepspeed:\n    aio: {}\n  fp16: {}\n", 3, "not valid YAML", "same indentation"),
    "no space behind the colon": config("steps:3\n", 1, "expected KEY: VALUE", _FORM),
    "= for a colon": config("steps = 3\n", 1, "expected KEY: VALUE", _FORM),
    "a list at the top": config("- steps\n- lr\n", 1, "expected KEY: VALUE", _FORM),
    "words": config("# only words\nsteps 3\n", 2, "expected KEY: VALUE", _FORM),
    "a number": config("42\n", 1, "expected KEY: VALUE", _FORM),
    "JSON lines": config('{"steps": 3}\n{"lr": 1}\n', 2, "not valid YAML", _FORM),
    "a set at the top": config("!!set {lr, steps}\n", 1, "expected KEY: VALUE", _FORM),
    "a number as key": config("1: 2\n", 1, "a key must be a string", "KEY: VALUE"),
    "a list as key": config("[a, b]: 2\n", 1, "a key must be a string", "KEY: VALUE"),
    "true as key inside": config("deepspeed:\n  true: 1\n", 2, "a key must be a string", "KEY: VALUE"),
    "an anchor that holds itself": config("deepspeed: &a\n  b: *a\n", 2, "refers to itself", "write the value out"),
    "a list that holds itself": config("freeze: &a [x, *a]\n", 1, "refers to itself", "write the value out"),
    "aliases of aliases of aliases": config(_BILLION, 6, "more than 100,000 values", "write the value out"),
    "an alias of nothing": config("steps: *many\n", 1, "undefined alias", "&NAME"),
    "a tag of Python": config("prompt: !!python/object:os.system x\n", 1, "not valid YAML", "remove the tag"),
    "a tag of its own": config("steps: !many 3\n", 1, "not valid YAML", "remove the tag"),
    "a tag that is not true": config("steps: !!int many\n", 1, "not a valid int", "remove the tag"),
    "a tag of nothing": config("steps: !!int\n", 1, "not a valid int", "remove the tag"),
    "a date that is none": config("prompt: !!timestamp 2020-99-99\n", 1, "not a valid timestamp", "remove the tag"),
    "a truth that is none": config("pack: !!bool maybe\n", 1, "not a valid bool", "remove the tag"),
    "two documents": config("steps: 1\n--- \nsteps: 2\n", 2, "single document", "a file holds one config"),
    "a number of 5,000 digits": config("lr: 1\nsteps: " + "9" * 5000 + "\n", 2, "5,000 digits", "smaller number"),
    "5,000 hexadecimal digits": config("steps: 0x" + "f" * 5000 + "\n", 1, "5,002 digits", "smaller number"),
    "brackets in brackets": config("betas: " + "[" * 5000 + "\n", None, "brackets are nested too deeply", _FORM),
    "control character": config("prompt: a\x07b\n", 1, "'\\x07'", "as an escape"),
    "escape sequence": config("steps: 3\nprompt: \x1b[31m\n", 2, "'\\x1b'", "as an escape"),
    "merged with a number": config("<<: 3\n", 1, "not valid YAML", _FORM),
    "empty": config("", None, "empty", _FORM),
    "blank": config("\n\n", None, "empty", _FORM),
    "only comments": config("# steps: 3\n", None, "empty", _FORM),
    "only dashes": config("---\n", 2, "expected KEY: VALUE", _FORM),
    "recipe that is not there": config("recipe: nothing\n", 1, "no recipe 'nothing'", "quickstart"),
    "recipe that is a number": config("steps: 1\nrecipe: 5\n", 2, "recipe must be a name", "quickstart"),
    # --- encodings
    "UTF-16": config("steps: 3\n".encode("utf-16"), 1, "UTF-16, not UTF-8", "iconv -f UTF-16"),
    "UTF-16, the other way round": config(b"\xfe\xff\0s\0t", 1, "UTF-16, not UTF-8", "iconv"),
    "UTF-32": config("steps: 3\n".encode("utf-32"), 1, "UTF-32, not UTF-8", "iconv -f UTF-32"),
    "Latin-1": config("steps: 3\nprompt: caf\xe9\n".encode("latin-1"), 2, "byte 0xe9", "iconv -f WINDOWS-1252"),
    "a NUL": config(b"steps: 3\nprompt: a\x00b\n", 2, "binary", "the right file"),
    "a program": config(b"\x7fELF\x02\x01\x01\0\0", 1, "binary", "the right file"),
    "half a character": config("prompt: é".encode()[:-1], 1, "not UTF-8", "save it as UTF-8"),
}  # fmt: skip

# What names a file, and by what place the message calls it.
_FLAGS = {"--config": "--config", "--ds-config": "--ds-config", "--hostfile": "hostfile"}


def _no_files(flag: str, place: str) -> dict[str, BadInput]:
    def row(name: str, reason: str, hint: str, files: dict[str, object]) -> BadInput:
        return run(flag, name, place=place, reason=reason, hint=hint, files=files)

    return {
        f"{flag}: a folder": row("d", "d is a folder", "name a file in it", {"d": None}),
        f"{flag}: a pipe": row("p", "p is a pipe", "write the text to a file", {"p": FIFO}),
        f"{flag}: a device": row("/dev/zero", "/dev/zero is a device", "write the text to a file", {}),
        f"{flag}: too large": row("big", "big has 2 MB", "the right file", {"big": b"#\n" * 1_000_000}),
    }


NO_FILES = {
    **{name: row for flag, place in _FLAGS.items() for name, row in _no_files(flag, place).items()},
    "--config: nothing of this name": run(
        "--config", "none.yaml", place="--config", reason="there is no file none.yaml", hint="check the path"
    ),
    "--config: almost the name": run(
        "--config", "mine.yml", place="--config", reason="there is no file mine.yml", hint="did you mean mine.yaml?",
        files={"mine.yaml": "steps: 3\n"},
    ),
    "--config: no name": run("--config", "", place="--config", reason="is a folder", hint="name a file"),
    "--config: a link to itself": run(
        "--config", "loop", place="--config", reason="symbolic links", hint="check the path",
        files={"loop": "-> loop"}
    ),
    "--config: below a file": run(
        "--config", "f/c.yaml", place="--config", reason="Not a directory", hint="check the path", files={"f": "x"}
    ),
    "--config: a name of 5,000 letters": run(
        "--config", "n" * 5000, place="--config", reason="name too long", hint="check the path"
    ),
    "--config: control characters in its name": run(
        "--config", "a\nb\x1b[31m", place="--config", reason=r"'a\nb\x1b[31m'", hint="check the path"
    ),
    "--recipe: nothing of this name": run(
        "--recipe", "quickstrat", place="--recipe", reason="no recipe 'quickstrat'", hint="did you mean quickstart?"
    ),
    "--recipe: a path": run("--recipe", "../models/x", place="--recipe", reason="no recipe", hint="--config FILE"),
    "--ds-config: nothing of this name": run(
        "--ds-config", "none.json", place="--ds-config", reason="there is no file none.json", hint="check the path"
    ),
    "--hostfile: nothing of this name": run(
        "--hostfile", "none", place="none", reason="hostfile not found", hint="name slots=N"
    ),
    "--hostfile: no name": run("--hostfile", "", place="hostfile", reason="is a folder", hint="name a file"),
}  # fmt: skip


def _hosts(text: str | bytes, line: int, reason: str, hint: str) -> BadInput:
    return run("--hostfile", "h", place=f"h:{line}: ", reason=reason, hint=hint, files={"h": text})


# One row for each message of dstrain/launch/hosts.py; tests/unit/test_launch_hosts.py has many more lines for them.
HOSTFILES = {
    "hostfile: empty": _hosts("", 1, "lists no hosts", "name slots=N"),
    "hostfile: only comments": _hosts("# n1 slots=4\n", 1, "lists no hosts", "name slots=N"),
    "hostfile: bare host": _hosts("# ours\nnode1\n", 2, "node1 has no slots", "node1 slots=N"),
    "hostfile: host twice": _hosts("a slots=1\na slots=1\n", 2, "first listed on line 1", "one line"),
    "hostfile: host twice, short and full": _hosts(
        "n1 slots=1\nn1.example.com slots=1\n", 2, "as n1", "one line"
    ),
    "hostfile: no host name": _hosts("n1;reboot slots=4\n", 1, "not a host name", "letters, digits"),
    "hostfile: a user": _hosts("me@n1 slots=4\n", 1, "not a host name", "~/.ssh/config"),
    "hostfile: IPv6": _hosts("2001:db8::1 slots=1\n", 1, "not a host name", "IPv6"),
    "hostfile: another key": _hosts("n1 gpus=4\n", 1, "expected slots=N, found 'gpus=4'", "n1 slots=N"),
    "hostfile: no slots": _hosts("n1 slots=0\n", 1, "slots=0 is not a number", "1 or more"),
    "hostfile: slots in words": _hosts("n1 slots=all\n", 1, "slots=all is not a number", "whole number"),
    "hostfile: more than one thing": _hosts("n1 slots=4 max_slots=8\n", 1, "unexpected text", "n1 slots=4"),
    "hostfile: UTF-16": _hosts("n1 slots=4\n".encode("utf-16"), 1, "UTF-16", "iconv"),
    "hostfile: Latin-1": _hosts(b"n1 slots=4\nn\xe9 slots=4\n", 2, "byte 0xe9", "UTF-8"),
}  # fmt: skip


def _json(text: object, place: str, reason: str, hint: str) -> BadInput:
    return run("--ds-config", "d.json", place=place, reason=reason, hint=hint, files={"d.json": text})


JSON = {
    "ds-config: broken": _json('{\n"a": 1,\n}', "d.json:3", "not valid JSON", "no trailing commas"),
    "ds-config: comments": _json('{\n// mine\n"a": 1}', "d.json:2", "not valid JSON", "no comments"),
    "ds-config: YAML": _json("zero_optimization:\n  stage: 2\n", "d.json:1", "not valid JSON", "double quotes"),
    "ds-config: empty": _json("", "d.json", "not valid JSON", "JSON"),
    "ds-config: a list": _json("[1, 2]", "d.json", "a JSON object", '{"KEY": VALUE'),
    "ds-config: key twice": _json('{"aio": {},\n"aio": {}}', "d.json:2", "duplicate key 'aio'", "remove one"),
    "ds-config: NaN": _json('{"gradient_clipping": NaN}', "d.json", "NaN is not JSON", "a number"),
    "ds-config: Infinity": _json('{"a": -Infinity}', "d.json", "Infinity is not JSON", "a number"),
    "ds-config: UTF-16": _json("{}".encode("utf-16"), "d.json", "UTF-16", "iconv"),
    "ds-config: binary": _json(b"\x89PNG\r\n\0", "d.json", "not UTF-8", "UTF-8"),
    "ds-config: brackets in brackets": _json('{"a": ' + "[" * 100_000, "d.json", "nested too deeply", "JSON"),
    "ds-config: a number of 5,000 digits": _json(
        '{"a": ' + "9" * 5000 + "}", "d.json", "a number with 5,000 digits", "a number"
    ),
    "ds-config: a contradiction": _json(
        {"zero_optimization": {"stage": 2}}, "d.json", "zero_optimization.stage = 2 contradicts 1", "--set zero=2"
    ),
    "ds-config: an optimizer's learning rate": _json(
        '{"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}', "d.json:1", "which follows from lr = ",
        "set lr instead (--set lr=3e-05"
    ),
    "ds-config: an optimizer's betas": _json(
        '{"optimizer": {"params": {"betas": [0.9, 0.98]}}}', "d.json:1", "which follows from betas = ",
        "--set betas=[0.9, 0.98]"
    ),
    "ds-config: a scheduler's warm-up": _json(
        '{"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}}', "d.json:1",
        "warmup_steps = ", "--set warmup_steps="
    ),
    "ds-config: a block replaced": _json(
        {"zero_optimization": None}, "d.json", "zero_optimization must be a block of keys, not null",
        "zero_optimization"
    ),
    "ds-config: a typo": _json(
        '{\n "gradient_cliping": 1.0\n}', "d.json:2", "'gradient_cliping'", "did you mean gradient_clipping?"
    ),
    "ds-config: a typo inside": _json(
        '{\n "zero_optimization": {\n  "overlap_com": true}\n}', "d.json:3", "'overlap_com'", "overlap_comm?"
    ),
}  # fmt: skip

_DEEPSPEED = [
    # YAML below deepspeed:, line, what is wrong, what mends it
    ("  gradient_cliping: 1.0\n", 2, "'gradient_cliping'", "did you mean gradient_clipping?"),
    ("  stage: 2\n", 2, "'stage'", "zero_optimization"),
    ("  zero_optimization:\n    overlap_com: true\n", 3, "'overlap_com'", "overlap_comm?"),
    ("  zero_optimization:\n    overlap_comm: maybe\n", 3, "must be a boolean", "overlap the reduction"),
    ("  zero_optimization:\n    reduce_bucket_size: many\n", 3, "must be an integer", "Number of elements"),
    ("  zero_optimization: 2\n", 2, "must be a block of keys, not 2", "sets one of them"),
    ("  zero_optimization:\n    stage: 3\n", 3, "contradicts 1", "--set zero="),
    ("  zero_optimization:\n    cpu_offload: true\n", 3, "cpu_offload is deprecated", "--offload cpu"),
    ("  fp16:\n    loss_scal: 0\n", 3, "'loss_scal'", "loss_scale?"),
    ("  bf16:\n    enabled: true\n", 3, "bf16.enabled", "precision"),
    ("  optimizer:\n    type: Lion\n", 3, "optimizer", "--set optimizer="),
    ("  scheduler:\n    type: WarmupLR\n", 3, "scheduler", "lr_schedule"),
    ("  train_batch_size: 7\n", 2, "train_batch_size = 7 contradicts", "--set global_batch="),
    ("  train_micro_batch_size_per_gpu: 7\n", 2, "contradicts", "--set micro_batch="),
    ("  gradient_accumulation_steps: 7\n", 2, "contradicts", "micro_batch"),
    ("  gradient_clipping: 7\n", 2, "contradicts", "--set gradient_clipping="),
    ("  wall_clock_breakdown: true\npipeline: 2\n", 2, "wall_clock_breakdown", "remove it"),
    ("  steps_per_print: often\n", 2, "must be an integer", "progress lines"),
    ("  amp:\n    enabled: true\n", 2, "amp was removed", "bf16"),
    ("  micro_batch: 4\n", 2, "'micro_batch'", "--set micro_batch"),
]
DEEPSPEED = {
    f"deepspeed: {' '.join(text.split())}": run(
        "--config",
        "c.yaml",
        place=f"c.yaml:{line}: ",
        reason=reason,
        hint=hint,
        files={"c.yaml": f"deepspeed:\n{text}"},
    )
    for text, line, reason, hint in _DEEPSPEED
}

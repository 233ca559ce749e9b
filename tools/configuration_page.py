"""docs/configuration.md: every key of the run config with its type, default, flag and meaning.

``python -m tools.configuration_page > docs/configuration.md`` writes it; tests/unit/test_docs.py keeps it current.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from dstrain.cli.run import command as run_command
from dstrain.config.files import recipes
from dstrain.config.schema import RunConfig
from dstrain.config.template import GROUPS, describe_type

_HEAD = """\
# Configuration reference

<!-- Written by `make docs` from dstrain/config/schema.py. Do not edit. -->

A run is described by a flat YAML file, by flags, or by both. Every key below has the same name everywhere:
`global_batch` in YAML and in Python, `--global-batch` on the command line, `--set KEY=VALUE` for keys without a flag.

```yaml title="my-run.yaml"
model: llama-1b
data: my-texts/
seq_len: 2048

steps: 2000
global_batch: 64
lr: 3.0e-4
warmup_steps: 100

precision: bf16
zero: 1
pipeline: 4

deepspeed:                     # DeepSpeed keys that no key of dstrain decides
  zero_optimization:
    reduce_bucket_size: 100000000
```

```console
$ dstrain run --config my-run.yaml --name first
```

## Precedence

Later layers override earlier ones:

1. the defaults on this page;
2. the recipe: the key `recipe` of the file, or `--recipe NAME` ({recipes}). Without `--config` and `--recipe`, the
   recipe `quickstart` is used. With `init: pretrained` and no recipe named it is `fine-tune`, also below a file: its
   learning rate is one for pretrained weights;
3. the file given with `--config`;
4. `--set KEY=VALUE`, which reaches every key, `--set deepspeed.A.B=VALUE` included; of two values for one key
   the last one counts;
5. flags.

DeepSpeed's JSON is composed by the plan. The file given with `--ds-config` is laid on top of it, and the keys below
`deepspeed` on top of that.

Every value keeps its origin. `dstrain plan` shows it, and so do `config.yaml` in the run folder and
`dstrain config show --origins`.

## Commands

```console
$ dstrain config init full.yaml                # a file with every key, its meaning and its default
$ dstrain config check my-run.yaml             # reports all mistakes at once, including those in DeepSpeed's keys
$ dstrain config schema > dstrain.schema.json  # JSON Schema, for completion in an editor
$ dstrain config show --zero 2 --origins       # DeepSpeed's JSON with the origin of each key
$ dstrain config diff first second             # what differs between two runs
```

To use the schema in an editor, start the file with `# yaml-language-server: $schema=dstrain.schema.json`.

## Validation

Unknown keys, duplicate keys and values of the wrong type are refused before anything starts, with the file, the line
and the nearest valid name. That includes DeepSpeed's own keys, at every depth:

```console
$ dstrain plan --set deepspeed.gradient_cliping=1.0
```

```text
error: --set deepspeed.gradient_cliping: DeepSpeed has no key 'gradient_cliping'
  hint: did you mean gradient_clipping?
```

A DeepSpeed key that is decided by a key of dstrain (`train_batch_size` by `global_batch`, for example) may be repeated
with the same value, but not changed.

## Environment variables

| Variable | Meaning |
| --- | --- |
| `DSTRAIN_CACHE` | folder for tokenized data and measured model shapes; default: `~/.cache/dstrain` |
| `DS_ACCELERATOR` | `cpu` or `cuda`: which device to use where both are available |
| `CUDA_VISIBLE_DEVICES` | which GPUs to use, by number |
| `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN` | as in Hugging Face's own libraries |
"""


def page() -> str:
    """The page as Markdown."""
    flags = {str(option.name): option for option in run_command.params if isinstance(option, click.Option)}
    lines = [_HEAD.replace("{recipes}", ", ".join(f"`{name}`" for name in recipes()))]
    for key, field in RunConfig.model_fields.items():
        if key in GROUPS:
            lines.append(f"\n## {GROUPS[key].rstrip('.')}\n")
        lines += _entry(key, field, flags)
    return "".join(lines)


def _entry(key: str, field: FieldInfo, flags: Mapping[str, click.Option], depth: int = 3) -> Iterator[str]:
    yield f"\n{'#' * depth} `{key}`\n\n{_sentence(field.description)}\n"
    kind = describe_type(field.rebuild_annotation()).removesuffix(" or null").removesuffix(",")
    facts = {"Type": kind, "Default": _default(field)}
    facts["Flag" if key in flags else "Set with"] = (
        _flag(flags[key]) if key in flags else f"`--set {key}=...`"
    )
    old = _old_names(field, key)
    if old:
        facts["Deprecated name"] = ", ".join(f"`{name}`" for name in old)
    yield "\n" + "".join(f"- {name}: {value}\n" for name, value in facts.items() if value)
    section = field.annotation
    if isinstance(section, type) and issubclass(section, BaseModel):
        for inner, inner_field in section.model_fields.items():
            yield from _entry(f"{key}.{inner_field.alias or inner}", inner_field, flags, depth + 1)


def _sentence(text: str | None) -> str:
    """The description with a capital letter and a full stop."""
    text = (text or "").strip().replace("*", r"\*")
    first = text.split(" ")[0]
    start = first if first.endswith(",") else first[:1].upper() + first[1:]  # "sdpa, eager, ..." lists values
    return f"{start}{text[len(first) :]}{'' if text.endswith('.') else '.'}" if text else ""


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _flag(option: click.Option) -> str:
    """``--pack`` / ``--no-pack``."""
    return " / ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def _old_names(field: FieldInfo, key: str) -> list[str]:
    """Other names by which the key is still accepted."""
    alias = field.validation_alias
    names = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return [name for name in names if isinstance(name, str) and name != key]


if __name__ == "__main__":
    print(page(), end="")

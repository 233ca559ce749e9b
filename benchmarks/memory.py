"""Whether a GPU holds what the plan says: python -m benchmarks.memory [--model llama-1b] [--out TABLE.md]

For ZeRO 0 to 3, with and without activation checkpointing, a few steps are trained with `dstrain run` on this
machine's GPUs, and the plan's memory of the fullest rank is put beside ``torch.cuda.max_memory_allocated`` of the
fullest rank. A layout that the plan says does not fit is not tried, and stands in the table as such.

Weights are random and the text is made up: neither changes what is allocated. The table names date, versions and card.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain import __version__
from dstrain.formatting import format_bytes
from dstrain.launch.devices import local_devices
from tests.support.materials import write_sums

STEPS = 4
"""The first step makes the optimizer's state; the fullest moment comes after it."""


@dataclass(frozen=True)
class Case:
    """One layout. Without ZeRO DeepSpeed trains in fp32 only."""

    zero: int
    checkpointing: bool

    @property
    def precision(self) -> str:
        return "bf16" if self.zero else "fp32"

    def __str__(self) -> str:
        return f"ZeRO-{self.zero}, {self.precision}" + (", recomputing" if self.checkpointing else "")


@dataclass(frozen=True)
class Found:
    """Bytes of the fullest rank: of each class as predicted, predicted at the fullest moment, and measured."""

    classes: dict[str, int]
    predicted: int
    measured: int | None
    why_not: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="llama-1b", help="a shape of ds_configs/models/, or a model folder"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--data-parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--out", type=Path, help="write the table there too")
    asked = parser.parse_args(arguments)
    devices = local_devices()
    if devices.kind != "cuda":
        print("this needs a machine with an NVIDIA GPU, and none was found here", file=sys.stderr)
        return 2
    cases = [Case(zero, checkpointing) for zero in range(4) for checkpointing in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        found = {case: run(case, asked, Path(folder)) for case in cases}
    text = table(asked, ", ".join(sorted(set(devices.names))), found)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    return 0


def flags_of(case: Case, asked: argparse.Namespace, folder: Path) -> list[str]:
    """The arguments of `dstrain run` and `dstrain plan` for a case."""
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        write_sums(corpus)
    return [
        *("--model", asked.model, "--data", str(corpus), "--zero", str(case.zero), "--pipeline", "1"),
        *("--data-parallel", str(asked.data_parallel), "--precision", case.precision),
        *("--seq-len", str(asked.seq_len), "--micro-batch", str(asked.micro_batch)),
        *("--global-batch", str(4 * asked.micro_batch * asked.data_parallel), "--steps", str(STEPS)),
        "--activation-checkpointing" if case.checkpointing else "--no-activation-checkpointing",
        *("--set", "save_every=0", "--set", "eval_every=0", "--set", "save_weights=false"),
        *("--set", "prompt=''", "--set", "tokenizer=bytes"),
    ]


def run(case: Case, asked: argparse.Namespace, folder: Path) -> Found:
    """Plan the case, and train it if it fits."""
    flags = flags_of(case, asked, folder)
    planned = _dstrain("plan", *flags, "--json")
    if planned.returncode:
        return Found({}, 0, None, planned.stderr.strip().splitlines()[0])
    plan = json.loads(planned.stdout)
    need = max(plan["stage_memory"], key=total)
    classes = {name: need[name] for name in need if name not in ("host", "together", "total")}
    if plan.get("memory_bytes") and total(need) > plan["memory_bytes"]:
        return Found(classes, total(need), None, "does not fit")
    runs = folder / str(case).replace(" ", "-").replace(",", "")
    trained = _dstrain("run", *flags, "--set", f"runs_dir={runs}", "--set", "name=memory")
    records = [
        json.loads(line) for file in runs.rglob("metrics.jsonl") for line in file.open(encoding="utf-8")
    ]
    if trained.returncode or not records:
        return Found(classes, total(need), None, (trained.stderr.strip().splitlines() or ["it failed"])[-1])
    return Found(classes, total(need), max(record.get("memory", 0) for record in records))


def total(need: dict[str, Any]) -> int:
    """Bytes at the fullest moment, from the JSON of a stage's memory."""
    return need["together"]


def _dstrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dstrain.cli.main", *words], capture_output=True, text=True, check=False
    )


def table(asked: argparse.Namespace, card: str, found: dict[Case, Found]) -> str:
    """Markdown: a line above with date, versions and card, then a row a case."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "transformers")
    )
    names = list(dict.fromkeys(name for each in found.values() for name in each.classes))
    lines = [
        f"{datetime.date.today()}, {asked.data_parallel} x {card}, dstrain {__version__}, {versions},"
        f" Python {platform.python_version()}; {asked.model}, sequences of {asked.seq_len} tokens, {asked.micro_batch}"
        " a micro-batch, 4 micro-batches.",
        "",
        "| layout | " + " | ".join(names) + " | predicted in all | measured | off by |",
        "| --- |" + " ---: |" * (len(names) + 3),
    ]
    for case, each in found.items():
        sizes = [format_bytes(each.classes[name]) if name in each.classes else "" for name in names]
        measured = format_bytes(each.measured) if each.measured else each.why_not
        off = f"{100 * (each.predicted / each.measured - 1):+.1f} %" if each.measured else ""
        lines.append(
            "| " + " | ".join([str(case), *sizes, format_bytes(each.predicted), measured, off]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""How fast data are tokenized, beside `datasets.map`, and with how much memory: tables on stdout.

    python -m benchmarks.data                              # 40 MB of each kind, three rounds, two processes
    python -m benchmarks.data --megabytes 200 --workers 8 --kinds chats
    python -m benchmarks.data --memory 10 100 1000         # MB: the peak of all processes together

The texts are pieces of Python's standard library in random order; the tokenizer is a byte-level BPE of 32,768 tokens
that is trained on it. Both sides read the same JSON-lines files in processes of their own, in turns, so that a busy
moment of the machine is everybody's:

- dstrain: from the files to the finished cache, with the start of its workers;
- datasets: ``Dataset.map(batched=True, num_proc=N)`` alone, and with ``load_dataset`` before it, which reads the files.

What each imports and the load of the tokenizer count for neither. Chats are rendered with a template that marks the
assistant's turns, and both give the tokens with a mask.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY = 32_768
PACKAGES = ("dstrain", "datasets", "tokenizers", "transformers")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROOT = Path(__file__).resolve().parents[1]


# --- what is tokenized


def library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(library(), trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    whole.chat_template = TEMPLATE
    whole.save_pretrained(str(folder))


class Pieces:
    """Lines of the standard library, a few that follow each other at a time."""

    def __init__(self) -> None:
        self._draw = random.Random(1)
        self._lines = [line for text in library() for line in text.splitlines(keepends=True)]

    def text(self, shortest: int, longest: int) -> str:
        wanted, size, found = self._draw.randrange(shortest, longest), 0, []
        while size < wanted:
            at = self._draw.randrange(len(self._lines) - 40)
            found.append("".join(self._lines[at : at + self._draw.randrange(2, 30)]))
            size += len(found[-1])
        return "".join(found)[:wanted]

    def short(self) -> dict[str, Any]:
        return {"text": self.text(50, 600)}

    def long(self) -> dict[str, Any]:
        return {"text": self.text(200_000, 2_000_000)}

    def chat(self) -> dict[str, Any]:
        turns = []
        for role, longest in [("user", 200), ("assistant", 800)] * self._draw.randrange(1, 4):
            said = self.text(20, longest).replace("<|", "< |").strip()
            turns.append({"role": role, "content": said or "yes"})
        return {"messages": turns}


KINDS: dict[str, Callable[[Pieces], dict[str, Any]]] = {
    "short JSON lines": Pieces.short,
    "long documents": Pieces.long,
    "chats": Pieces.chat,
}


def write_corpus(path: Path, kind: str, megabytes: int) -> None:
    """As many records, of 50 MB at most, again and again."""
    pieces, size, lines = Pieces(), 0, []
    while size < min(megabytes, 50) * 1_000_000:
        lines.append(json.dumps(KINDS[kind](pieces)) + "\n")
        size += len(lines[-1])
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(max(1, round(megabytes / 50))):
            stream.writelines(lines)


# --- what is measured, each in a process of its own


def tokenized_by_dstrain(file: str, tokenizer: str, folder: str, workers: int) -> dict[str, float]:
    from dstrain.data.chat.corpus import source_of
    from dstrain.data.chat.options import RecordOptions
    from dstrain.data.listing.sources import find_files
    from dstrain.data.token_cache import load_or_build
    from dstrain.data.tokenizing.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    start, processor = time.perf_counter(), processor_seconds()
    corpus = source_of(find_files(file), RecordOptions(), loaded)
    load_or_build(corpus, loaded, Path(folder), workers)
    return {"seconds": time.perf_counter() - start, "processor": processor_seconds() - processor}


def tokenized_by_datasets(file: str, tokenizer: str, folder: str, workers: int) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(tokenizer)

    def texts(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": loaded(batch["text"])["input_ids"]}

    def chats(batch: dict[str, Any]) -> dict[str, Any]:
        found = loaded.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    start = time.perf_counter()
    data = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
    begun, processor = time.perf_counter(), processor_seconds()
    work = texts if "text" in data.column_names else chats
    data.map(work, batched=True, num_proc=workers, remove_columns=data.column_names)
    ended = time.perf_counter()
    return {
        "seconds": ended - begun,
        "with reading": ended - start,
        "processor": processor_seconds() - processor,
    }


def processor_seconds() -> float:
    """Of this process, and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


SIDES = {"dstrain": tokenized_by_dstrain, "datasets": tokenized_by_datasets}


def measured(
    side: str, file: Path, tokenizer: Path, workers: int, *, memory: bool = False
) -> dict[str, float]:
    """What it says of its seconds, and the peak of the memory of all its processes in MB."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        arguments = [side, str(file), str(tokenizer), folder, str(workers)]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data", "--one", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid) if memory else 0.0)
            time.sleep(0.1)
        assert process.stdout is not None
        found: dict[str, float] = json.loads(process.stdout.read().splitlines()[-1])
    return {**found, "peak": peak}


def memory_of(pid: int) -> float:
    """Of a process and those that it has started, in MB; what they share counts once (PSS)."""
    import psutil

    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0.0
    for one in family:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e6


# --- tables


def speed(folder: Path, tokenizer: Path, kinds: list[str], megabytes: int, rounds: int, workers: int) -> None:
    print("| what | dstrain | `datasets.map` | times | with reading | times | of the processor | times |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        file = folder / f"{kind}.jsonl"
        write_corpus(file, kind, megabytes)
        size = file.stat().st_size / 1e6
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, runs in found.items():
                runs.append(measured(side, file, tokenizer, workers))

        def median(side: str, key: str, found: dict[str, list[dict[str, float]]] = found) -> float:
            return statistics.median(run[key] for run in found[side])

        ours, theirs = median("dstrain", "seconds"), median("datasets", "seconds")
        reading = median("datasets", "with reading")
        processor = [median(side, "processor") for side in SIDES]
        print(
            f"| {kind} | {size / ours:.2f} MB/s | {size / theirs:.2f} MB/s | {theirs / ours:.2f}"
            f" | {size / reading:.2f} MB/s | {reading / ours:.2f}"
            f" | {processor[0]:.1f} / {processor[1]:.1f} s | {processor[1] / processor[0]:.2f} |",
            flush=True,
        )
        file.unlink()


def memory(folder: Path, tokenizer: Path, kinds: list[str], sizes: list[int], workers: int) -> None:
    print(f"| what | {' | '.join(f'{size:,} MB' for size in sizes)} |")
    print(f"| --- |{' ---: |' * len(sizes)}")
    for kind in kinds:
        peaks = []
        for size in sizes:
            file = folder / f"{kind}.jsonl"
            write_corpus(file, kind, size)
            peaks.append(measured("dstrain", file, tokenizer, workers, memory=True)["peak"])
            file.unlink()
        print(f"| {kind} | {' | '.join(f'{peak:,.0f} MB' for peak in peaks)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=40, help="of each kind (40)")
    parser.add_argument("--rounds", type=int, default=3, help="of each side (3)")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize (2)")
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB", help="measure memory, for these sizes")
    parser.add_argument("--folder", type=Path, help="where the files lie; by default a temporary folder")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="all of them")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        side, *paths, workers = asked.one
        print(json.dumps(SIDES[side](*paths, int(workers))))
        return
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        write_tokenizer(folder / "tokenizer")
        if asked.memory:
            memory(folder, folder / "tokenizer", asked.kinds, asked.memory, asked.workers)
        else:
            speed(folder, folder / "tokenizer", asked.kinds, asked.megabytes, asked.rounds, asked.workers)
        print(f"\n{asked.workers} processes; {machine()}; load {os.getloadavg()[0]:.1f} at the end.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()

"""LoRA in two replicas on the CPU, beside HF Trainer + PEFT + DeepSpeed: ``python benchmarks/lora.py [--rounds 3]``.

The same model, rows, batch, optimizer, ZeRO stage and adapter; fp32, one thread a rank. Rounds alternate. Each prints
tokens a second (of the median step, the first two left out) and the largest peak of resident memory of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
SEQ_LEN, MICRO_BATCH, ACCUMULATION, REPLICAS, STEPS, LEFT_OUT = 256, 2, 4, 2, 10, 2
RANK, ALPHA = 16, 32
GLOBAL_BATCH = MICRO_BATCH * ACCUMULATION * REPLICAS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2))
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher
    arguments = parser.parse_args()
    if arguments.peer:
        train_as_peer(Path(arguments.peer), arguments.zero)
        return
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(MODEL))
        generator = random.Random(0)
        lines = ("".join(chr(generator.randrange(33, 127)) for _ in range(2 * SEQ_LEN)) for _ in range(1000))
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        for number in range(1, arguments.rounds + 1):
            ours = measured(dstrain_command(folder, number, arguments.zero), environment)
            steps = (folder / "runs" / str(number) / "metrics.jsonl").read_text().splitlines()
            seconds = [record["seconds"] for record in map(json.loads, steps) if "seconds" in record]
            _say("dstrain", seconds, ours)
            theirs = measured(peer_command(folder, arguments.zero), environment)
            _say("HF Trainer + PEFT + DeepSpeed", json.loads((folder / "peer.json").read_text()), theirs)


def _say(name: str, seconds: list[float], memory: int) -> None:
    rate = GLOBAL_BATCH * SEQ_LEN / statistics.median(seconds[LEFT_OUT:])
    print(f"{name:30} {rate:8,.0f} tokens/s   {memory / 1e6:7,.0f} MB", flush=True)


def dstrain_command(folder: Path, number: int, zero: int) -> list[str]:
    adapter = {"type": "lora", "r": RANK, "alpha": ALPHA, "targets": "all-linear"}
    settings = {
        "adapter": json.dumps(adapter), "eval_every": 0, "eval_samples": 1, "save_every": "never", "sample_tokens": 0,
        "lr_schedule": "constant", "lr": 1e-3, "check_every": 0, "validation": 0.01, "warmup_steps": 0,
    }  # fmt: skip
    return [
        *(
            sys.executable,
            "-m",
            "dstrain.cli.main",
            "run",
            "--model",
            str(folder),
            "--data",
            str(folder / "text.jsonl"),
        ),
        *(
            "--zero",
            str(zero),
            "--data-parallel",
            str(REPLICAS),
            "--seq-len",
            str(SEQ_LEN),
            "--steps",
            str(STEPS),
        ),
        *(
            "--global-batch",
            str(GLOBAL_BATCH),
            "--micro-batch",
            str(MICRO_BATCH),
            "--no-pack",
            "--tokenizer",
            "bytes",
        ),
        *("--runs-dir", str(folder / "runs"), "--name", str(number)),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    ]


def peer_command(folder: Path, zero: int) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(REPLICAS)]
    launcher += ["--master_port", "29871"]
    return [*launcher, os.path.abspath(__file__), "--peer", str(folder), "--zero", str(zero)]


def measured(command: list[str], environment: dict[str, str]) -> int:
    """Run it; the largest peak of resident memory of a process below it, in bytes."""
    peaks: dict[int, int] = {}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def watch() -> None:
        while process.poll() is None:
            for child in (
                psutil.Process(process.pid).children(recursive=True) if psutil.pid_exists(process.pid) else []
            ):
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                    peaks[child.pid] = int(found[1]) * 1024
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
    return max(peaks.values())


def train_as_peer(folder: Path, zero: int) -> None:
    """One rank of HF Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    optimizer = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}
    deepspeed = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": {"stage": zero},
        "steps_per_print": 10**6,
    }
    options = TrainingArguments(
        output_dir=str(folder / "peer"),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        deepspeed=deepspeed,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        learning_rate=1e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )

    class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.rows = torch.randint(33, 127, (1000, SEQ_LEN))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.rows[index], "labels": self.rows[index]}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends = [time.perf_counter()]

        def on_step_end(self, *_: object, **__: object) -> None:
            self.ends.append(time.perf_counter())

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    Trainer(model=get_peft_model(model, lora), args=options, train_dataset=Data(), callbacks=[clock]).train()
    if int(os.environ["RANK"]) == 0:
        seconds = [end - begin for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]
        (folder / "peer.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()

"""``python -m dstrain.export.generate REQUEST.json``: a model folder continues a prompt, token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from dstrain.errors import DstrainError
from dstrain.model.architecture import load_config


def generate(folder: Path, prompt: str, *, tokens: int, temperature: float, seed: int) -> None:
    """Print ``prompt`` and up to ``tokens`` tokens after it.

    Args:
        folder: of any Hugging Face causal language model.
        temperature: 0 takes the likeliest token each time.

    Raises:
        DstrainError: the folder's model or tokenizer can't be loaded.
    """
    load_config(folder)  # says in one line what is wrong with a config.json
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:  # damaged files raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DstrainError(f"this model can't be loaded: {reason}", where=str(folder)) from error
    if torch.cuda.is_available():
        model.to("cuda")
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=bool(prompt))
    if not ids["input_ids"].shape[-1]:  # nothing to continue: as after the end of a document
        ids = {"input_ids": torch.tensor([[tokenizer.eos_token_id or 0]])}
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.generate(
        **{name: value.to(model.device) for name, value in ids.items()},
        max_new_tokens=tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 1:
        print("usage: python -m dstrain.export.generate REQUEST.json", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        generate(
            Path(request["folder"]),
            request["prompt"],
            tokens=request["tokens"],
            temperature=request["temperature"],
            seed=request["seed"],
        )
    except DstrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

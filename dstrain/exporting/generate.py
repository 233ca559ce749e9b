"""``python -m dstrain.exporting.generate REQUEST.json ANSWER.json``: generates text with a model folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from dstrain.child_process import child_main
from dstrain.data.chat.corpus import template_text
from dstrain.data.chat.template import ChatTemplate
from dstrain.data.tokenizing.tokenizer_files import refuse_large_files
from dstrain.data.tokenizing.tokenizers import added_in_front, load_pretrained, load_tokenizer
from dstrain.errors import DstrainError
from dstrain.exporting.adapter_folder import load_adapter
from dstrain.files import write_json
from dstrain.model.architecture import load_config

# A folder without any of these has no tokenizer. (transformers gives some families one without tokens then.)
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")


def generate(
    folder: Path,
    prompt: str,
    *,
    base: Path | None = None,
    tokens: int,
    temperature: float,
    seed: int,
    chat: bool = False,
    system: str = "",
) -> str:
    """``prompt`` and up to ``tokens`` tokens after it, no more than the model has positions for.

    Args:
        folder: of any Hugging Face causal language model, or of an adapter.
        base: the model that the adapter is for.
        chat: the prompt is what a user says, and the answer alone is returned.
        system: with ``chat``: a system message in front.
        temperature: 0 takes the likeliest token each time.

    Raises:
        DstrainError: the folder's model or tokenizer can't be loaded, or the prompt fills all positions.
    """
    config = load_config(base or folder)  # says in one line what is wrong with a config.json
    of_tokenizer = folder if base is None or _has_tokenizer(folder) else base
    tokenizer = _load_tokenizer(of_tokenizer)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base or folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
        if base is not None:
            load_adapter(model, folder)
    except Exception as error:  # damaged files raise nearly anything
        raise DstrainError(
            f"this model can't be loaded: {_in_a_line(error)}",
            where=str(folder),
            hint="check its files; `dstrain export RUN FOLDER` writes a whole folder",
        ) from error
    if torch.cuda.is_available():
        model.to("cuda")
    ids = _chat_ids(of_tokenizer, prompt, system) if chat else _prompt_ids(tokenizer, prompt)
    tokens = _tokens_that_fit(config, len(ids), tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    [written] = model.generate(
        input_ids=(given := torch.tensor([ids], device=model.device)),
        attention_mask=torch.ones_like(given),
        max_new_tokens=tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(written[len(ids) :] if chat else written, skip_special_tokens=True))


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """As a document begins with this tokenizer, and nothing behind it that would end one.

    Without any text and without a token to begin with: as after the end of a document.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    begin = added_in_front(tokenizer)
    if ids[: len(begin)] != begin:
        ids = [*begin, *ids]
    return ids or [tokenizer.eos_token_id or 0]


def _chat_ids(folder: Path, prompt: str, system: str) -> list[int]:
    """A conversation in which the assistant is to answer."""
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.chat_template is None:
        raise DstrainError(
            "this model's tokenizer has no chat template",
            where=str(folder),
            hint="leave out --chat to continue a text",
        )
    try:
        return ChatTemplate(tokenizer, source=template_text(None, tokenizer)).prompt_ids(prompt, system)
    except DstrainError as error:
        error.where = error.where or str(folder)
        raise


def _has_tokenizer(folder: Path) -> bool:
    return any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))


def _load_tokenizer(folder: Path) -> Any:
    if not _has_tokenizer(folder):
        raise DstrainError(
            "the folder has no tokenizer",
            where=str(folder),
            hint="put its tokenizer files there, e.g. tokenizer.json and tokenizer_config.json",
        )
    refuse_large_files(folder)
    return load_pretrained(folder)


def _in_a_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tokens_that_fit(config: PretrainedConfig, prompt: int, wanted: int) -> int:
    """How many tokens after a prompt of ``prompt`` tokens the model has positions for, at most ``wanted``.

    Learned positions end in an IndexError; rotary ones go on, where the model was not trained.
    """
    positions = next(
        (
            number
            for name in ("max_position_embeddings", "n_positions")
            if (number := getattr(config, name, None) or 0) > 0  # -1 in families without a limit
        ),
        None,
    )
    if positions is None or prompt + wanted <= positions:
        return wanted
    if prompt >= positions:
        raise DstrainError(
            f"the prompt has {prompt:,} tokens, which leaves no room for a continuation within the"
            f" model's {positions:,} positions",
            where="PROMPT",
            hint="shorten the prompt",
        )
    print(  # as progress is told: the command line passes this on
        f"dstrain: --tokens {wanted} is reduced to {positions - prompt}: the model has {positions:,}"
        f" positions, and the prompt takes {prompt:,}",
        file=sys.stderr,
    )
    return positions - prompt


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dstrain.exporting.generate REQUEST.json ANSWER.json", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    text = generate(
        Path(request["folder"]),
        request["prompt"],
        base=Path(request["base"]) if request["base"] else None,
        tokens=request["tokens"],
        temperature=request["temperature"],
        seed=request["seed"],
        chat=request["chat"],
        system=request["system"],
    )
    write_json(Path(argv[1]), {"text": text})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

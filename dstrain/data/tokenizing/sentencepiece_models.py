"""Tokenizer folders without a tokenizer.json: SentencePiece and tiktoken models, which transformers converts.

It needs packages for that which are no dependencies of ours, and names one of them for whatever it can't read.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError, way_out

SENTENCEPIECE, TIKTOKEN = "SentencePiece", "tiktoken"

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
_COMPLETE = ("tokenizer.json", "tekken.json", "vocab.json", "vocab.txt")
"""Read before, or without, any of `_MODELS`."""
_PACKAGES = {SENTENCEPIECE: ("sentencepiece", "protobuf"), TIKTOKEN: ("tiktoken",)}
_MODULES = {"protobuf": "google.protobuf"}
# A message of protobuf whose first field is a list of messages; lines of a token in base64 and its number.
_CONTENTS = {
    SENTENCEPIECE: re.compile(rb"\x0a[\x00-\x7f]?"),
    TIKTOKEN: re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n"),
}
_COMPARED = 500


def vocabulary_alone(folder: Path) -> str:
    """What kind of model a folder's vocabulary is, where there is no other: `SENTENCEPIECE`, `TIKTOKEN`, or "".

    Raises:
        DstrainError: a package that reads it is not installed, or it is neither.
    """
    model = _model(folder)
    if model is None:
        return ""
    try:
        with model.open("rb") as file:
            begin = file.read(4096)
    except OSError as error:
        raise DstrainError(
            f"can't be read: {error.strerror or error}", where=str(model), hint=way_out(error)
        ) from None
    kind = next((kind for kind, pattern in _CONTENTS.items() if pattern.match(begin)), None)
    if kind is None:
        what = "is empty" if not begin else f"is neither a {SENTENCEPIECE} nor a {TIKTOKEN} model"
        pointer = begin.startswith(b"version https://git-lfs")
        raise DstrainError(
            f"{model.name} is a pointer of git LFS, not the file itself"
            if pointer
            else f"{model.name} {what}",
            hint="`git lfs pull` in its repository fetches it" if pointer else "download or copy it again",
            where=str(model),
        )
    missing = [name for name in _PACKAGES[kind] if not _is_installed(_MODULES.get(name, name))]
    if missing:
        needed = " and ".join(_PACKAGES[kind])
        raise DstrainError(
            f"{model.name} is a {kind} model, which transformers needs {needed} for; not installed:"
            f" {', '.join(missing)}",
            hint=f"pip install {' '.join(missing)}; or where it is installed,"
            " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json that needs neither",
            where=str(folder),
        )
    return kind


def check_conversion(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that transformers has made of a SentencePiece model without knowing its family, where it
    divides a text of the model's own tokens otherwise than SentencePiece does.

    Raises:
        DstrainError: says what names the family.
    """
    from sentencepiece import SentencePieceProcessor

    model = _model(folder)
    processor = SentencePieceProcessor(model_file=str(model))
    pieces = (processor.id_to_piece(number) for number in range(min(processor.get_piece_size(), _COMPARED)))
    words = [piece.lstrip("▁") for piece in pieces if not piece.startswith("<")]
    text = " ".join(word for word in words if word)
    if tokenizer.tokenize(text) != processor.encode(text, out_type=str):
        raise DstrainError(
            "transformers does not know the family of this tokenizer, and divides texts otherwise than SentencePiece",
            hint='name its class in its tokenizer_config.json, for example {"tokenizer_class": "LlamaTokenizer"}',
            where=str(folder),
        )


def _model(folder: Path) -> Path | None:
    if any((folder / name).is_file() for name in _COMPLETE):
        return None
    return next((folder / name for name in _MODELS if (folder / name).is_file()), None)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False

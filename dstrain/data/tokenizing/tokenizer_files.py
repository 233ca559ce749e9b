"""Which files make up a tokenizer folder; importable without numpy for the command line."""

from __future__ import annotations

import codecs
from pathlib import Path

from dstrain.addresses import refuse_address
from dstrain.errors import DstrainError, way_out
from dstrain.model_config_bounds import LARGEST_TOKENIZER_FILE

BYTES = "bytes"
"""The tokenizer that needs no file."""

# The files that can decide what a Hugging Face tokenizer does (chat templates and weights can't).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
"""Where a tokenizer's chat template stands, if not in its tokenizer_config.json."""
VOCABULARY_FILES = tuple(
    name for name in TOKENIZER_FILES if not name.endswith(("_config.json", "_map.json", "added_tokens.json"))
)
"""A folder with one of these has a tokenizer."""


_OF_OTHER_FILES = frozenset(
    {
        *("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "quantization_config"),
        *("compression_config", "peft_config", "assistant_model", "transformers_weights", "local_files_only"),
        *("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type"),
    }
)


def speaks_of_other_files(key: str) -> bool:
    """Whether a key of a model's, a generation's or a tokenizer's configuration speaks of code, weights or classes
    beside what was read. Files that are written elsewhere are complete without them."""
    return key in _OF_OTHER_FILES or key.endswith(("name_or_path", "_file", "_files"))


def tokenizer_folder(name: str) -> Path:
    """The folder that a tokenizer other than `BYTES` means.

    Raises:
        DstrainError: there is no such folder, or no tokenizer in it.
    """
    refuse_address(name, "tokenizer", hub=True)
    folder = Path(name).expanduser()
    if folder.is_file() and folder.name in VOCABULARY_FILES:
        raise DstrainError("this is a file", hint=f"name its folder: {folder.parent}", where=str(folder))
    if not name.strip() or not folder.is_dir():
        raise DstrainError(
            f"there is no tokenizer folder {name!r}",
            hint="name 'bytes', a folder with a tokenizer.json, or a model on the hub: org/name",
            where=str(folder),
        )
    if not any((folder / file).is_file() for file in VOCABULARY_FILES):
        raise DstrainError(
            "there is no tokenizer in this folder",
            hint=f"looked for {', '.join(VOCABULARY_FILES)}; `tokenizer.save_pretrained(folder)` writes one",
            where=str(folder),
        )
    refuse_large_files(folder)
    _refuse_byte_order_marks(folder)
    return folder


def _refuse_byte_order_marks(folder: Path) -> None:
    """transformers does not read JSON with one, and takes it for a part of the first word of a vocabulary."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.suffix not in (".json", ".txt") or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                marked = file.read(3) == codecs.BOM_UTF8
        except OSError as error:
            raise DstrainError(
                f"can't be read: {error.strerror or error}", where=str(path), hint=way_out(error)
            ) from None
        if marked:
            raise DstrainError(
                "this file begins with a byte order mark, which transformers does not read",
                hint=r"remove it: sed -i '1s/^\xef\xbb\xbf//' FILE",
                where=str(path),
            )


def refuse_large_files(folder: Path) -> None:
    """Raises DstrainError where a file of the tokenizer is larger than any tokenizer's."""
    for file in TOKENIZER_FILES:
        size = (folder / file).stat().st_size if (folder / file).is_file() else 0
        if size > LARGEST_TOKENIZER_FILE:
            raise DstrainError(
                f"this file of the tokenizer has {size / 1e6:,.0f} MB, and the limit is"
                f" {LARGEST_TOKENIZER_FILE / 1e6:.0f}",
                hint="check that it is the right file",
                where=str(folder / file),
            )

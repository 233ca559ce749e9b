"""Tokenizer folders without a tokenizer.json: they load, or the message says what is missing or damaged."""

from __future__ import annotations

import base64
import json
import struct
from importlib.util import find_spec
from pathlib import Path

import pytest

from dstrain.data.tokenizing.tokenizers import load_tokenizer
from dstrain.errors import DstrainError

WORDS = ["▁the", "▁a", "▁", "t", "h", "e", "a", "th", "he", "▁t", "▁th"]


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protobuf message: https://protobuf.dev/programming-guides/encoding."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def sentencepiece() -> bytes:
    """A BPE model with a token for each byte: ModelProto of SentencePiece's sentencepiece_model.proto."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    pieces = [*kinds, *sorted(WORDS, key=len, reverse=True)]
    content = b"".join(
        field(1, field(1, piece.encode()) + field(2, -float(number)) + field(3, kinds.get(piece, 1)))
        for number, piece in enumerate(pieces)
    )
    trainer = field(3, 2) + field(35, 1)  # BPE, byte_fallback
    return content + field(2, trainer) + field(3, field(1, b"identity") + field(3, 1))


def tiktoken() -> bytes:
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    return b"".join(base64.b64encode(token) + b" %d\n" % number for number, token in enumerate(tokens))


KINDS = {
    "tokenizer.model": (sentencepiece, "sentencepiece"),
    "spiece.model": (sentencepiece, "sentencepiece"),
    "tiktoken.model": (tiktoken, "tiktoken"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_it_loads_or_says_what_to_install(name: str, folder: Path) -> None:
    """Which of the two depends on what is installed here; none of the packages is a dependency of dstrain."""
    content, package = KINDS[name]
    (folder / name).write_bytes(content())
    if find_spec(package):
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.decode(tokenizer.encode("the a the")) == "the a the"
        return
    with pytest.raises(DstrainError) as refused:
        load_tokenizer(str(folder))
    assert f"{name} is a " in refused.value.message and f"not installed: {package}" in refused.value.message
    assert f"pip install {package}" in str(refused.value.hint) and "tokenizer.json" in str(refused.value.hint)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        (b"", "is empty", "download"),
        (b"\0" * 100, "neither a SentencePiece nor a tiktoken model", "download"),
        (b"<!DOCTYPE html><html>", "neither a SentencePiece nor a tiktoken model", "download"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of git LFS",
            "git lfs pull",
        ),
    ],
)
def test_what_is_no_model_is_damaged_and_needs_no_package(
    name: str, content: bytes, words: str, hint: str, folder: Path
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DstrainError) as refused:
        load_tokenizer(str(folder))
    assert words in refused.value.message and hint in str(refused.value.hint)
    assert refused.value.where == str(folder / name) and "pip install" not in str(refused.value)


def test_beside_a_tokenizer_json_it_is_not_asked(folder: Path) -> None:
    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    ByteTokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    assert load_tokenizer(str(folder)).vocab_size == 257

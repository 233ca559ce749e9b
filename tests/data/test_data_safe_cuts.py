"""A long text is tokenized in pieces, which changes no token, and memory does not grow with it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dstrain.data.reading.documents import DocumentPart
from dstrain.data.tokenizing import encoders
from dstrain.data.tokenizing.tokenizers import load_tokenizer

# What pre-tokenizers treat in ways of their own: runs of digits, spaces and signs, line ends, contractions, marks.
WORDS = [
    *(
        "the",
        "cat",
        "Sat",
        "isn't",
        "WE'LL",
        "a",
        "model",
        "of",
        "été",
        "e\u0301a",
        "日本語",
        "한국어",
        "ß",
        "ﬁn",
    ),
    *(
        "1234567",
        "12",
        "3.14159",
        "...",
        "!?",
        "--",
        "(",
        ")",
        '"x"',
        "😀",
        "👩\u200d💻",
        "_id",
        "<s>",
        "<mask>",
        "½",
    ),
]
GAPS = [
    *([" "] * 12),
    "\n",
    "\n",
    "\n",
    "\n\n",
    "\n\n\n",
    "  ",
    "\t",
    "\r\n",
    " \n",
    "\n ",
    "",
    "\u3000",
    "\xa0",
    "。",
    "\uff0c",
]
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def text_of(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(words))


def byte_level(pattern: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def like_sentencepiece(pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def unigram(pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def llama_2() -> Tokenizer:
    return like_sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )


KINDS: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "gpt2": (lambda: byte_level(GPT_2), True),
    "llama3": (lambda: byte_level(LLAMA_3), True),
    "llama2": (llama_2, True),
    "gemma": (
        lambda: like_sentencepiece(
            pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
        ),
        True,
    ),
    "metaspace first": (
        lambda: like_sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        True,
    ),
    "t5": (lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()), True),
    "bert": (word_piece, True),
    "bare unigram": (unigram, False),
    "stripped": (lambda: unigram(pre_tokenizers.Metaspace(), normalizers.Strip()), True),
    "words of several words": (lambda: byte_level(r"[\s\S]+"), True),
}
"""How to make a tokenizer, and whether texts can be cut for it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from transformers import PreTrainedTokenizerFast

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind in made:
            return made[kind]
        backend = KINDS[kind][0]()
        options: dict[str, Any] = {
            "vocab_size": 600,
            "show_progress": False,
            "special_tokens": ["<unk>", "<s>", "</s>"],
        }
        by_kind = {
            "BPE": trainers.BpeTrainer,
            "Unigram": trainers.UnigramTrainer,
            "WordPiece": trainers.WordPieceTrainer,
        }
        name = type(backend.model).__name__
        if name == "Unigram":
            options["unk_token"] = "<unk>"
        elif name == "BPE":
            options["max_token_length"] = 8
        lines = [text_of(seed, 60) for seed in range(20)]
        backend.train_from_iterator(lines, by_kind[name](**options))
        if name == "BPE" and backend.model.byte_fallback:  # a tokenizer has a token for each byte, or none
            content = json.loads(backend.to_str())
            size = len(content["model"]["vocab"])
            content["model"]["vocab"] |= {f"<0x{byte:02X}>": size + byte for byte in range(256)}
            for character in "\n\t😀日":  # as in real ones: these are spelled in bytes
                content["model"]["vocab"].pop(character, None)
            gone = set("\n\t😀日")
            content["model"]["merges"] = [m for m in content["model"]["merges"] if not gone & set("".join(m))]
            content["model"]["vocab"] = {
                token: number
                for number, token in enumerate(t for t in content["model"]["vocab"] if not gone & set(t))
            }
            for added in content["added_tokens"]:
                added["id"] = content["model"]["vocab"][added["content"]]
            backend = Tokenizer.from_str(json.dumps(content))
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
        made[kind] = tmp_path_factory.mktemp("tokenizer")
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
            made[kind]
        )
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(
    kind: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_PIECE", 1500)
    tokenizer = load_tokenizer(str(folders(kind)))
    pieces = 0
    for seed in range(3):
        text = text_of(100 + seed, 4000)
        # Parts as a file is read, which end anywhere.
        parts = [
            DocumentPart(text[at : at + 7000], at, at + 7000 >= len(text)) for at in range(0, len(text), 7000)
        ]
        found = list(encoders.pieces_of(parts, tokenizer))
        assert "".join(piece.text for piece in found) == text
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
        ids = tokenizer.encode_batch([piece.text for piece in found], [piece.after for piece in found])
        assert np.concatenate(ids).tolist() == tokenizer.encode(text).tolist()
        pieces += len(found)
    assert (pieces > 3 * 4) == KINDS[kind][1], pieces


def test_a_document_without_places_to_cut_is_tokenized_whole(folders: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(str(folders("gpt2")))
    parts = [DocumentPart("0123456789" * 30_000, 1, False), DocumentPart("0" * 10, 2)]
    assert [len(piece.text) for piece in encoders.pieces_of(parts, tokenizer)] == [300_010]


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "llama2", "lines"])
def test_memory_does_not_grow_with_a_file(kind: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    program = (
        "import re, sys\n"
        "from dstrain.data.prepare import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], 32, 0.01, sys.argv[3])\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    tokenizer = kind if kind == "bytes" else str(folders("gpt2" if kind == "lines" else kind))
    text = text_of(1, 4000)
    peaks = []
    for megabytes in (1, 3):
        content = text * (megabytes * 10**6 // len(text))
        if kind == "lines":
            source = tmp_path / f"{megabytes}.jsonl"
            source.write_text((json.dumps({"text": content[:250_000]}) + "\n") * (4 * megabytes))
        else:
            source = tmp_path / f"{megabytes}.txt"
            source.write_text(content, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", program, str(source), tokenizer, str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    # The tokens themselves are mapped, and no more than some blocks of them are looked at.
    assert peaks[1] - peaks[0] < 40, f"MB: {peaks}; 170 bytes for each byte of text would be 340 more"

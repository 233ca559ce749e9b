"""Tokenizers: the built-in byte tokenizer, or a Hugging Face tokenizer from a folder."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dstrain.data.tokenizing.safe_cuts import SafeCuts
from dstrain.data.tokenizing.sentencepiece_models import SENTENCEPIECE, check_conversion, vocabulary_alone
from dstrain.data.tokenizing.tokenizer_files import (
    BYTES,
    TOKENIZER_FILES,
    speaks_of_other_files,
    tokenizer_folder,
)
from dstrain.data.tokenizing.word_cache import WordCache, word_cache
from dstrain.errors import DstrainError
from dstrain.files import write_json

_WORTH_CACHE = 2**17
"""Characters from which on words are remembered."""


class Tokenizer(ABC):
    """What the trainer knows of a tokenizer.

    Attributes:
        name: what the user wrote: ``bytes`` or a folder.
        vocab_size: the largest token id + 1. A model's vocabulary may be larger, padded.
        begin_of_document: the ids that each document begins with, and every prompt; mostly one or none.
        end_of_document: the id that ends each document.
        begins_with, ends_with: the same as the tokenizer writes them.
        begin_of_sequence, padding: the ids that the tokenizer itself has for these, or None.
        chat_template: the Jinja template of conversations that it brings, or those that it brings by name, or None.
        special_tokens: the names that a chat template may use for tokens, such as ``bos_token``, and their texts.
        special_texts: the texts of all tokens that stand for themselves, and are no pieces of text.
        fingerprint: a hash of its content; equal fingerprints tokenize alike.
    """

    name: str
    vocab_size: int
    begin_of_document: tuple[int, ...] = ()
    end_of_document: int
    begins_with: str = ""
    ends_with: str
    begin_of_sequence: int | None = None
    padding: int | None = None
    chat_template: str | dict[str, str] | None = None
    special_tokens: Mapping[str, str]
    special_texts: Sequence[str] = ()
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integers that hold every id, at least 16 bits."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without any special token around them: `dtype` [n]."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text to be continued: as a document begins, with nothing behind it.

        Without any text and without a token that documents begin with, what follows the end of a document is asked for.
        """
        ids = [int(token) for token in self.encode(text)]
        return [*self.begin_before(ids), *ids] or [self.end_of_document]

    def begin_before(self, ids: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """What goes in front of a document of these tokens: nothing, where its text has spelled that already."""
        begin = self.begin_of_document
        return () if begin and tuple(ids[: len(begin)]) == begin else begin

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], after: Sequence[str] = ()) -> list[np.ndarray]:
        """`encode` of each text.

        Args:
            after: for each text the character in front of it, where it is a piece that was cut at a `safe_cut`, or "".
        """

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of texts in which special tokens are spelled, as chat templates write them."""
        return self.encode_batch(texts)

    @abstractmethod
    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`encode_rendered` of each text, and where in it each token begins and ends: `dtype` [n], int64 [n, 2].

        Raises:
            DstrainError: the tokenizer does not know it.
        """

    def encode_trained(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """`encode_rendered` of each text, and which tokens lie in parts of it, where that is plain: `dtype` [n], bool
        [n]. None where `encode_with_places` must be asked."""
        return [None] * len(texts)

    @abstractmethod
    def is_special(self, token: int) -> bool:
        """Whether a token stands for itself, and is no piece of text."""

    @abstractmethod
    def is_token(self, text: str) -> bool:
        """Whether a text is one special token."""

    @abstractmethod
    def token_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these ids, special tokens spelled out."""

    @abstractmethod
    def safe_cut(self, text: str, begin: int) -> int | None:
        """The first place from `begin` on at which `text` can be cut, and the pieces have the tokens of the whole."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of these ids; what is no valid UTF-8 (a character cut in half) becomes U+FFFD."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Write it as a Hugging Face tokenizer (`AutoTokenizer.from_pretrained`) that gives the same ids."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the tokens 0..255, 256 ends a document. Needs no file and round-trips every text."""

    name = BYTES
    vocab_size = 257
    end_of_document = 256
    ends_with = "<|endoftext|>"
    fingerprint = "bytes-v1"
    special_tokens: Mapping[str, str] = MappingProxyType({"eos_token": ends_with})
    special_texts = (ends_with,)

    def encode_batch(self, texts: Sequence[str], after: Sequence[str] = ()) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16) for text in texts]

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        end = np.array([self.end_of_document], dtype=np.uint16)
        found = []
        for text in texts:
            first, *others = self.encode_batch(text.split(self.ends_with))
            found.append(np.concatenate([first, *(part for other in others for part in (end, other))]))
        return found

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for text, ids in zip(texts, self.encode_rendered(texts), strict=True):
            # A character begins with each byte that does not go on with one; the end of a document is one token.
            begins = ((ids & 0xC0) != 0x80) | (ids == self.end_of_document)
            sizes = np.where(ids[begins] == self.end_of_document, len(self.ends_with), 1)
            ends = np.cumsum(sizes)[np.cumsum(begins) - 1]
            widths = np.where(ids == self.end_of_document, len(self.ends_with), 1)
            assert not ends.size or ends[-1] == len(text)
            found.append((ids, np.stack([ends - widths, ends], axis=1)))
        return found

    def is_special(self, token: int) -> bool:
        return token == self.end_of_document

    def is_token(self, text: str) -> bool:
        return text == self.ends_with

    def token_text(self, ids: Sequence[int] | np.ndarray) -> str:
        parts = np.split(
            np.asarray(ids, dtype=np.int64), np.flatnonzero(np.asarray(ids) == self.end_of_document)
        )
        return self.ends_with.join(self.decode(part) for part in parts)

    def safe_cut(self, text: str, begin: int) -> int | None:
        return begin if begin < len(text) else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """End-of-document tokens are left out; ids above, of a padded vocabulary, become U+FFFD."""
        tokens = np.asarray(ids, dtype=np.int64).ravel()
        tokens = tokens[tokens != self.end_of_document]
        # 0xFF occurs in no UTF-8 text, so the decoder replaces it.
        return (
            np.where(tokens < 256, tokens, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        )

    def save_pretrained(self, folder: str | Path) -> None:
        import tokenizers as hf
        from transformers import PreTrainedTokenizerFast

        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        backend = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = hf.decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=self.ends_with).save_pretrained(
            str(folder)
        )


class FolderTokenizer(Tokenizer):
    """A Hugging Face tokenizer. A text that spells a special token gets its id, as in transformers."""

    def __init__(self, folder: Path, name: str, tokenizer: Any, begin: Sequence[int]) -> None:
        self.name = name
        self.begin_of_document = tuple(begin)
        self.begins_with = " ".join(tokenizer.convert_ids_to_tokens(list(begin)))
        self.ends_with = str(tokenizer.eos_token)
        self.begin_of_sequence = tokenizer.bos_token_id
        self.padding = tokenizer.pad_token_id
        self.end_of_document = int(tokenizer.eos_token_id)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.chat_template = tokenizer.chat_template
        self.special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        special = {number: str(one) for number, one in tokenizer.added_tokens_decoder.items() if one.special}
        self.special_texts = tuple(special.values())
        self._special = frozenset({*special, self.end_of_document})
        self.fingerprint = _fingerprint(folder, type(tokenizer).__name__, self.end_of_document)
        self._folder = folder
        self._loaded = tokenizer
        self._backend = _plain_backend(tokenizer)
        self._cuts = SafeCuts(self._backend) if self._backend is not None else None
        self._words: WordCache | None = None
        self._characters = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process needs. Where the backend does all the work, transformers is loaded there only by what
        asks for it: that takes seconds."""
        kept = self.__dict__ | {"_loaded": None, "_cuts": None, "_words": None, "_characters": 0}
        if self._backend is not None:
            # The flag is no part of what the backend pickles.
            kept["_backend"] = (self._backend, self._backend.encode_special_tokens)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._backend is not None:
            self._backend, spelled = self._backend
            self._backend.encode_special_tokens = spelled
            self._cuts = SafeCuts(self._backend)

    @property
    def _tokenizer(self) -> Any:
        """As transformers has it."""
        if self._loaded is None:
            self._loaded = load_pretrained(self._folder, vocabulary_alone(self._folder))
        return self._loaded

    def encode_batch(self, texts: Sequence[str], after: Sequence[str] = ()) -> list[np.ndarray]:
        after = after or [""] * len(texts)
        in_front = {before: self._ids([before])[0].size if before else 0 for before in set(after)}
        together = [before + text for before, text in zip(after, texts, strict=True)]
        return [ids[in_front[before] :] for ids, before in zip(self._ids(together), after, strict=True)]

    def is_special(self, token: int) -> bool:
        return token in self._special

    def is_token(self, text: str) -> bool:
        return text in self.special_texts

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        if not texts:
            return []
        if self._backend is not None:
            words = self._word_cache(texts)
            known = [words.ids_and_places(text) if words is not None else None for text in texts]
            others = [text for text, one in zip(texts, known, strict=True) if one is None]
            encodings = iter(self._backend.encode_batch(others, add_special_tokens=False) if others else ())
            found = [
                ((encoding := next(encodings)).ids, encoding.offsets) if one is None else one for one in known
            ]
        elif self._tokenizer.is_fast:
            encoded = self._encoded(texts, return_offsets_mapping=True)
            found = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        else:
            raise DstrainError(
                f"{type(self._tokenizer).__name__} does not say where a token stands in a text, as conversations need",
                where=self.name,
                hint="a tokenizer with a tokenizer.json",
            )
        return [(np.asarray(ids, dtype=self.dtype), _whole_places(offsets)) for ids, offsets in found]

    def encode_trained(
        self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        words = self._word_cache(texts)
        if words is None:
            return [None] * len(texts)
        return [words.ids_and_trained(text, parts) for text, parts in zip(texts, spans, strict=True)]

    def token_text(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._tokenizer.decode(np.asarray(ids).ravel().tolist(), skip_special_tokens=False))

    def safe_cut(self, text: str, begin: int) -> int | None:
        return self._cuts.next(text, begin) if self._cuts else None

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        if not texts:
            return []
        if self._backend is not None:
            words = self._word_cache(texts)
            found = [words.ids(text) if words is not None else None for text in texts]
            others = [text for text, ids in zip(texts, found, strict=True) if ids is None]
            encodings = iter(
                self._backend.encode_batch_fast(others, add_special_tokens=False) if others else ()
            )
            return [np.array(next(encodings).ids, dtype=self.dtype) if ids is None else ids for ids in found]
        return [np.asarray(ids, dtype=self.dtype) for ids in self._encoded(texts)["input_ids"]]

    def _word_cache(self, texts: Sequence[str]) -> WordCache | None:
        """None for the first texts, which are encoded sooner than it is made."""
        if self._backend is not None and self._characters < _WORTH_CACHE:
            self._characters += sum(map(len, texts))
            if self._characters >= _WORTH_CACHE:
                self._words = word_cache(self._backend, self.dtype)
        return self._words

    def _encoded(self, texts: Sequence[str], **options: bool) -> Any:
        """By the tokenizer's own class, not by its backend alone."""
        # Truncation and padding can be switched on inside a tokenizer.json; said here, they are off.
        return self._tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._tokenizer.decode(np.asarray(ids).ravel().tolist(), skip_special_tokens=True))

    def save_pretrained(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))
        path = Path(folder) / "tokenizer_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        # Code and files that lay beside the tokenizer which was read; what is written is complete without them.
        own = {
            name: value
            for name, value in written.items()
            if name == "tokenizer_class" or not speaks_of_other_files(name)
        }
        if own != written:
            write_json(path, own)


def load_tokenizer(name: str, begin: str = "auto") -> Tokenizer:
    """The tokenizer called `name`: ``bytes``, or a folder that holds a Hugging Face tokenizer. Never asks the
    network.

    Args:
        begin: what documents begin with: the config's ``begin_token``.

    Raises:
        DstrainError: there is no such folder, no tokenizer in it, it can't be loaded, or it has no
        end-of-sequence token, or no begin-of-sequence token where each document is to begin with it.
    """
    if name == BYTES:
        if begin == "always":
            raise _no_begin_token(BYTES)
        return ByteTokenizer()
    folder = tokenizer_folder(name)
    alone = vocabulary_alone(
        folder
    )  # and before transformers is asked, whose message names the wrong package
    tokenizer = load_pretrained(folder, alone)
    if alone == SENTENCEPIECE and type(tokenizer).__name__ == "TokenizersBackend":
        check_conversion(tokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise DstrainError(
            "this tokenizer has no end-of-sequence token, which is needed to end documents",
            hint='set "eos_token" in its tokenizer_config.json',
            where=str(folder),
        )
    ids: list[int] = []
    if begin == "auto":
        ids = added_in_front(tokenizer)
    elif begin == "always":
        if tokenizer.bos_token_id is None:
            raise _no_begin_token(str(folder))
        ids = [int(tokenizer.bos_token_id)]
    return FolderTokenizer(folder, name, tokenizer, ids)


def load_pretrained(folder: Path, alone: str = "") -> Any:
    """The Hugging Face tokenizer in a folder.

    Args:
        alone: the kind of model that its vocabulary is, where that is all that lies there.

    Raises:
        DstrainError: transformers can't load it, or it needs code of its own.
    """
    # transformers takes seconds to import, and the byte tokenizer does without it.
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it tries in vain, before it finds what fits
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken file raises, the user wants to know which folder it was
        if "trust_remote_code" in str(error):
            raise DstrainError(
                "this tokenizer needs code of its own (auto_map in its tokenizer_config.json), and code that comes"
                " with a model is never run",
                hint="name a tokenizer that transformers has a class for",
                where=str(folder),
            ) from None
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines and not isinstance(error, KeyError) else repr(error)
        what = f"; its vocabulary is a {alone} model, which may be cut off" if alone else ""
        hint = "download or copy it again; `tokenizer.save_pretrained(folder)` writes a complete one"
        if (package := re.search(r"requires the ([\w.-]+) library", reason)) is not None:
            reason = f"it needs {package[1]}, which is not installed"
            hint = f"pip install {package[1]}; or name a folder with a tokenizer.json"
        elif not alone and (kind := _without_class(folder)):
            reason = "neither a tokenizer.json nor the class of its vocabulary is there"
            hint = f'say the class in its tokenizer_config.json: {{"tokenizer_class": "{kind}"}}'
        raise DstrainError(
            f"transformers can't load this tokenizer: {reason}{what}", hint=hint, where=str(folder)
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _without_class(folder: Path) -> str | None:
    """For a folder with a vocabulary in files of its own and no word about its class: the class that has such files."""
    if (folder / "tokenizer.json").exists() or (folder / "config.json").exists():
        return None
    with suppress(OSError, ValueError):
        if "tokenizer_class" in json.loads((folder / "tokenizer_config.json").read_bytes()):
            return None
    if (folder / "vocab.txt").exists():
        return "BertTokenizer"
    return "GPT2Tokenizer" if (folder / "merges.txt").exists() else None


def _whole_places(offsets: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Where tokens begin and end, int64 [n, 2]: some tokenizers leave out the white space that a token begins with."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    if places.size:
        before = np.concatenate([[0], np.maximum.accumulate(places[:-1, 1])])
        places[:, 0] = np.minimum(places[:, 0], before)
    return places


def _plain_backend(tokenizer: Any) -> Any | None:
    """The tokenizer of the tokenizers library, truncation and padding off, that does all that a Hugging Face tokenizer
    does to a text; None where its class does more."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or (
        kind._encode_plus is not PreTrainedTokenizerFast._encode_plus
        or kind.__call__ is not PreTrainedTokenizerBase.__call__
    ):
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def added_in_front(tokenizer: Any) -> list[int]:
    """The ids that a Hugging Face tokenizer puts in front of every text by itself."""
    text = "a b"
    plain: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    full: list[int] = tokenizer(text, truncation=False, padding=False)["input_ids"]
    places = range(len(full) - len(plain) + 1)
    first = next((place for place in places if full[place : place + len(plain)] == plain), 0)
    return full[:first]


def _no_begin_token(where: str) -> DstrainError:
    return DstrainError(
        "begin_token: always, but this tokenizer has no begin-of-sequence token",
        hint='begin_token: auto; or set "bos_token" in its tokenizer_config.json',
        where=where,
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary.

    Source: `bytes_to_unicode` of GPT-2, github.com/openai/gpt-2, src/encoder.py: a printable character of
    Latin-1 stands for itself, the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _fingerprint(folder: Path, kind: str, end_of_document: int) -> str:
    digest = hashlib.sha256(f"{kind}\n{end_of_document}\n".encode())
    for file in TOKENIZER_FILES:
        path = folder / file
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{file} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:32]

"""Remembers the tokens of words: what a byte-level tokenizer does with a word does not depend on what stands around it.

The tokenizers library looks each word of a text up anew, with the place of each of its characters in the text. Here a
text is divided by its patterns in Python (`dstrain.data.tokenizing.word_patterns`), and only words that were not met
yet are given to the library. What can't be shown to give the same tokens is left to the library as a whole.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from dstrain.data.tokenizing.word_patterns import WordPatterns, word_patterns

_MOST_WORDS = 2**17
"""Words that are remembered, about 25 MB. When as many others have come, all are forgotten: the text is another one."""
_LONGEST = 64
"""Characters of a word that is remembered."""
_MOST_CHARACTERS = 2**20
"""Of parts of conversations whose words are remembered; with the words, about 20 bytes for each."""
_LONGEST_PART = 2**14
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
_SPACE = "\u0120"
"""How byte-level vocabularies spell a space."""


class WordCache:
    """The tokens of texts, word by word, for a tokenizer that `word_cache` has taken.

    Args:
        dtype: of the tokens.
    """

    def __init__(self, backend: Any, patterns: WordPatterns, dtype: np.dtype) -> None:
        from tokenizers import pre_tokenizers

        self._model = backend.model
        self._normalizer = backend.normalizer
        self._dtype = dtype
        self._patterns = patterns
        self._bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._spellings = {code: self._bytes.pre_tokenize_str(chr(code))[0][0] for code in range(128)}
        self._type = "H" if dtype.itemsize == 2 else "I"
        self._added = _AddedTokens(backend)
        self._ids = _Known(lambda word: self._as_bytes(self._tokens_of(word)))
        self._places = _Known(lambda word: self._places_of(word, first=False))
        self._trims = _trimming(backend)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        self._spells_all = all(self._model.token_to_id(character) is not None for character in alphabet)
        self._recent: dict[str, list[str]] = {}
        self._recent_characters = 0

    def ids(self, text: str) -> np.ndarray | None:
        """The tokens, `dtype` [n]; None where the library must be asked."""
        words = self._words(text)
        return self._joined(words) if words is not None else None

    def ids_and_places(self, text: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens, and where each begins and ends as the library says it: `dtype` [n], int64 [n, 2]."""
        if self._trims is None or (words := self._words(text)) is None:
            return None
        found = list(map(self._places.__getitem__, words))
        self._places.make_room()
        ids = self._joined(words)
        if found:
            found[0] = self._places_of(words[0], first=True)
        if b"" in found:
            return None
        counts = np.fromiter(map(len, found), np.int64, len(found)) // 8
        starts = np.fromiter(accumulate(map(len, words[:-1]), initial=0), np.int64, len(words))
        places = np.frombuffer(b"".join(found), np.int32).reshape(-1, 2).astype(np.int64)
        return ids, places + np.repeat(starts, counts)[:, None]

    def ids_and_trained(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The tokens, and which of them lie in parts of the text: `dtype` [n], bool [n].

        None where a part begins or ends inside of a word, or where its place in the text changes the tokens in front of
        the last one: what is in front of it has, alone, the tokens that it has here.
        """
        if self._trims is None or not self._spells_all or (parts := self._added.divide(text)) is None:
            return None
        edges = [edge for span in spans for edge in span]
        # With its spaces cut off, a token ends before the part does: see `Tokenizer.encode_with_places`.
        if self._trims and any(text[edge - 1] == " " for edge in edges if edge):
            return None
        size, last = self._dtype.itemsize, spans[-1][0]
        found: list[bytes] = []
        numbers: list[int] = []  # of the tokens in front of each edge
        at = count = 0
        for part, is_token in parts:
            words = [part] if is_token else self._known_words(part)
            if words is None:
                return None
            tokens = b"".join(map(self._ids.__getitem__, words))
            while len(numbers) < len(edges) and edges[len(numbers)] < at + len(part):
                inside = self._tokens_before(words, edges[len(numbers)] - at)
                if inside is None:
                    return None
                numbers.append(count + inside)
            if at < last < at + len(part):
                alone = self._words_between(part[: last - at])
                if alone is None or not tokens.startswith(b"".join(map(self._ids.__getitem__, alone))):
                    return None
            found.append(tokens)
            at += len(part)
            count += len(tokens) // size
        self._ids.make_room()
        numbers += [count] * (len(edges) - len(numbers))
        trained = np.zeros(count, bool)
        for first, end in zip(numbers[::2], numbers[1::2], strict=True):
            trained[first:end] = True
        return np.frombuffer(b"".join(found), dtype=self._dtype), trained

    def _tokens_before(self, words: Sequence[str], place: int) -> int | None:
        """How many tokens the words in front of a place have; None where it lies inside of a word."""
        at = count = 0
        for word in words:
            if at >= place:
                break
            at += len(word)
            count += len(self._ids[word])
        return count // self._dtype.itemsize if at == place else None

    def _joined(self, words: list[str]) -> np.ndarray:
        ids = np.frombuffer(b"".join(map(self._ids.__getitem__, words)), dtype=self._dtype)
        self._ids.make_room()
        return ids

    def _words(self, text: str) -> list[str] | None:
        parts = self._added.divide(text)
        return self._words_of(parts) if parts is not None else None

    def _words_of(self, parts: Sequence[tuple[str, bool]]) -> list[str] | None:
        found: list[str] = []
        for part, is_token in parts:
            if is_token:
                found.append(part)
                continue
            words = self._known_words(part) if len(parts) > 1 else self._words_between(part)
            if words is None:
                return None
            found += words
        return found

    def _known_words(self, part: str) -> list[str] | None:
        """Of a part of a conversation, whose beginning is asked for again."""
        words = self._recent.get(part)
        if words is None and (words := self._words_between(part)) is not None:
            self._remember(part, words)
        return words

    def _remember(self, part: str, words: list[str]) -> None:
        """The words of a part that is not known, where it is short; all others are forgotten where there are many."""
        if len(part) > _LONGEST_PART:
            return
        if self._recent_characters + len(part) > _MOST_CHARACTERS:
            self._recent.clear()
            self._recent_characters = 0
        self._recent[part] = words
        self._recent_characters += len(part)

    def _words_between(self, text: str) -> list[str] | None:
        """Those of a text without added tokens."""
        if text.isascii():
            words = self._patterns.words(text)
            return words if sum(map(len, words)) == len(text) else None
        if self._normalizer is not None and self._normalizer.normalize_str(text) != text:
            return None
        alike = self._patterns.ascii_alike(text)
        if alike is None:
            return None
        words = self._patterns.words(alike)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        ends = np.cumsum(lengths)
        if ends[-1] != len(text):
            return None
        others = np.flatnonzero(np.frombuffer(text.encode("utf-32-le"), np.uint32) > 127)
        changed = np.unique(np.searchsorted(ends, others, side="right"))
        starts = (ends - lengths)[changed]
        for number, first, last in zip(
            changed.tolist(), starts.tolist(), ends[changed].tolist(), strict=True
        ):
            words[number] = text[first:last]
        return words

    def _tokens_of(self, word: str) -> list[tuple[int, str]]:
        """As the library's model gives them, each with its spelling in characters that stand for bytes."""
        if (number := self._added.ids.get(word)) is not None:
            return [(number, word)]
        if word.isascii():
            spelled = word.translate(self._spellings)
        else:
            [(spelled, _)] = self._bytes.pre_tokenize_str(word)
        return [(token.id, token.value) for token in self._model.tokenize(spelled)]

    def _as_bytes(self, tokens: list[tuple[int, str]]) -> bytes:
        return array(self._type, [number for number, _ in tokens]).tobytes()

    def _places_of(self, word: str, *, first: bool) -> bytes:
        """Begin and end in the word of each of its tokens, int32 [n, 2]; empty where that is not known.

        Args:
            first: the word begins the text.
        """
        if word in self._added.ids:
            return np.array([0, len(word)], dtype=np.int32).tobytes()
        found = self._tokens_of(word)
        self._ids.add(word, self._as_bytes(found))
        tokens = [spelled for _, spelled in found]
        character = np.repeat(np.arange(len(word)), [len(one.encode()) for one in word])
        if sum(map(len, tokens)) != character.size:  # what has no token is spelled as another one
            return b""
        places, at = [], 0
        for token in tokens:
            begin, end = int(character[at]), int(character[at + len(token) - 1]) + 1
            at += len(token)
            if self._trims:
                spaces = len(token) - len(token.lstrip(_SPACE))
                if spaces == 1 and first and begin == 0 and self._trims == "but the first":
                    spaces = 0
                trailing = len(token) - len(token.rstrip(_SPACE))
                begin = min(begin + spaces, end)
                end = max(end - trailing, begin) if end >= trailing else end
            places += [begin, end]
        return np.array(places, dtype=np.int32).tobytes()


class _Known(dict[str, bytes]):
    """What was found of words; that of others is found when it is asked for."""

    def __init__(self, find: Callable[[str], bytes]) -> None:
        super().__init__()
        self._find = find
        self._missed = 0

    def __missing__(self, word: str) -> bytes:
        found = self._find(word)
        self._missed += len(word) <= _LONGEST
        self.add(word, found)
        return found

    def add(self, word: str, found: bytes) -> None:
        """Remember it, if there is room."""
        if len(word) <= _LONGEST and len(self) < _MOST_WORDS:
            self[word] = found

    def make_room(self) -> None:
        """Forget all, where half of what has come lately was not known."""
        if self._missed > 2 * _MOST_WORDS:
            self.clear()
            self._missed = 0


class _AddedTokens:
    """Tokens that are found in a text before it is divided into words.

    Attributes:
        ids: of those that are found as they are written.
    """

    def __init__(self, backend: Any) -> None:
        added = backend.get_added_tokens_decoder()
        plain = {
            number: token
            for number, token in added.items()
            if not (token.lstrip or token.rstrip or token.single_word or _has_space(token.content))
            and not backend.encode_special_tokens
        }
        self.ids = {token.content: int(number) for number, token in plain.items()}
        # The longest of those that begin at one place; what is normalized is looked for in what the others leave.
        self._stages = [
            _any_of([token.content for token in plain.values() if token.normalized is normalized])
            for normalized in (False, True)
        ]
        self._others = _any_of([token.content for number, token in added.items() if number not in plain])
        self._begins = sorted({token.content[:2] for token in added.values()})

    def divide(self, text: str) -> list[tuple[str, bool]] | None:
        """The parts of a text, and whether each is a token; None where one is found in another way."""
        if not any(begin in text for begin in self._begins):
            return [(text, False)]
        if self._others is not None and self._others.search(text):
            return None
        parts = [(text, False)]
        for stage in self._stages:
            if stage is not None:
                parts = [part for one in parts for part in (_divided(stage, one[0]) if not one[1] else [one])]
        return parts


def _divided(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, bool]]:
    at = 0
    for match in pattern.finditer(text):
        if at < match.start():
            yield text[at : match.start()], False
        yield match.group(), True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _has_space(text: str) -> bool:
    return text != text.strip() or _SPACE in text


def _trimming(backend: Any) -> str | None:
    """Whether the spaces around a token are no part of its place: "", "all", or "but the first" where the text begins
    with one; None where the library does something else to places."""
    if backend.post_processor is None:
        return ""
    content = json.loads(backend.post_processor.__getstate__())
    steps = content.get("processors", []) if content.get("type") == "Sequence" else [content]
    trims = [step for step in steps if step.get("type") == "ByteLevel" and step["trim_offsets"]]
    if any(step.get("type") not in ("ByteLevel", "TemplateProcessing") for step in steps) or len(trims) > 1:
        return None
    if not trims:
        return ""
    return "but the first" if trims[0]["add_prefix_space"] else "all"


def word_cache(backend: Any, dtype: np.dtype) -> WordCache | None:
    """For a tokenizer of the tokenizers library whose words are independent of each other; None for others."""
    normalizer = backend.normalizer
    if normalizer is not None and json.loads(normalizer.__getstate__()).get("type") not in _NORMALIZERS:
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    if getattr(backend.model, "dropout", None) or "" in added:
        return None
    if normalizer is not None and any(normalizer.normalize_str(text) != text for text in added):
        return None
    patterns = word_patterns(backend)
    return WordCache(backend, patterns, dtype) if patterns is not None else None

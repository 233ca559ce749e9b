"""Where a long text may be cut so that its pieces have the tokens of the whole: what a tokenizer holds of a text while
it works is a hundred times the text.

A place is taken only if it is shown to be safe for this tokenizer and the text around it. What follows it is encoded
with the character in front of it, whose tokens are dropped: some tokenizers put something in front of every text.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

CONTEXT = 1024
"""Characters on each side of a place that its tokens are compared over."""

# Where the classes of characters change, so that no run of letters, digits, spaces or signs is cut: a line that
# begins with a letter, a space between two words, a sign of East Asian punctuation before a letter.
_LETTER = r"[^\W\d_]"
_SIGN = r"[\u3001\u3002\uff01\uff0c\uff0e\uff1a\uff1b\uff1f]"
_PLACES = re.compile(rf"(?<=\S\n)(?={_LETTER})|(?<={_LETTER})(?= {_LETTER})|(?<={_SIGN})(?={_LETTER})")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_MOST_TRIED = 64


class SafeCuts:
    """The places at which texts may be cut for a tokenizer of the tokenizers library.

    A place is safe if, with `CONTEXT` characters on both sides of it, the tokens of the two sides are those of both
    together, and nothing can reach over it: the pre-tokenizer divides the text there, or the model is a plain BPE and
    no token of its vocabulary holds the two characters beside each other, so that no merge joins them in any context.

    Args:
        backend: a `tokenizers.Tokenizer` without truncation and padding.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._pairs: set[str] | None = None
        self._byte_fallback = False
        self._found = False
        self._tried = 0

    def next(self, text: str, begin: int) -> int | None:
        """The first safe place in ``text[begin:]`` that has its context behind it; None if there is none.

        Of a text in which 64 places in a row are not safe, no more are tried.
        """
        for number, match in enumerate(_PLACES.finditer(text, max(begin, 1), max(len(text) - CONTEXT, 0))):
            if number == _MOST_TRIED or (self._tried >= _MOST_TRIED and not self._found):
                return None  # a tokenizer that has no safe places is not asked again and again
            self._tried += 1
            if self._is_safe(text, match.start()):
                self._found = True
                return match.start()
        return None

    def _is_safe(self, text: str, place: int) -> bool:
        left, right, before = (
            text[max(place - CONTEXT, 0) : place],
            text[place : place + CONTEXT],
            text[place - 1],
        )
        whole, first, second, dropped = (
            self._backend.encode(part, add_special_tokens=False)
            for part in (left + right, left, before + right, before)
        )
        count = len(first.ids)
        if not 0 < count < len(whole.ids) or second.ids[: len(dropped.ids)] != dropped.ids:
            return False
        if first.ids + second.ids[len(dropped.ids) :] != whole.ids:
            return False
        if whole.word_ids[count - 1] != whole.word_ids[count]:
            return True
        return not self._may_merge(whole.tokens[count - 1], whole.tokens[count])

    def _may_merge(self, left: str, right: str) -> bool:
        """Whether the model could join the end of one token with the beginning of another, in some context."""
        if self._pairs is None:
            self._pairs = self._pairs_of_vocabulary()
        if not self._pairs:
            return True
        if self._byte_fallback and (_BYTE_TOKEN.fullmatch(left) or _BYTE_TOKEN.fullmatch(right)):
            return False  # the character itself is in no token
        return left[-1] + right[0] in self._pairs

    def _pairs_of_vocabulary(self) -> set[str]:
        """Any two characters that are neighbours in a token; nothing where the model is no plain BPE."""
        model = json.loads(self._backend.to_str())["model"]
        unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if model.get("type") != "BPE" or any(model.get(key) for key in unusual):
            return set()
        self._byte_fallback = bool(model.get("byte_fallback"))
        tokens = self._backend.get_vocab(with_added_tokens=True)
        return {pair for token in tokens for pair in map("".join, pairwise(token))}

"""How a byte-level tokenizer divides a text into words, in Python's regular expressions, for texts in ASCII.

The patterns of tokenizers are Oniguruma's, with classes of Unicode (``\\p{L}``). Over ASCII the two languages agree in
the small part of them that is taken here: which ASCII characters belong to a class is asked of the tokenizers library,
and so is, for any other character, which ASCII character the patterns can't tell it from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

# Of ByteLevel itself, where use_regex is on: github.com/huggingface/tokenizers, pre_tokenizers/byte_level.rs.
_OF_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS, DIGIT = "digits", "digit"
"""The stage that divides digits from all else, and each from the other."""
_ESCAPE = r"\\p\{\^?\w+\}|\\P\{\w+\}|\\[sSrnt]"
_LITERAL = r"[^\\^$.|?*+()\[\]{}]"
_IN_CLASS = r"[^\\^\[\]&-]"
_CLASS = rf"\[\^?(?:{_ESCAPE}|{_IN_CLASS}-{_IN_CLASS}|{_IN_CLASS})+\]"
# A quantifier with a + behind it gives nothing back, which Python knows from 3.11 on.
_QUANTIFIER = r"(?:[?*+]|\{\d+(?:,\d*)?\})(?![+?])"
_TOKEN = re.compile(
    rf"(?P<escape>{_ESCAPE})|(?P<set>{_CLASS})|(?P<literal>{_LITERAL})|(?P<other>\(\?[:!=]|\(\?i:|\(|\)|\||{_QUANTIFIER})"
)
_PART_OF_SET = re.compile(rf"(?P<escape>{_ESCAPE})|(?P<range>{_IN_CLASS}-{_IN_CLASS})|(?P<one>{_IN_CLASS})")
_PLAIN_ESCAPES = {r"\r": "\r", r"\n": "\n", r"\t": "\t"}
_OTHERS = re.compile(r"[^\x00-\x7f]+")
_ASCII = [chr(code) for code in range(128)]


class WordPatterns:
    """The patterns of a tokenizer's stages, each of which divides what the one before has left.

    Args:
        stages: patterns of Oniguruma's; `DIGITS` or `DIGIT`.

    Raises:
        ValueError: a pattern has a part that is not known here.
    """

    def __init__(self, stages: list[str]) -> None:
        self._tests: dict[str, Callable[[str], bool]] = {}  # of a single character, by its pattern
        self._same: dict[int, int | None] = {}
        self._case_ignored = [stage.casefold() for stage in stages if "(?i" in stage]
        self._stages = [_stage(self._translated(stage)) for stage in stages]
        # A letter that stands for others must not be one that a pattern spells, which may ignore its case.
        spelled = {letter for stage in stages for letter in stage if letter.isalpha()}
        spelled |= {letter.swapcase() for letter in spelled}
        self._alike = {self._answers(one): one for one in reversed(_ASCII) if one not in spelled}

    def words(self, text: str) -> list[str]:
        """The words of a text that is ASCII."""
        first, *others = self._stages
        found = first(text)
        for stage in others:
            found = [part for word in found for part in stage(word)]
        return found

    def ascii_alike(self, text: str) -> str | None:
        """A text of ASCII characters that is divided at the same places; None if there is none."""
        try:
            return _OTHERS.sub(self._replaced, text)
        except KeyError:
            return None

    def _replaced(self, match: re.Match[str]) -> str:
        found = []
        for character in match.group():
            code = ord(character)
            if code not in self._same:
                folded = character.casefold()  # some characters are letters of ASCII then
                fits = not any(folded in pattern for pattern in self._case_ignored)
                alike = self._alike.get(self._answers(character)) if fits else None
                self._same[code] = ord(alike) if alike is not None else None
            same = self._same[code]
            if same is None:
                raise KeyError(character)
            found.append(chr(same))
        return "".join(found)

    def _answers(self, character: str) -> tuple[bool, ...]:
        """What the library says of a character that any part of a pattern asks for."""
        return tuple(test(character) for test in self._tests.values())

    def _test(self, pattern: str) -> Callable[[str], bool]:
        """Whether a part of a pattern matches a character."""
        from tokenizers import Regex, pre_tokenizers

        if pattern not in self._tests:
            if pattern == DIGITS:
                digits = pre_tokenizers.Digits()
                self._tests[pattern] = lambda one: len(digits.pre_tokenize_str(f"a{one}")) == 2
            else:
                removed = pre_tokenizers.Split(Regex(pattern), "removed")
                self._tests[pattern] = lambda one: not removed.pre_tokenize_str(one)
        return self._tests[pattern]

    def _members(self, pattern: str) -> str:
        return "".join(re.escape(one) for one in _ASCII if self._test(pattern)(one))

    def _translated(self, pattern: str) -> str:
        """For texts in ASCII."""
        if pattern in (DIGITS, DIGIT):
            members = self._members(DIGITS)
            return f"[{members}]{'+' if pattern == DIGITS else ''}|[^{members}]+"
        found, at = "", 0
        while at < len(pattern):
            match = _TOKEN.match(pattern, at)
            if match is None:
                raise ValueError(f"{pattern[at : at + 10]!r} in a pattern")
            token = match.group()
            if match["escape"] or match["set"]:
                members = self._members(token)
                found += f"[{members}]" if members else "(?!)"
            elif match["literal"]:
                self._test(re.escape(token) if token.isascii() else token)
                found += re.escape(token)
            else:
                found += "(?:" if token == "(" else token
            at = match.end()
        return found


def _stage(pattern: str) -> Callable[[str], list[str]]:
    """What divides a text into the matches of a pattern, and what lies between them."""
    compiled = re.compile(pattern, re.ASCII)
    if compiled.match(""):
        raise ValueError("a pattern that matches nothing at all")
    probe = _probe()
    if "".join(compiled.findall(probe)) == probe:
        return compiled.findall  # twice as fast; whoever asks looks whether something is missing
    divided = re.compile(f"({pattern})", re.ASCII)
    return lambda text: [part for part in divided.split(text) if part]


def word_patterns(backend: Any) -> WordPatterns | None:
    """The patterns of a tokenizer of the tokenizers library; None where its words are made in another way.

    They are taken only if a text with all ASCII characters is divided as the library does it.
    """
    if backend.pre_tokenizer is None:
        return None
    content = json.loads(backend.pre_tokenizer.__getstate__())
    stages = content.get("pretokenizers", []) if content.get("type") == "Sequence" else [content]
    patterns: list[str] = []
    for number, stage in enumerate(stages, start=1):
        kind = stage.get("type")
        if kind == "ByteLevel" and number == len(stages) and not stage["add_prefix_space"]:
            patterns += [_OF_BYTE_LEVEL] if stage["use_regex"] else []
        elif (
            kind == "Split"
            and number < len(stages)
            and stage["behavior"] == "Isolated"
            and not stage["invert"]
            and "Regex" in stage["pattern"]
        ):
            patterns.append(stage["pattern"]["Regex"])
        elif kind == "Digits" and number < len(stages):
            patterns.append(DIGIT if stage["individual_digits"] else DIGITS)
        else:
            return None
    if not patterns or stages[-1].get("type") != "ByteLevel":
        return None
    try:
        found = WordPatterns(patterns)
    except (ValueError, re.error):
        return None
    text = _probe()
    places = [place for _, place in backend.pre_tokenizer.pre_tokenize_str(text)]
    return found if [text[first:last] for first, last in places] == found.words(text) else None


def _probe() -> str:
    choice = random.Random(0)
    usual = "aA zZ019 \n\r\t  '.,!?_-/(){}\"stremvdl"
    runs = [
        choice.choice(choice.choice((usual, _ASCII))) * choice.choice((1, 1, 1, 2, 5)) for _ in range(4000)
    ]
    return "".join([*_ASCII, *runs, " it's we'RE I'll don't\n\n  x \n \n"])

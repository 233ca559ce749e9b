"""Tokens from the cache of words are those of the tokenizers library, and so are their places."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from dstrain.data.chat.template import Encoded, _Rendered, _trained_by_places
from dstrain.data.tokenizing import word_cache as module
from dstrain.data.tokenizing.tokenizers import FolderTokenizer
from dstrain.data.tokenizing.word_cache import WordCache, word_cache

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT_OSS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    "the",
    "cat",
    "Sat",
    "isn't",
    "WE'LL",
    "THEY'RE",
    "D\u017d",
    "model",
    "été",
    "e\u0301a",
    "日本語",
    "한국어",
]
WORDS += [
    "ß",
    "\ufb01n",
    "\u017f",
    "'\u017f",
    "'S",
    "\u212a",
    "1234567",
    "3.14159",
    "\u0663\u0664",
    "½",
    "\u2167",
    "...",
]
WORDS += [
    "!?",
    "--",
    "(",
    ")",
    "_id",
    "<s>",
    "<|end|>",
    "<|ending|>",
    "<mask>",
    "😀",
    "👩\u200d💻",
    "//",
    "a/b",
]
WORDS += ["\x00", "\x1c", "\x7f", "\u0120", "\u010a"]
GAPS = [
    "",
    " ",
    "  ",
    "    ",
    "\n",
    "\r\n",
    "\n\n  ",
    " \n",
    "\t",
    "\x0b",
    "\x85",
    "\u3000",
    "\xa0",
    "\u2028",
    "\u200b",
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from(GAPS),
        st.characters(codec="utf-8"),
        st.text("aA1 \n'.", max_size=6),
    ),
    max_size=40,
).map("".join)


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def byte_level(*stages: Any, regex: bool = False) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*stages, last]) if stages else last


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: byte_level(regex=True),
    "llama3": lambda: byte_level(split(LLAMA_3)),
    "gpt-oss": lambda: byte_level(split(GPT_OSS)),
    "digits one by one": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
    "digits": lambda: byte_level(pre_tokenizers.Digits(individual_digits=False), regex=True),
    "three stages": lambda: byte_level(
        split(r"\p{N}{1,3}"), split("[一-龥\u3040-\u309f\u30a0-\u30ff]+"), split(GPT_2)
    ),
    "gaps": lambda: byte_level(split(r"\p{L}+")),
}
PROCESSORS: dict[str, Any] = {
    "none": None,
    "trims": processors.ByteLevel(trim_offsets=True),
    "trims all": processors.ByteLevel(trim_offsets=True, add_prefix_space=False),
    "keeps": processors.ByteLevel(trim_offsets=False),
}


def trained(pre_tokenizer: Any, model: Any = None, trainer: Any = None) -> Tokenizer:
    made = Tokenizer(model or models.BPE())
    made.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [f"{a}{gap}{b}" for a in WORDS for b in WORDS[::3] for gap in GAPS[:6]]
    trainer = trainer or trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<s>", "<|end|>", "<|ending|>"])
    made.add_tokens([AddedToken("//", normalized=True)])
    return made


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {kind: trained(make()) for kind, make in KINDS.items()}


def cache_of(backend: Tokenizer) -> WordCache:
    found = word_cache(backend, np.dtype(np.uint16))
    assert found is not None
    return found


def same(backend: Tokenizer, cache: WordCache, text: str) -> int:
    """Whether the cache has answered, with what the library says."""
    expected = backend.encode(text, add_special_tokens=False)
    ids, both = cache.ids(text), cache.ids_and_places(text)
    assert (ids is None) >= (both is None) or cache._trims is None or both is None
    if ids is not None:
        assert ids.tolist() == expected.ids, text
    if both is not None:
        assert both[0].tolist() == expected.ids
        assert [tuple(place) for place in both[1].tolist()] == expected.offsets, text
    return ids is not None


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_library(kind: str, processor: str, made: dict[str, Tokenizer]) -> None:
    backend = made[kind]
    backend.post_processor = PROCESSORS[processor]

    cache = cache_of(backend)

    @settings(deadline=None, max_examples=40)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=3))
    def check(texts: list[str]) -> None:
        for text in [*texts, *texts]:  # the second time all words are known
            same(backend, cache, text)

    check()


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_places_say(
    kind: str, processor: str, made: dict[str, Tokenizer]
) -> None:
    """The short way gives the tokens and bits of the long one, or nothing."""
    backend = made[kind]
    backend.post_processor = PROCESSORS[processor]
    tokenizer = FolderTokenizer.__new__(FolderTokenizer)
    tokenizer.__dict__ |= {"_backend": backend, "_words": None, "_characters": 0, "vocab_size": 999}
    cache = cache_of(backend)
    answered = 0

    def compare(text: str, spans: list[tuple[int, int]]) -> None:
        nonlocal answered
        found = cache.ids_and_trained(text, spans)
        if found is not None:
            answered += 1
            [expected] = _trained_by_places(tokenizer, [_Rendered(text, tuple(spans))], with_stops=True)
            assert isinstance(expected, Encoded), (text, spans)
            assert found[0].tolist() == expected.ids.tolist()
            assert found[1].tolist() == expected.trained.tolist(), (text, spans)

    @settings(deadline=None, max_examples=40)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        edges = np.cumsum([0, *map(len, texts)]).tolist()
        spans = [span for span in list(pairwise(edges))[::2] if span[0] < span[1]]
        if spans:
            compare("".join(texts), spans)

    check()
    answered = 0
    compare("<s>user\n hi<|end|><s>assistant\nyes<|end|>", [(31, 41)])
    assert answered == 1


@pytest.mark.parametrize("kind", KINDS)
def test_usual_texts_are_answered(kind: str, made: dict[str, Tokenizer]) -> None:
    cache = cache_of(made[kind])
    texts = [
        "The cat isn't 12 years\n\nold.",
        "été — naïve “quotes” 20 €\xa0…",
        "<s>system\n<|end|>",
        "한국어 Привет",
        "",
    ]
    for text in texts:
        # Letters without case are of both kinds that this pattern tells apart, and none of ASCII's are.
        assert same(made[kind], cache, text) or (kind == "gpt-oss" and "한" in text), text


def test_normalized_texts_are_answered_and_others_left_to_the_library() -> None:
    backend = trained(byte_level(split(LLAMA_3)))
    backend.normalizer = normalizers.NFC()
    cache = cache_of(backend)
    assert same(backend, cache, "été") and cache.ids("e\u0301te\u0301") is None


def test_tokens_that_take_spaces_along_are_left_to_the_library() -> None:
    backend = trained(byte_level(regex=True))
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    cache = cache_of(backend)
    assert cache.ids("a <mask> b") is None and same(backend, cache, "a <mas k> b")
    backend.encode_special_tokens = True
    cache = cache_of(backend)
    assert cache.ids("a <s> b") is None and same(backend, cache, "a b")


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    return trained(byte_level(regex=True), models.Unigram(), trainer)


def without_some_bytes() -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    return trained(byte_level(regex=True), models.BPE(unk_token="<unk>"), trainer)


@pytest.mark.parametrize("make", [unigram, without_some_bytes])
def test_other_models_of_words(make: Callable[[], Tokenizer]) -> None:
    backend = make()
    cache = cache_of(backend)
    for text in ["The cat isn't old.", "Ωμέγα \x7f q", "日本語 😀"]:
        assert same(backend, cache, text)


REFUSED: dict[str, Callable[[], Any]] = {
    "a space in front": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no bytes": lambda: pre_tokenizers.Whitespace(),
    "none": lambda: None,
    "possessive": lambda: byte_level(split(r"\p{L}++|[\s\S]")),
    "merged": lambda: byte_level(split(" ", "merged_with_next"), regex=True),
    "punctuation": lambda: byte_level(pre_tokenizers.Punctuation(), regex=True),
    "an anchor": lambda: byte_level(split(r"\s+$|\p{L}+")),
    "nothing at all": lambda: byte_level(split(r"\p{L}*")),
    "a border of words": lambda: byte_level(split(r"\b\p{L}+")),
    "bytes first": lambda: pre_tokenizers.Sequence([byte_level(regex=True), pre_tokenizers.Digits()]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_left_to_the_library(kind: str) -> None:
    backend = Tokenizer(models.BPE())
    pre_tokenizer = REFUSED[kind]()
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    assert word_cache(backend, np.dtype(np.uint16)) is None


def test_random_merges_and_other_normalizers_are_left_to_the_library() -> None:
    backend = Tokenizer(models.BPE(dropout=0.1))
    backend.pre_tokenizer = byte_level(regex=True)
    assert word_cache(backend, np.dtype(np.uint16)) is None
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level(regex=True)
    backend.normalizer = normalizers.Lowercase()
    assert word_cache(backend, np.dtype(np.uint16)) is None


def test_the_memory_stays_bounded(made: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_WORDS", 50)
    backend = made["gpt2"]
    cache = cache_of(backend)
    for number in range(300):
        assert same(backend, cache, f"w{'x' * (number % 90)} {number} and the cat")
        assert len(cache._ids) <= 50
    assert "cat" in cache._ids or " cat" in cache._ids


def test_what_is_remembered_of_conversations_is_bounded(made: dict[str, Tokenizer], monkeypatch) -> None:
    """By characters: a thousand turns of a megabyte each would not fit."""
    monkeypatch.setattr(module, "_MOST_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_LONGEST_PART", 300)
    backend = made["gpt2"]
    cache = cache_of(backend)
    for number in range(60):
        text = f"<s>{'the cat ' * (number + 3)}<|end|>Sat {number}"
        assert same(backend, cache, text)
        assert sum(map(len, cache._recent)) == cache._recent_characters <= 1000
        assert max(map(len, cache._recent), default=0) <= 300
    assert cache._recent, "short ones are remembered"

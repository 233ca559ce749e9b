"""Bounds of the numbers in a model's config.json: a model of 10^8 layers would be built without end.

The largest models in the open have 10^2 layers, a width of 10^5, 10^3 experts and 10^6 words: each bound is far above.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dstrain.errors import DstrainError

LARGEST_FILE = 10_000_000
"""Bytes of a config.json."""
LARGEST_TOKENIZER_FILE = 256_000_000

_LAYERS = re.compile(r"layers?$|layers?_|depth|blocks?$|num_stages|num_mtp|nextn")
_EXPERTS = re.compile(r"experts?$")
_POSITIONS = re.compile(r"position|ctx|context|length|seq|window|token|chunk|theta|period|max_")
_VOCABULARY = re.compile(r"vocab|embeddings$")
_COUNTS = re.compile(r"^(num|n)_|heads?$|^num|groups?$|kernel|conv")
# (names, largest, what it is called); the first that fits decides.
_BOUNDS = (
    (_VOCABULARY, 2**26),
    (re.compile(r"_id$|_ids$|_index$"), 2**31),
    (_POSITIONS, 2**40),
    (_LAYERS, 2_048),
    (_EXPERTS, 2**14),
    (re.compile(r"size|dim|embd|model|inner|hidden|width|rank|channels|intermediate"), 2**22),
    (_COUNTS, 2**16),
    (re.compile(r""), 2**63),
)
# Whole numbers below zero, which stand for "none" or "from the end" at other keys, build a model of another size here.
_SIZES = re.compile(
    r"(num|n)_(hidden_|decoder_|encoder_)?(layers?|blocks?|heads?)|num_(attention|key_value)_heads"
    r"|(hidden|vocab|intermediate)_size|n_embd|d_model|head_dim"
)
_MOST_EXPERTS = 2**16
"""Of all layers together."""
_MOST_VALUES = 200_000


def refuse_sizes(values: Mapping[str, Any], *, where: str) -> None:
    """Refuse numbers that no model has. Nothing is built for it.

    Args:
        values: of config.json, with those of its parts (``text_config``).

    Raises:
        DstrainError: names the key.
    """
    layers = experts = 1
    for number, (path, value) in enumerate(leaves_of(values)):
        if number > _MOST_VALUES:
            raise DstrainError(
                f"the model's configuration has more than {_MOST_VALUES:,} values",
                where=where,
                hint="check that this is a model's config.json",
            )
        name = path.rpartition(".")[2].lower()
        if isinstance(value, float) and math.isnan(value):
            raise DstrainError(
                f"{path} is NaN, which is not a number", where=where, hint="check the model's config.json"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        pattern, most = next(bound for bound in _BOUNDS if bound[0].search(name))
        if abs(value) > most:
            raise DstrainError(
                f"{path} is {_number(value)}, and no model has more than {most:,}",
                where=where,
                hint="check the model's config.json",
            )
        if value < 0 and _SIZES.fullmatch(name):
            raise DstrainError(
                f"{path} is {_number(value)}, and no model has less than none",
                where=where,
                hint="check the model's config.json",
            )
        if pattern is _LAYERS:
            layers = max(layers, value)
        elif pattern is _EXPERTS and "_per_" not in name:
            experts = max(experts, value)
    if layers * experts > _MOST_EXPERTS:
        raise DstrainError(
            f"{layers:,} layers of {experts:,} experts are {layers * experts:,} experts, and no model has more than"
            f" {_MOST_EXPERTS:,}",
            where=where,
            hint="check the model's config.json",
        )


def leaves_of(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value that is neither an object nor a list, with its path; without recursion, however deep they lie."""
    left: list[tuple[str, Any]] = list(values.items())
    while left:
        path, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{path}.{key}"[-200:], part) for key, part in value.items()]
        elif isinstance(value, list):
            left += [(path, part) for part in value]
        else:
            yield path, value


def _number(value: int) -> str:
    """Python itself writes out no more than 4,300 digits."""
    return f"{value:,}" if abs(value) < 10**30 else f"a number of {value.bit_length():,} bits"

"""Records that hold tokens: ``input_ids``, and where not all of them are trained, ``labels``.

Documents are taken as they are: nothing is put in front of them or behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstrain.data.chat.formats import TOKENS, name_of_kind
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import FormattedSource
from dstrain.data.rows.packing import IGNORED
from dstrain.errors import DstrainError

_EXAMPLE = 'each line is one object: {"input_ids": [17, 4, 256], "labels": [-100, 4, 256]}'


@dataclass(frozen=True)
class TokenRecords(FormattedSource):
    """The files of a corpus whose records hold tokens.

    Attributes:
        first: the place of the record that told the format; empty where it was named.
    """

    options: RecordOptions
    first: str = ""
    format: str = TOKENS

    @property
    def state(self) -> list[Any]:
        """As of a `Source`."""
        return [
            *self.source.state,
            TOKENS,
            sorted(self.options.data_fields.items()),
            self.options.on_bad_record,
        ]


@dataclass(frozen=True)
class TokenDocument:
    """A document: its tokens, int64 [n], and which of them are to be predicted, bool [n]; None: all."""

    ids: np.ndarray
    trained: np.ndarray | None


def read_tokens(record: Mapping[str, Any], vocab_size: int) -> TokenDocument:
    """The document in a record.

    ``labels`` are those of transformers: each is the token at its place, or -100 where it is not trained; they are not
    shifted. What an ``attention_mask`` hides at the end is padding, and left out.

    Raises:
        DstrainError: a value is not what it should be, or no token of the vocabulary.
    """
    if "input_ids" not in record:
        keys = ", ".join(repr(key) for key in list(record)[:12]) or "none"
        raise DstrainError(f"this line has no field 'input_ids'; its fields are {keys}", hint=_EXAMPLE)
    ids = _whole_numbers(record["input_ids"], "input_ids")
    labels = None if record.get("labels") is None else _whole_numbers(record["labels"], "labels", ids.size)
    if record.get("attention_mask") is not None:
        size = _unpadded(_whole_numbers(record["attention_mask"], "attention_mask", ids.size))
        if labels is not None and (labels[size:] != IGNORED).any():
            at = size + int((labels[size:] != IGNORED).argmax())
            raise DstrainError(
                f"labels[{at}] is {labels[at]}, and attention_mask hides that token",
                hint=f"the labels of padding are {IGNORED}",
            )
        ids, labels = ids[:size], labels if labels is None else labels[:size]
    out = (ids < 0) | (ids >= vocab_size)
    if out.any():
        at = int(out.argmax())
        raise DstrainError(
            f"input_ids[{at}] is {ids[at]}, and the tokenizer has the tokens 0 to {vocab_size - 1:,}",
            hint="name the tokenizer that these tokens were made with",
        )
    _refuse_positions(record.get("position_ids"), ids.size)
    return TokenDocument(ids, None if labels is None else _trained(ids, labels))


def _trained(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    trained: np.ndarray = labels != IGNORED
    wrong = trained & (labels != ids)
    if wrong.any():
        at = int(wrong.argmax())
        shifted = ids.size > 1 and bool((~trained[:-1] | (labels[:-1] == ids[1:])).all())
        raise DstrainError(
            f"labels[{at}] is {labels[at]}, which is neither input_ids[{at}] = {ids[at]} nor {IGNORED}",
            hint="these labels are shifted by one: write them unshifted, as transformers has them"
            if shifted
            else f"a label is the token at its own place, or {IGNORED} where it is not trained",
        )
    if ids.size and not trained[1:].any():
        raise DstrainError(
            f"no token of this record is trained: its labels behind the first, which nothing predicts, are {IGNORED}",
            hint="leave the record out: on_bad_record: skip; or write labels without -100 for what is to be trained",
        )
    return trained


def _whole_numbers(values: Any, name: str, size: int | None = None) -> np.ndarray:
    """A list of whole numbers: int64 [n]."""
    if not isinstance(values, list):
        raise DstrainError(
            f"the field {name!r} holds {name_of_kind(values)}, not a list of numbers", hint=_EXAMPLE
        )
    if set(map(type, values)) - {int}:
        at, value = next((at, value) for at, value in enumerate(values) if type(value) is not int)
        raise DstrainError(f"{name}[{at}] is {_shown(value)}, not a whole number", hint=_EXAMPLE)
    if size is not None and len(values) != size:
        raise DstrainError(
            f"{name} has {len(values):,} values, and input_ids {size:,}", hint="write one for each token"
        )
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        at = next(at for at, value in enumerate(values) if not -(2**63) <= value < 2**63)
        raise DstrainError(f"{name}[{at}] is a number of more than 63 bits", hint=_EXAMPLE) from None


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float) else name_of_kind(value)


def _unpadded(mask: np.ndarray) -> int:
    """How many tokens stand in front of the padding that a mask hides."""
    size = int(mask.sum()) if ((mask == 0) | (mask == 1)).all() else -1
    if size < 0 or not mask[:size].all():
        raise DstrainError(
            "attention_mask is not ones and then zeros",
            hint="padding stands behind a document; leave the mask out where there is none",
        )
    return size


def _refuse_positions(positions: Any, size: int) -> None:
    if positions is not None and (not isinstance(positions, list) or positions[:size] != list(range(size))):
        raise DstrainError(
            "position_ids do not count on from 0: there is more than one document in this record",
            hint="write each document as a record of its own: they are packed into samples here",
        )

"""Files with rows that were made together: written once, and mapped into memory by those that train on them.

A file is one line of JSON, filled up with spaces to a multiple of 64 bytes, and arrays that begin at such multiples. Of
a row there are its tokens with the one behind them, a bit for each label that counts and one for each token that a
document begins with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dstrain.data.rows.packing import IGNORED, Batch
from dstrain.data.streaming.making import MadeRows
from dstrain.data.streaming.state import StreamState
from dstrain.strict_json import to_json

_ALIGNED = 64
_CHUNK = 2**18
"""Tokens of rows that are made at once."""


def write_segment(path: Path, made: MadeRows, dtype: np.dtype) -> str:
    """Write rows to a file; returns a hash of them.

    Args:
        dtype: of the tokens.
    """
    seq_len, count = made.rows.seq_len, made.order.size
    arrays = _arrays(count, seq_len, dtype)
    content: dict[str, np.ndarray] = {name: np.zeros(shape, kind) for name, (kind, shape) in arrays.items()}
    content["labels"][:] = made.rows.label_tokens(made.order)
    content["filled"][:] = made.rows.filled(made.order)
    step = max(1, _CHUNK // seq_len)
    for first in range(0, count, step):
        some = slice(first, first + step)
        batch = made.rows.rows(made.order[some])
        labelled = batch.labels != IGNORED
        content["tokens"][some, :-1] = batch.input_ids
        content["tokens"][some, -1] = np.where(labelled[:, -1], batch.labels[:, -1], 0)
        content["labelled"][some] = np.packbits(labelled, axis=1, bitorder="little")
        content["begins"][some] = np.packbits(batch.position_ids == 0, axis=1, bitorder="little")
    digest = hashlib.blake2b(digest_size=16)
    for array in content.values():
        digest.update(array.data)
    header = {
        "rows": count,
        "seq_len": seq_len,
        "dtype": dtype.name,
        "state": made.state.to_json(),
        "after": made.after.to_json(),
        "check": digest.hexdigest(),
    }
    with open(path, "xb") as file:
        line = to_json(header).encode()
        file.write(line.ljust(-(-(len(line) + 1) // _ALIGNED) * _ALIGNED - 1) + b"\n")
        for array in content.values():
            _fill_up(file)
            file.write(array.data)
        _fill_up(file)
    return digest.hexdigest()


def _fill_up(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % _ALIGNED))


def _arrays(count: int, seq_len: int, dtype: np.dtype) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Types and shapes of a file's arrays, in their order."""
    number, bits = np.dtype(np.int64), np.dtype(np.uint8)
    packed = -(-seq_len // 8)
    return {
        "labels": (number, (count,)),
        "filled": (number, (count,)),
        "tokens": (dtype, (count, seq_len + 1)),
        "labelled": (bits, (count, packed)),
        "begins": (bits, (count, packed)),
    }


@dataclass(frozen=True)
class Segment:
    """The rows of a file, which may be removed meanwhile.

    Attributes:
        state: how to make them again.
        after: how to make what follows.
        label_tokens: how many labels of each row count: int64 [rows].
        filled: how many tokens of each row are no padding: int64 [rows].
    """

    state: StreamState
    after: StreamState
    label_tokens: np.ndarray
    filled: np.ndarray
    seq_len: int
    _tokens: np.ndarray
    _labelled: np.ndarray
    _begins: np.ndarray

    @property
    def first(self) -> int:
        """The number of the first row."""
        return self.state.first

    @property
    def end(self) -> int:
        """The number of the row behind the last one."""
        return self.after.first

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Map a file that is complete. Raises OSError."""
        with open(path, "rb") as file:
            line = file.readline()
        header: dict[str, Any] = json.loads(line)
        at = len(line)
        data = np.memmap(path, np.uint8, mode="r")
        found = {}
        for name, (kind, shape) in _arrays(
            header["rows"], header["seq_len"], np.dtype(header["dtype"])
        ).items():
            size = int(np.prod(shape)) * kind.itemsize
            found[name] = data[at : at + size].view(kind).reshape(shape)
            at += -(-size // _ALIGNED) * _ALIGNED
        state = StreamState.from_json({**header["state"], "check": header["check"]})
        return cls(
            state,
            StreamState.from_json(header["after"]),
            np.array(found["labels"]),
            np.array(found["filled"]),
            header["seq_len"],
            found["tokens"],
            found["labelled"],
            found["begins"],
        )

    def rows(self, places: np.ndarray) -> Batch:
        """The rows at these places of the file: int [n] -> three int64 [n, seq_len]."""
        tokens = self._tokens[places].astype(np.int64)
        labelled = np.unpackbits(self._labelled[places], axis=1, count=self.seq_len, bitorder="little")
        begins = np.unpackbits(self._begins[places], axis=1, count=self.seq_len, bitorder="little")
        at = np.arange(self.seq_len, dtype=np.int64)
        return Batch(
            input_ids=np.ascontiguousarray(tokens[:, :-1]),
            position_ids=at - np.maximum.accumulate(np.where(begins, at, 0), axis=1),
            labels=np.where(labelled, tokens[:, 1:], IGNORED),
        )

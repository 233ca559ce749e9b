"""Reads the index of one of Megatron's token files.

Source of the format: megatron/core/datasets/indexed_dataset.py of github.com/NVIDIA/Megatron-LM: nine bytes of magic,
the version (uint64), the code of the tokens' type (uint8), the numbers of sequences and of document bounds (uint64
each), then the sequences' lengths (int32) and places in bytes (int64), and at which sequence each document begins
(int64), the end included. All little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.token_files.kinds import MEGATRON_MAGIC
from dstrain.errors import DstrainError

_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMBERS_WITH_FRACTIONS = {6: "float64", 7: "float32"}
_HEADER = np.dtype(
    [("magic", "V9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("bounds", "<u8")]
)
_AGAIN = "copy it again, or write it again with Megatron's preprocess_data.py"


@dataclass(frozen=True)
class MegatronIndex:
    """What stands in an index.

    Attributes:
        dtype: of the tokens.
        lengths: of each document in tokens, int64 [documents]; they lie behind each other.
    """

    dtype: np.dtype
    lengths: np.ndarray


def read_index(path: Path) -> MegatronIndex:
    """Read an index.

    Raises:
        DstrainError: it is of another version, cut, or does not fit together.
        OSError: it can't be read.
    """
    # Nothing can be mapped of an empty file.
    content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    if content.size < _HEADER.itemsize or content[: len(MEGATRON_MAGIC)].tobytes() != MEGATRON_MAGIC:
        raise DstrainError("this is not an index of Megatron's", hint=_AGAIN, where=str(path))
    header = content[: _HEADER.itemsize].view(_HEADER)[0]
    version, code = int(header["version"]), int(header["code"])
    sequences, bounds = int(header["sequences"]), int(header["bounds"])
    if version != 1:
        raise DstrainError(
            f"this index has version {version}, and 1 alone is known", hint=_AGAIN, where=str(path)
        )
    if code not in _DTYPES:
        kind = _NUMBERS_WITH_FRACTIONS.get(code, f"of a kind that is not known ({code})")
        raise DstrainError(
            f"the numbers of this data set are {kind}, and tokens are whole numbers",
            hint=_AGAIN,
            where=str(path),
        )
    needed = _HEADER.itemsize + 12 * sequences + 8 * bounds
    # Behind it, data sets of several modalities have a byte for each sequence.
    if content.size not in (needed, needed + sequences):
        raise DstrainError(
            f"this index has {content.size:,} bytes, and {sequences:,} sequences and {bounds:,} bounds of documents"
            f" take {needed:,}",
            hint=f"{_AGAIN}: it may be cut off",
            where=str(path),
        )
    if content.size == needed + sequences and content[needed:].any():
        raise DstrainError(
            "this data set holds more than text: some of its sequences have a mode",
            hint=_AGAIN,
            where=str(path),
        )
    dtype = np.dtype(_DTYPES[code])
    at = _HEADER.itemsize
    lengths = content[at : at + 4 * sequences].view("<i4").astype(np.int64)
    places = content[at + 4 * sequences : at + 12 * sequences].view("<i8")
    starts = content[at + 12 * sequences : needed].view("<i8")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (places != ends[:-1] * dtype.itemsize).any():
        raise DstrainError(
            "the sequences of this index do not lie behind each other", hint=_AGAIN, where=str(path)
        )
    if not starts.size or starts[0] != 0 or starts[-1] != sequences or (starts[1:] < starts[:-1]).any():
        raise DstrainError(
            "the documents of this index do not begin at its first sequence, follow each other, and end at its last",
            hint=_AGAIN,
            where=str(path),
        )
    return MegatronIndex(dtype, np.diff(ends[starts]))

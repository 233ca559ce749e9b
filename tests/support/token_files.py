"""Writes files of tokens as Megatron, nanoGPT and llm.c write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}


def write_megatron(
    path: Path,
    documents: Sequence[Sequence[Sequence[int]]],
    dtype: str = "uint16",
    *,
    version: int = 1,
    code: int | None = None,
    modes: bytes = b"",
) -> Path:
    """``path`` and its index, of documents that are lists of sequences; returns ``path``."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    places = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    bounds = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype("<i8")
    np.array([token for sequence in sequences for token in sequence], dtype=dtype).tofile(path)
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", version, _CODES[dtype] if code is None else code, len(sequences), len(bounds))
        + lengths.tobytes()
        + places.astype("<i8").tobytes()
        + bounds.tobytes()
        + modes
    )
    return path


def write_nanogpt(path: Path, tokens: Sequence[int], dtype: str = "uint16") -> Path:
    np.array(tokens, dtype=dtype).tofile(path)
    return path


def write_llm_c(path: Path, tokens: Sequence[int], *, wide: bool = False, told: int | None = None) -> Path:
    """``told``: how many tokens its header speaks of."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = (20240801 if wide else 20240520, 7 if wide else 1, len(tokens) if told is None else told)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype="<u4" if wide else "<u2").tobytes())
    return path

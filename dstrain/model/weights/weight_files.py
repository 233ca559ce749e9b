"""The weight files of a model folder: the name and location of each tensor.

Safetensors files begin with 8 bytes (the length of a header, little-endian) and that header, JSON with type, shape and
place of each tensor: https://huggingface.co/docs/safetensors. Of a PyTorch file (``.bin``) torch tells the same without
reading data: https://docs.pytorch.org/docs/stable/notes/serialization.html#utilities-to-save-storage-offsets.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dstrain.errors import DstrainError, way_out
from dstrain.foreign_weights import describe_foreign_weights

PIECE = 32 * 1024 * 1024
_CHECKED = 2**20  # values that are looked at together
"""Bytes that are read at a time where a tensor's type is changed on the way."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files that a folder's weights are looked for in; the first that is there is taken."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_READ_ALWAYS = 64  # bytes; the sizes of the tensors are among them
# torch's words for what a file names beside tensors.
_NAMED = re.compile(r"[Uu]nsupported (?:global: )?(?:GLOBAL|class) ([\w.]+)")
_AGAIN = "download or copy the model again"
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, row by row, little-endian.

    Attributes:
        file, offset: its bytes begin at ``offset``.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """Its values in memory of their own, cast to ``dtype`` piece by piece: no second copy, no mapped pages.

        Raises:
            DstrainError: the file has become shorter, or can't be read.
        """
        result = torch.empty(self.shape, dtype=dtype)
        flat = result.view(-1)
        with _opened(self.file) as file:
            file.seek(self.offset)
            if dtype == self.dtype:
                self._read_into(file, flat)
                return result
            piece = torch.empty(min(flat.numel(), PIECE // self.dtype.itemsize), dtype=self.dtype)
            for start in range(0, flat.numel(), max(piece.numel(), 1)):
                part = piece[: flat.numel() - start]
                self._read_into(file, part)
                flat[start : start + part.numel()] = part
        return result

    def no_number(self) -> str | None:
        """What of its values is none, in words, and how many: ``NaN (3 of 1,024 values)``. Read piece by piece."""
        if not self.dtype.is_floating_point or self.dtype.itemsize == 1:
            return None
        left = math.prod(self.shape)
        bad = nan = 0
        with _opened(self.file) as file:
            file.seek(self.offset)
            while left > 0:
                part = torch.empty(min(left, _CHECKED), dtype=self.dtype)
                self._read_into(file, part)
                if not bool(torch.isfinite(part).all()):
                    bad += int((~torch.isfinite(part)).sum())
                    nan += int(part.isnan().sum())
                left -= part.numel()
        what = "NaN" if nan == bad else "NaN and infinity" if nan else "infinity"
        return f"{what} ({bad:,} of {math.prod(self.shape):,} values)" if bad else None

    def same_as(self, other: StoredTensor) -> bool:
        """Whether both hold the same values, compared piece by piece."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return self.shape == other.shape and torch.equal(
                self.read(torch.float32), other.read(torch.float32)
            )
        if (self.file, self.offset) == (other.file, other.offset):
            return True
        with _opened(self.file) as one, _opened(other.file) as two:
            one.seek(self.offset)
            two.seek(other.offset)
            left = self.bytes
            while left > 0:
                size = min(left, PIECE)
                if one.read(size) != two.read(size):
                    return False
                left -= size
        return True

    def _read_into(self, file: Any, flat: torch.Tensor) -> None:
        if flat.numel() and file.readinto(flat.view(torch.uint8).numpy().data) != flat.nbytes:
            raise DstrainError("the file ends in the middle of a tensor", where=str(self.file), hint=_AGAIN)


class WeightFiles:
    """The tensors of a model folder by the names that they have in its files.

    Attributes:
        unlisted: tensors that lie in the files, and are not in their index: they are left alone.

    Raises:
        DstrainError: no weights, a shard that the index names is missing, a header that can't be read, a file that
            is shorter than its header says, or a tensor that is not where the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _files_of(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        for path in self.files:
            self.tensors.update(_safetensors(path) if path.suffix == ".safetensors" else _pytorch(path))
        self.unlisted: set[str] = set()
        index = _weights_of(self.folder)
        if index.suffix == ".json":
            entries = _read_index(index)
            self.unlisted = set(self.tensors) - set(entries)
            for name in self.unlisted:
                del self.tensors[name]
            for name, file in entries.items():
                found = self.tensors.get(name)
                if found is None or found.file.name != file:
                    raise DstrainError(
                        f"{file} does not contain {name}, although {index.name} lists it there",
                        where=str(index),
                        hint="the index and its files do not belong together: download or save the model again",
                    )

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def _weights_of(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = describe_foreign_weights(folder)
    what, hint = found or ("", f"looked for {', '.join(WEIGHTS)}; --init random starts without weights")
    raise DstrainError(
        f"there are no weights in this folder{', but ' if what else ''}{what}", where=str(folder), hint=hint
    )


def _files_of(folder: Path) -> list[Path]:
    first = _weights_of(folder)
    if first.suffix != ".json":
        return [first]
    names = sorted(set(_read_index(first).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DstrainError(
            f"{missing[0]} is missing"
            + (f" and {len(missing) - 1} more of the {len(names)} files" if len(missing) > 1 else "")
            + f", which {first.name} lists",
            where=str(first),
            hint=_AGAIN,
        )
    return [folder / name for name in names]


def _read_index(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    if size > _LARGEST_HEADER:
        raise DstrainError(f"an index of {size:,} bytes is none", where=str(path), hint=_AGAIN)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        hint = way_out(error, _AGAIN) if isinstance(error, OSError) else _AGAIN
        raise DstrainError(
            f"the index can't be read: {_describe(error)}", where=str(path), hint=hint
        ) from None
    named = isinstance(entries, dict) and all(isinstance(name, str) for name in entries.values())
    # A name with a folder in it could reach files outside.
    if not named or not entries or any(Path(name).name != name for name in entries.values()):
        raise DstrainError(
            "the index has no weight_map from tensors to file names", where=str(path), hint=_AGAIN
        )
    return dict(entries)


def _safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = path.stat().st_size
    with _opened(path) as file:
        begin = file.read(8)
        _refuse_pointer(begin, path)
        length = int.from_bytes(begin, "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise _broken(path, f"its header would take {length:,} of {size:,} bytes")
        try:
            header = json.loads(file.read(length))
            entries = {name: value for name, value in header.items() if name != "__metadata__"}
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(path, _describe(error)) from None
    end = max((tensor.offset + tensor.bytes for tensor in tensors.values()), default=0)
    if end > size:
        raise DstrainError(
            f"the file is truncated: its header describes {end:,} bytes, but there are {size:,}",
            where=str(path),
            hint=_AGAIN,
        )
    yield from tensors.items()


def _stored(path: Path, base: int, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"tensors of type {entry['dtype']} are not supported")
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(path, base + begin, _TYPES[entry["dtype"]], tuple(entry["shape"]))
    if begin < 0 or min(tensor.shape, default=0) < 0 or tensor.bytes != end - begin:
        raise ValueError(f"shape {list(tensor.shape)} does not fit {end - begin:,} bytes")
    return tensor


def _pytorch(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Of a file that ``torch.save`` wrote: only tensors are unpickled, and no data are read."""
    with _opened(path) as file:
        first = file.read(8)
    _refuse_pointer(first, path)
    try:
        content, offset_of = _zip_content(path) if first[:4] == b"PK\x03\x04" else _legacy_content(path)
    except DstrainError:
        raise
    except Exception as error:  # torch raises what it likes for files that are none of its own
        reason = _describe(error).split(". ")[0]
        named = _NAMED.search(str(error))
        raise DstrainError(
            f"torch can't load this file as plain tensors (weights_only): {reason}"
            + (f": it refers to {named[1]}" if named else ""),
            where=str(path),
            hint="download or copy it again, or save the model as safetensors: model.save_pretrained(folder)",
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        keys = ", ".join(repr(key) for key in list(content)[:4]) if isinstance(content, dict) else ""
        raise DstrainError(
            f"the file contains something other than named tensors{f': {keys}' if keys else ''}",
            where=str(path),
            hint="save the weights alone: model.save_pretrained(folder)",
        )
    size = path.stat().st_size
    for name, value in content.items():
        start = offset_of(value) if value.numel() else 0
        if start is None or not value.is_contiguous():
            raise DstrainError(
                f"{name} is not contiguous in this file",
                where=str(path),
                hint="save the model as safetensors: model.save_pretrained(folder)",
            )
        offset = start + value.storage_offset() * value.dtype.itemsize
        tensor = StoredTensor(path, offset, value.dtype, tuple(value.shape))
        if offset + tensor.bytes > size:
            raise DstrainError("the file is truncated", where=str(path), hint=_AGAIN)
        yield name, tensor


_Offset = Callable[[torch.Tensor], int | None]
"""Where in its file the storage of a tensor begins."""


def _zip_content(path: Path) -> tuple[Any, _Offset]:
    with FakeTensorMode():
        content = torch.load(path, weights_only=True, map_location="cpu")
    return content, lambda value: getattr(value.untyped_storage(), "_checkpoint_offset", None)


def _legacy_content(path: Path) -> tuple[Any, _Offset]:
    """Of a file of torch before 1.6 (no zip archive): it names no places, so they are noted while torch reads it."""
    with _opened(path) as file:
        watched = _WatchedFile(file)
        content = torch.load(watched, weights_only=True, map_location="cpu")  # type: ignore[arg-type]
    return content, lambda value: watched.offsets.get(value.untyped_storage().data_ptr())


class _WatchedFile:
    """A file that notes what is read to where in memory, and passes over all but small blocks: the memory of a large
    tensor is never written to, and so takes no room.

    Attributes:
        offsets: address in memory -> offset in the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.offsets: dict[int, int] = {}
        self.read, self.readline, self.seek, self.tell = file.read, file.readline, file.seek, file.tell

    def readinto(self, buffer: memoryview) -> int:
        block = np.frombuffer(buffer, dtype=np.uint8)
        begin = self._file.tell()
        self.offsets[block.ctypes.data] = begin
        if block.nbytes <= _READ_ALWAYS:
            return self._file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]
        end = min(begin + block.nbytes, self._size)
        self._file.seek(end)
        return end - begin


def _refuse_pointer(begin: bytes, path: Path) -> None:
    if begin == b"version ":
        raise DstrainError(
            "this is a pointer of git LFS, not the file itself",
            where=str(path),
            hint="`git lfs pull` in its repository fetches it",
        )


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DstrainError(
            f"the weights can't be read: {error.strerror}", where=str(path), hint=way_out(error)
        ) from None


def _broken(path: Path, reason: str) -> DstrainError:
    return DstrainError(
        f"not a safetensors file, or its header is damaged: {reason}",
        where=str(path),
        hint=_AGAIN,
    )


def _describe(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

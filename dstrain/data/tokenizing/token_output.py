"""The files that tokens are written to, and how far they have come: a process that is killed goes on there.

Now and then the files are flushed, and then a small file says how long they are, with a hash of what they hold, and
where reading goes on. What was written behind that is cut off by whoever goes on; where the hash is another one, all
is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from dstrain.files import flush
from dstrain.strict_json import to_json
from dstrain.version import __version__

TOKENS, LENGTHS, TRAINED, SKIPPED = "tokens.bin", "lengths.npy", "trained.bin", "skipped.txt"
MOST_LISTED = 10_000
"""Records that were left out whose place is kept."""
_RAW_LENGTHS, _STATE = "lengths.part", "unfinished.json"
_SAVE_SECONDS = 5.0
_BLOCK = 2**20


class TokenOutput:
    """Files of tokens in a folder, opened where they were left: as a context.

    Args:
        dtype: of the tokens as they are written.
        bits: whether there is a bit for each token.

    Attributes:
        state: what was kept with the files when they were left, as `save` was given it; None: they are new.
        tokens, documents: how many there are.
    """

    def __init__(self, folder: Path, dtype: np.dtype, *, bits: bool) -> None:
        self._folder = folder
        self._dtype = dtype
        self._names = [TOKENS, _RAW_LENGTHS, *([TRAINED] if bits else [])]
        self._files: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._names}
        self._rest = np.zeros(0, bool)
        self._saved = time.monotonic()
        self.tokens = self.documents = 0
        self.state: Mapping[str, Any] | None = None

    def __enter__(self) -> TokenOutput:
        self.state = self._reopen()
        if self.state is None:
            self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._names}
            (self._folder / _STATE).unlink(missing_ok=True)
            self._files = {name: open(self._folder / name, "wb") for name in self._names}  # noqa: SIM115
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def write(self, tokens: np.ndarray, lengths: array[int] | np.ndarray, bits: np.ndarray | None) -> None:
        """Add tokens [n], the lengths of the documents that end with them, int64, and for each token a bit."""
        self._add(TOKENS, tokens.astype(self._dtype, copy=False).tobytes())
        self._add(_RAW_LENGTHS, np.asarray(lengths, dtype="<i8").tobytes())
        if bits is not None:
            together = np.concatenate([self._rest, bits])
            whole = together.size // 8 * 8
            self._add(TRAINED, np.packbits(together[:whole], bitorder="little").tobytes())
            self._rest = together[whole:]
        self.tokens += int(tokens.size)
        self.documents += len(lengths)

    def is_time_to_save(self) -> bool:
        return time.monotonic() >= self._saved + _SAVE_SECONDS

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep what is written, with a state from which to go on: values of JSON."""
        sizes, hashes = {}, {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name], hashes[name] = file.tell(), self._digests[name].copy().hexdigest()
        kept = {
            "versions": _versions(),
            "sizes": sizes,
            "hashes": hashes,
            "rest": self._rest.astype(int).tolist(),
            "tokens": self.tokens,
            "documents": self.documents,
            "state": dict(state),
        }
        aside = self._folder / f"{_STATE}.new"
        aside.write_text(to_json(kept), encoding="utf-8", errors="surrogatepass")
        flush(aside)
        aside.replace(self._folder / _STATE)
        self._saved = time.monotonic()

    def finish(self) -> tuple[bytes, bytes, bytes]:
        """Complete the files; the hashes of the tokens, the bits and the lengths.

        What was saved still counts until `close_for_good`.
        """
        if TRAINED in self._files:
            self._add(TRAINED, np.packbits(self._rest, bitorder="little").tobytes())
        for file in self._files.values():
            file.close()
        with open(self._folder / _RAW_LENGTHS, "rb") as raw, open(self._folder / LENGTHS, "wb") as whole:
            header = {"descr": "<i8", "fortran_order": False, "shape": (self.documents,)}
            np.lib.format.write_array_header_1_0(whole, header)
            shutil.copyfileobj(raw, whole)
        empty = hashlib.blake2b(digest_size=16).digest()
        trained = self._digests[TRAINED].digest() if TRAINED in self._digests else empty
        return self._digests[TOKENS].digest(), trained, self._digests[_RAW_LENGTHS].digest()

    def hash_together(self) -> str:
        """Of the tokens with the lengths behind them, after `finish`."""
        digest = self._digests[TOKENS].copy()
        with open(self._folder / LENGTHS, "rb") as stream:
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)
            while block := stream.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def _add(self, name: str, content: bytes) -> None:
        self._digests[name].update(content)
        self._files[name].write(content)

    def _reopen(self) -> Mapping[str, Any] | None:
        try:
            kept = json.loads((self._folder / _STATE).read_text(encoding="utf-8", errors="surrogatepass"))
            if kept["versions"] != _versions() or set(kept["sizes"]) != set(self._names):
                return None
            for name, size in kept["sizes"].items():
                file = open(self._folder / name, "r+b")  # noqa: SIM115
                self._files[name] = file
                left = int(size)
                while left and (block := file.read(min(left, _BLOCK))):
                    self._digests[name].update(block)
                    left -= len(block)
                if left or self._digests[name].copy().hexdigest() != kept["hashes"][name]:
                    raise ValueError(name)
                file.truncate()
            self._rest = np.array(kept["rest"], dtype=bool)
            self.tokens, self.documents = int(kept["tokens"]), int(kept["documents"])
            return dict(kept["state"])
        except (OSError, ValueError, KeyError, TypeError):
            self.__exit__()
            self._files = {}
            return None


def list_skipped(folder: Path, places: Sequence[str]) -> None:
    """Write down which records were left out, where there are any."""
    if places:
        listed = "\n".join(places)
        (folder / SKIPPED).write_text(f"{listed}\n", encoding="utf-8", errors="backslashreplace")


def can_go_on(folder: Path) -> bool:
    """Whether files were left there with which a `TokenOutput` would go on, if they are whole."""
    return (folder / _STATE).is_file()


def close_for_good(folder: Path) -> None:
    """Remove what only going on would need. Raises OSError."""
    for name in (_STATE, _RAW_LENGTHS):
        (folder / name).unlink(missing_ok=True)


def _versions() -> list[str]:
    """What reads and writes: another one may do it in another way, and goes on with nothing of this one's."""
    return [__version__, *(version(name) for name in ("numpy", "tokenizers", "transformers"))]

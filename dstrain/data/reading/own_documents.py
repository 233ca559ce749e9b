"""Documents that code of the user's own gives: ``module:name``, called with options, returns an iterable of texts.

Nothing tells beforehand what it will give, so its documents are read once for a hash of them, and again where no tokens
of that hash are in the cache. On the command line: ``python -m dstrain.data.reading.own_documents REQUEST.json
OUT.json`` reads the arguments of `hash_documents` from a JSON object and writes what it returns, or the error.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.child_process import child_main
from dstrain.data.listing.sources import Source
from dstrain.data.progress import Progress
from dstrain.data.reading.documents import DocumentPart
from dstrain.errors import DstrainError
from dstrain.plugins import load_plugin
from dstrain.strict_json import to_json

WHAT = "dataset"
_SAME = (
    "it must give the same documents in the same order each time, in every process and on every host: sort sets and"
    " listings of folders, and give random numbers a seed"
)


@dataclass(frozen=True)
class OwnSource:
    """A corpus that the user's code gives.

    Attributes:
        name: ``module:name``.
        options: its keyword arguments.
        folders: where its module is looked for besides Python's own places.
        content: the hash of its documents, from `hash_documents`.
        bytes: of its documents in UTF-8.
        files: there are none.
    """

    name: str
    options: Mapping[str, Any]
    folders: Sequence[str]
    content: str
    bytes: int
    files: tuple[()] = ()

    @property
    def place(self) -> str:
        """Where the corpus is, for messages about all of it."""
        return self.name

    @property
    def state(self) -> list[Any]:
        """What tells it from every other corpus, as JSON values: the texts alone, not the code."""
        return ["documents", self.content]

    def request(self) -> dict[str, Any]:
        """Its part of a request to `dstrain.data.prepare`."""
        own = {"options": self.options, "folders": self.folders, "content": self.content, "bytes": self.bytes}
        return {"source": self.name, "own": own}


TextCorpus = Source | OwnSource


class _Hash:
    """A hash of texts, each with its length, so that no two lists of texts have the same bytes."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(b"documents 1\n", digest_size=16)
        self.documents = 0
        self.bytes = 0

    def add(self, text: bytes) -> None:
        self._digest.update(f"text {len(text)}\n".encode())  # another kind of document will have another word
        self._digest.update(text)
        self.documents += 1
        self.bytes += len(text)

    def content(self) -> str:
        return self._digest.hexdigest()


def hash_documents(name: str, options: Mapping[str, Any], folders: Sequence[str]) -> dict[str, Any]:
    """Read all documents once, one at a time: their hash as ``content``, and their ``bytes`` in UTF-8.

    Args: as the attributes of `OwnSource`.

    Raises:
        DstrainError: see `read_own_documents`.
    """
    progress, read = Progress(f"reading {name}", 0, "documents"), _Hash()
    for text in _texts(name, options, folders):
        read.add(text.encode())
        progress.update(read.documents)
    return {"content": read.content(), "bytes": read.bytes}


def read_own_documents(source: OwnSource) -> Iterator[DocumentPart]:
    """The documents in their order; nothing is kept of them.

    Raises:
        DstrainError: the code can't be loaded or called, it fails, what it gives is not text, or it has given other
            documents than those of ``source.content``.
    """
    read = _Hash()
    for text in _texts(source.name, source.options, source.folders):
        read.add(text.encode())
        yield DocumentPart(text, read.bytes)
    if read.content() != source.content:
        raise DstrainError(
            f"{WHAT} {source.name} gave other documents when it was called again ({read.documents:,} with"
            f" {read.bytes:,} bytes; before {source.bytes:,} bytes)",
            hint=_SAME,
        )


def answer(out: Path, ask: Callable[[], Mapping[str, Any]]) -> int:
    """Write what ``ask`` returns to ``out`` as JSON, or its DstrainError under the key ``error``; the exit code.

    Whatever else the user's code prints, the message is not lost in it.
    """
    try:
        found, code = dict(ask()), 0
    except DstrainError as error:
        told = {"message": error.message, "hint": error.hint, "where": error.where}
        found, code = {"error": told}, error.exit_code
    out.write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    return code


def read_answer(out: Path, name: str, last_words: str = "") -> dict[str, Any]:
    """What `answer` wrote, after its process has ended.

    Args:
        name: of the dataset.
        last_words: of the process, if it failed.

    Raises:
        DstrainError: the one that was written; or nothing was written.
    """
    try:
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # or half of an answer
        said = f": {last_words}" if last_words else ""
        raise DstrainError(
            f"the process that reads the {WHAT} {name} ended before it had read all{said}",
            hint="its code must not end the process; a process that is killed has often run out of memory",
        ) from None
    if "error" in found:
        told = found["error"]
        raise DstrainError(told["message"], hint=told["hint"], where=told["where"])
    return found


def _texts(name: str, options: Mapping[str, Any], folders: Sequence[str]) -> Iterator[str]:
    """The documents, each checked to be text."""
    documents = iter(_call(name, options, folders))
    number = 0
    while True:
        number += 1
        with _at(name, f"failed at document {number:,}"):
            try:
                document = next(documents)
            except StopIteration:
                break
        yield _text(document, f"{WHAT} {name}: document {number:,}")
    if number == 1:
        raise DstrainError(
            f"{WHAT} {name} gave no documents", hint="it must return or yield texts: one str a document"
        )


def _call(name: str, options: Mapping[str, Any], folders: Sequence[str]) -> Iterator[Any]:
    with redirect_stdout(sys.stderr):
        make = load_plugin(name, folders, what=WHAT)
    if not callable(make):
        raise DstrainError(
            f"{WHAT} {name} is {_kind(make)}, not a function or class",
            hint="name a function that returns the documents",
        )
    _check_options(name, make, options)
    with _at(name, "can't be called"):
        made = make(**options)
    if isinstance(made, str | bytes | Mapping) or not _is_iterable(made):
        raise DstrainError(
            f"{WHAT} {name} returned {_kind(made)}, not an iterable of documents",
            hint="return a list of texts, or yield them one by one",
        )
    with _at(name, "can't be iterated over"):
        return iter(made)


def _check_options(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # of compiled code: it shows when it is called
        return
    try:
        signature.bind(**options)
    except TypeError as error:
        raise DstrainError(
            f"{WHAT} {name} can't be called with data_options ({', '.join(options) or 'none'}): {error}",
            hint=f"its parameters are: {', '.join(signature.parameters) or 'none'}",
        ) from None


@contextmanager
def _at(name: str, what: str) -> Iterator[None]:
    """Around the user's code: it prints to standard error, and what it raises is told with its place."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        print("Traceback (most recent call last):", file=sys.stderr)
        print("".join(traceback.format_list(frames[-5:])), file=sys.stderr, end="")
        reason = _reason(error)
        print(reason, file=sys.stderr)
        module = sys.modules.get(name.partition(":")[0])
        its_own = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)]
        last = (its_own or frames)[-1:]
        raise DstrainError(
            f"{WHAT} {name} {what}: {reason}",
            where=f"{last[0].filename}:{last[0].lineno}" if last else None,
        ) from error


def _reason(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # the user's own class
        lines = []
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _text(document: Any, what: str) -> str:
    """A document as exactly a str that UTF-8 can hold."""
    if not isinstance(document, str):
        raise DstrainError(f"{what} is {_kind(document)}, not a str", hint="yield the text of each document")
    text = str.__str__(document)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DstrainError(
            f"{what}: character {error.start} is half a surrogate pair (\\u{ord(text[error.start]):04x}), which UTF-8"
            " can't encode",
            hint="decode its bytes with errors='replace'",
        ) from None
    return text


def _kind(value: Any) -> str:
    kind = type(value).__name__
    if value is None or kind == "bytes":
        return "None" if value is None else kind
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(type(value), "__getitem__")


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    return answer(Path(argv[1]), lambda: hash_documents(**request))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

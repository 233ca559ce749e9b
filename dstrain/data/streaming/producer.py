"""The process that makes the rows of a stream: ``python -m dstrain.data.streaming.producer RING``.

``request.json`` in the ring's folder says what is asked of it. It writes segment after segment until it is ended, with
the process that has started it at the latest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstrain.child_process import child_main
from dstrain.data.streaming.making import make_rows
from dstrain.data.streaming.ring import RingFolder, RingWriter
from dstrain.data.streaming.shard_files import go_offline
from dstrain.data.streaming.state import StreamState
from dstrain.data.streaming.stream import Stream, StreamRequest, check_fingerprint
from dstrain.errors import DstrainError, os_error_shown, place_of


@child_main
def main(arguments: Sequence[str]) -> int:
    """Write segments; returns by an exception alone."""
    folder = RingFolder(Path(arguments[0]))
    asked = json.loads(folder.request.read_text(encoding="utf-8"))
    go_offline()
    writer = RingWriter(folder, asked["readers"], asked["ahead"])
    try:
        _write(writer, asked, folder)
    except Exception as error:
        shown = _shown(error)
        folder.fail(shown)
        raise shown from error
    return 0


def _write(writer: RingWriter, asked: Mapping[str, Any], folder: RingFolder) -> None:
    stream = Stream.open(
        StreamRequest.from_json(asked["stream"]), passing=folder.files, note=folder.note_reading
    )
    check_fingerprint(stream, asked["fingerprint"])
    begin = StreamState.from_json(asked["state"])
    again = replace(begin, row=begin.first, check="")
    for made in make_rows(stream, begin, asked["workers"]):
        writer.write(made, stream.tokenizer.dtype, begin.check if made.state == again else "")


def _shown(error: Exception) -> DstrainError:
    if isinstance(error, DstrainError):
        return error
    if isinstance(error, OSError):
        return os_error_shown(error, exit_code=1)
    said = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return DstrainError(f"the data can't be prepared: {said}", where=place_of(error), exit_code=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

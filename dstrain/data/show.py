"""Samples as the model gets them, in pieces: what is trained, where documents begin, and what is padding.

On the command line: ``python -m dstrain.data.show REQUEST.json ANSWER.json``. The request has ``parts``, each with the
arguments of `dstrain.data.prepare` as ``request``, and ``samples``: the numbers of the samples to show. A part that is
streamed has its `dstrain.data.streaming.stream.StreamRequest` as ``stream``, with the plan's ``fingerprint``; then
there are no statistics, and ``folder`` is where its rows lie meanwhile.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.child_process import child_main
from dstrain.data.prepare import PackedData, prepare_as_asked
from dstrain.data.rows.mixture import MixedRows
from dstrain.data.rows.packing import IGNORED
from dstrain.data.streaming.prepare import StreamedData
from dstrain.data.streaming.rows import StreamRows
from dstrain.data.streaming.stream import StreamRequest
from dstrain.data.tokenizing.tokenizers import load_tokenizer
from dstrain.data.training_data import TrainingData, TrainingSource, training_data
from dstrain.files import write_json
from dstrain.mixture_shares import MixturePhase

_MOST_OF_A_CHARACTER = 6
"""Tokens of a single character, of an emoji in bytes and marks between them."""
_PERCENTILES = (0, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Piece:
    """Tokens of a sample that follow each other and are alike.

    Attributes:
        document: the number of the document in its sample, from 0; -1 for padding.
        trained: whether they count in the loss.
        tokens: how many there are.
        text: special tokens spelled out.
        position: of the first of them, as the model is told it.
        beyond: whether it is the token behind the sample, which its last one is to predict.
        ids, texts: each token, and its text alone; empty where they were not asked for, but for one beyond the sample.
    """

    document: int
    trained: bool
    tokens: int
    text: str
    position: int
    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    beyond: bool = False


@dataclass(frozen=True)
class Sample:
    """A row to train on.

    Attributes:
        number: among the training samples; of several sources, in the order in which the run takes them.
        source: its name, where there are several.
        labels: how many of its tokens count in the loss.
        padding: how many of its tokens only fill it up.
    """

    number: int
    documents: int
    labels: int
    padding: int
    pieces: tuple[Piece, ...]
    source: str = ""


def sample(data: TrainingData, number: int, row: int, *, each_token: bool = False) -> Sample:
    """The training sample in that row.

    Args:
        number: what it is called.
        each_token: with every token of its own.
    """
    batch = data.rows.rows(np.array([row]))
    ids, positions, labels = (part[0] for part in batch)
    # A label stands where the token before it is: token t counts where label t - 1 is not ignored.
    trained = np.concatenate([[False], labels[:-1] != IGNORED])
    document = np.cumsum(positions == 0) - 1
    size = int(data.rows.filled(np.array([row]))[0])
    edges = [
        0,
        *(np.flatnonzero((np.diff(document[:size]) != 0) | np.diff(trained[:size])) + 1).tolist(),
        size,
    ]
    spell = data.tokenizer.token_text
    pieces = []
    for first, last in pairwise(edges):
        if first == last:
            continue
        part = ids[first:last].tolist()
        pieces.append(
            Piece(
                int(document[first]), bool(trained[first]), last - first, spell(part), int(positions[first])
            )
        )
        if each_token:
            pieces[-1] = replace(pieces[-1], ids=tuple(part), texts=_texts(part, spell))
    if size == ids.size and labels[-1] != IGNORED:
        token = int(labels[-1])
        text = spell([token])
        pieces.append(
            Piece(int(document[-1]), True, 1, text, int(positions[-1]) + 1, (token,), (text,), True)
        )
    documents = int(document[size - 1]) + 1 if size else 0
    source = data.sources[data.rows.source_of(row)].name if isinstance(data.rows, MixedRows) else ""
    return Sample(number, documents, int((labels != IGNORED).sum()), ids.size - size, tuple(pieces), source)


def _texts(ids: Sequence[int], spell: Callable[[Sequence[int]], str]) -> tuple[str, ...]:
    """The text of each token. A character of several tokens is that of the last of them, and the others are empty."""
    found: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = spell(waiting)
        if text.endswith("\ufffd") and len(waiting) < _MOST_OF_A_CHARACTER:
            found.append("")
        else:
            found.append(text)
            waiting.clear()
    if waiting:
        found[-1] = spell(waiting)
    return tuple(found)


def rows_of_samples(
    data: TrainingData, numbers: Sequence[int], global_batch: int, seed: int
) -> dict[int, int]:
    """The row of each of these samples that there is: for a single source its number, for several by their order."""
    if not data.phases:
        return {number: number for number in numbers if number < len(data.rows)}
    order = data.order(global_batch, seed)
    return {
        number: int(order.sample_ids(number // global_batch + 1)[number % global_batch]) for number in numbers
    }


def statistics(data: TrainingData) -> dict[str, Any]:
    """Lengths and labels, as JSON values; ``lengths`` are percentiles of the tokens of a document."""
    labels = data.rows.label_tokens(np.arange(len(data.rows)))
    lengths = np.concatenate(
        [source.data.lengths for source in data.sources if isinstance(source.data, PackedData)]
    )
    powers = np.bincount(np.frexp(lengths)[1])  # the bits of each number
    return {
        "lengths": {
            str(share): int(np.percentile(lengths, share, method="nearest")) for share in _PERCENTILES
        },
        "histogram": [
            [2 ** (power - 1), 2**power - 1, int(powers[power])] for power in np.flatnonzero(powers).tolist()
        ],
        "labels": int(labels.sum()),
        "labels_of_a_row": [int(labels.min()), round(float(labels.mean()), 1), int(labels.max())],
    }


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    trained: list[TrainingSource] = []
    validation: list[TrainingSource] = []
    for part in request["parts"]:
        found = TrainingSource(part["name"], _prepared(part))
        (trained if part["trained"] else validation).append(found)
    phases = [MixturePhase.from_record(phase) for phase in request["phases"]]
    data = training_data(trained, validation, phases)
    rows = rows_of_samples(data, request["samples"], request["global_batch"], request["seed"])
    each = bool(request.get("each_token"))
    with ExitStack() as opened:
        for number, stream in data.streams.items():
            opened.enter_context(stream).open(Path(request["folder"]), f"{secrets.token_hex(8)}-{number}")
        samples = [asdict(sample(data, number, row, each_token=each)) for number, row in rows.items()]
    write_json(Path(argv[1]), {"samples": samples, "statistics": {} if data.streams else statistics(data)})
    return 0


def _prepared(part: Mapping[str, Any]) -> PackedData | StreamedData:
    if "stream" not in part:
        return prepare_as_asked(part["request"])
    asked = StreamRequest.from_json(part["stream"])
    rows = StreamRows(asked, part["fingerprint"])
    return StreamedData(rows, None, load_tokenizer(asked.tokenizer, asked.begin))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

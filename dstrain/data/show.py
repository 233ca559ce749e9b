"""Samples as the model gets them, in pieces: what is trained, where documents begin, and what is padding.

On the command line: ``python -m dstrain.data.show REQUEST.json ANSWER.json``. The request has the arguments of
`dstrain.data.prepare`, and ``samples``: the numbers of the samples to show.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.child_process import child_main
from dstrain.data.packing import IGNORED
from dstrain.data.prepare import PackedData, prepare_as_asked
from dstrain.files import write_json

_PERCENTILES = (0, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Piece:
    """Tokens of a sample that follow each other and are alike.

    Attributes:
        document: the number of the document in its sample, from 0; -1 for padding.
        trained: whether they count in the loss.
        tokens: how many there are.
        text: special tokens spelled out.
    """

    document: int
    trained: bool
    tokens: int
    text: str


@dataclass(frozen=True)
class Sample:
    """A row to train on.

    Attributes:
        number: among the training samples.
        labels: how many of its tokens count in the loss.
        padding: how many of its tokens only fill it up.
    """

    number: int
    documents: int
    labels: int
    padding: int
    pieces: tuple[Piece, ...]


def sample(data: PackedData, number: int) -> Sample:
    """The training sample of that number."""
    batch = data.train.rows(np.array([number]))
    ids, positions, labels = (part[0] for part in batch)
    # A label stands where the token before it is: token t counts where label t - 1 is not ignored.
    trained = np.concatenate([[False], labels[:-1] != IGNORED])
    document = np.cumsum(positions == 0) - 1
    size = int(data.train.filled(np.array([number]))[0])
    edges = [
        0,
        *(np.flatnonzero((np.diff(document[:size]) != 0) | np.diff(trained[:size])) + 1).tolist(),
        size,
    ]
    pieces = [
        Piece(
            int(document[first]),
            bool(trained[first]),
            last - first,
            data.tokenizer.token_text(ids[first:last]),
        )
        for first, last in pairwise(edges)
        if first < last
    ]
    documents = int(document[size - 1]) + 1 if size else 0
    return Sample(number, documents, int((labels != IGNORED).sum()), ids.size - size, tuple(pieces))


def statistics(data: PackedData) -> dict[str, Any]:
    """Documents, tokens and rows, as JSON values; ``lengths`` are percentiles of the tokens of a document."""
    rows = np.arange(len(data.train))
    labels = data.train.label_tokens(rows)
    lengths = data.lengths
    powers = Counter(int(length).bit_length() for length in lengths.tolist())
    return {
        **data.summary(),
        "lengths": {
            str(share): int(np.percentile(lengths, share, method="nearest")) for share in _PERCENTILES
        },
        "histogram": [[2 ** (power - 1), 2**power - 1, powers[power]] for power in sorted(powers)],
        "labels": int(labels.sum()),
        "labels_of_a_row": [int(labels.min()), round(float(labels.mean()), 1), int(labels.max())],
    }


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    wanted = request.pop("samples")
    data = prepare_as_asked(request)
    few = [number for number in wanted if number < len(data.train)]
    samples = [asdict(sample(data, number)) for number in few]
    write_json(Path(argv[1]), {"samples": samples, "statistics": statistics(data)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

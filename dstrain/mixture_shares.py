"""How many rows of each source of a mixture come in which part of a run, in whole numbers.

Plans are made of this, and `dstrain.data.rows.mixture` finds the rows of a step by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ONE = 1 << 24
"""A share of 1: with it a place of up to 2**39 can be multiplied in 64 bits."""


@dataclass(frozen=True)
class MixturePhase:
    """Steps with the same weights.

    Attributes:
        last_step: the last of them.
        parts: the sources that are trained on, by number, each with its share of the rows that those before it leave,
            in units of 2**-24. That of the last one is all.
    """

    last_step: int
    parts: tuple[tuple[int, int], ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> MixturePhase:
        """From JSON."""
        return cls(record["last_step"], tuple((number, share) for number, share in record["parts"]))


def row_shares(weights: Sequence[float | None], sizes: Sequence[float], rows: Sequence[int]) -> list[float]:
    """Each source's share of the rows; they add up to 1.

    Args:
        weights: shares of the tokens or the documents, relative to each other; None for all: each as large as it is.
        sizes: how many of them a row of each source has.
        rows: of each source.
    """
    if any(weight is None for weight in weights):
        found = [float(count) for count in rows]
    else:
        found = [float(weight or 0.0) / size for weight, size in zip(weights, sizes, strict=True)]
    return [each / sum(found) for each in found]


def parts_of(shares: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Shares of all rows as `MixturePhase.parts`."""
    parts: list[tuple[int, int]] = []
    left = sum(shares)
    present = [(number, share) for number, share in enumerate(shares) if share > 0]
    for number, share in present[:-1]:
        parts.append((number, min(max(round(share / left * _ONE), 1), _ONE - 1)))
        left -= share
    parts.append((present[-1][0], _ONE))
    return tuple(parts)


def rows_of_sources(places: Any, parts: Sequence[tuple[int, int]]) -> dict[int, Any]:
    """How many of the first ``places`` of a phase are of each source that it has.

    To within one row for each part that is its share, for any number of places: so every step has the mixture.

    Args:
        places: an int, or an int64 array of any shape; so are the counts.
    """
    found = {}
    left = places
    for number, part in parts:
        found[number] = left if part == _ONE else (left * part + _ONE // 2) >> 24
        left = left - found[number]
    return found


def rows_before(
    phases: Sequence[MixturePhase], global_batch: int, sources: int
) -> list[tuple[int, list[int]]]:
    """For each phase the place in the run's line of rows where it begins, and the rows that each source has given.

    The last entry is the end of the run.
    """
    begin, given = 0, [0] * sources
    found = [(begin, list(given))]
    for phase in phases:
        end = max(begin, phase.last_step * global_batch)
        for number, count in rows_of_sources(end - begin, phase.parts).items():
            given[number] += count
        begin = end
        found.append((begin, list(given)))
    return found

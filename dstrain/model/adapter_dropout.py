"""Dropout in front of an adapter's matrices that drops the same in every layout.

What is drawn depends on a seed of the row, which follows from run, step and the row's place in the global batch, and
on the module's name: not on the rank, the stage or the micro-batch that the row is computed in, nor on earlier draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dstrain.model.document_lengths import known_lengths


@dataclass(frozen=True)
class _Rows:
    """What modules are given just now.

    Attributes:
        seeds: of each row of the micro-batch.
        length: tokens of a row.
        part: the first of its tokens, laid end to end, and how many.
    """

    seeds: tuple[int, ...]
    length: int
    part: tuple[int, int]

    def dropped(self, x: Tensor, p: float, module: int) -> Tensor | None:
        """Which elements are dropped, bool like ``x``; None where it can't be told which rows these are.

        Args:
            x: of [B, ...], [B * S, ...] or [1, B * S, ...]; of a part of the tokens, the latter two.
            p: the probability of each.
            module: the seed of the one that drops.
        """
        first, tokens = self.part
        rows = range(first // self.length, -(-(first + tokens) // self.length))
        of_rows = tokens == len(self.seeds) * self.length and x.shape[0] == len(self.seeds)
        if x.is_meta or not (of_rows or x.shape[0] == tokens or x.shape[:2] == (1, tokens)):
            return None
        width = x.numel() // tokens if not of_rows else 0
        drawn = torch.empty(
            (len(rows), x[0].numel() if of_rows else self.length * width), dtype=torch.bool, device=x.device
        )
        generator = torch.Generator(x.device)
        for row, seed in zip(drawn, self.seeds[rows.start : rows.stop], strict=True):
            row.bernoulli_(p, generator=generator.manual_seed(seed ^ module))
        if not of_rows:
            start = (first - rows.start * self.length) * width
            drawn = drawn.view(-1)[start : start + tokens * width]
        return drawn.view(x.shape)


_now: _Rows | None = None


@contextmanager
def _given(rows: _Rows | None) -> Iterator[None]:
    global _now
    before, _now = _now, rows
    try:
        yield
    finally:
        _now = before


def _rows_of(position_ids: Tensor) -> _Rows | None:
    known = known_lengths(position_ids)
    if known is None or not known.seeds:
        return None
    return _Rows(known.seeds, position_ids.shape[1], (0, position_ids.numel()))


@contextmanager
def dropping_by_rows(position_ids: Tensor) -> Iterator[None]:
    """Modules run that are given the whole rows of this micro-batch, int64 [B, S].

    To be entered for a recomputation too: what is dropped is then the same.
    """
    with _given(_rows_of(position_ids)):
        yield


class DropoutOfParts:
    """The same for a part of a micro-batch's tokens at a time.

    Args:
        position_ids: of the whole micro-batch.
    """

    def __init__(self, position_ids: Tensor) -> None:
        self._rows = _rows_of(position_ids)

    @contextmanager
    def given(self, first: int, tokens: int) -> Iterator[None]:
        """Modules are given so many tokens from number ``first`` on, counted through all rows."""
        with _given(self._rows and replace(self._rows, part=(first, tokens))):
            yield


class DropoutByRows(nn.Dropout):
    """``nn.Dropout``, but for what it draws from.

    Where nothing is known of the rows that it is given, it draws from torch's generator.

    Args:
        seed: of the module, 63 bits.
    """

    def __init__(self, p: float, seed: int) -> None:
        super().__init__(p)
        self._seed = seed

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        dropped = _now.dropped(input, self.p, self._seed) if _now is not None else None
        if dropped is None:
            return super().forward(input)
        return input.masked_fill(dropped, 0).mul_(1 / (1 - self.p))

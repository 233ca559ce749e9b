"""Batch arithmetic: global batch = micro-batch x accumulation x replicas."""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.errors import DstrainError
from dstrain.formatting import format_count

# A replica's micro-batch is at most this by default; larger ones are the user's choice.
_LARGEST_DEFAULT = 8
_MOST_TRIED = 10_000  # sizes of micro-batches, to name those that divide


@dataclass(frozen=True)
class Batch:
    """How one optimizer step's samples are dealt out. All numbers count samples, but the tokens."""

    global_batch: int
    micro_batch: int
    accumulation: int
    data_parallel: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.seq_len

    def describe(self) -> str:
        """The arithmetic in one line that can be checked by hand."""
        return (
            f"{self.global_batch} samples per step = {self.micro_batch} per micro-batch"
            f" x {format_count(self.accumulation, 'micro-batch')} x {self.data_parallel} replica"
            f"{'s' if self.data_parallel > 1 else ''};"
            f" {self.global_batch} x {self.seq_len} = {self.tokens:,} tokens per step"
        )


def make_batch(
    *,
    global_batch: int,
    micro_batch: int | None,
    data_parallel: int,
    pipeline: int,
    seq_len: int,
    where: str,
    where_global: str | None = None,
) -> Batch:
    """Share the global batch out.

    Without a micro-batch size it is the largest one (at most 8) that leaves a pipeline four
    micro-batches a stage to hide its bubble in, or as many as there can be.

    Args:
        where: the origin of the micro-batch, for messages.
        where_global: that of the global batch, where it is another.

    Raises:
        DstrainError: the numbers do not divide.
    """
    if global_batch % data_parallel:
        unit = data_parallel * (micro_batch or 1)
        lower = global_batch - global_batch % unit
        sizes = [str(size) for size in (lower, lower + unit) if size]
        raise DstrainError(
            f"a global batch of {global_batch} can't be divided evenly among {data_parallel} replicas",
            where=where_global or where,
            hint=f"--global-batch {' or '.join(sizes)}",
        )
    share = global_batch // data_parallel
    if micro_batch is None:
        divisors = [size for size in range(1, min(share, _LARGEST_DEFAULT) + 1) if share % size == 0]
        wanted = 4 * pipeline if pipeline > 1 else 1
        micro_batch = max((size for size in divisors if share // size >= wanted), default=1)
    if share % micro_batch:
        fitting = [str(size) for size in range(1, min(share, _MOST_TRIED) + 1) if share % size == 0]
        raise DstrainError(
            f"each of {data_parallel} replica(s) gets {share} samples per step, which is not a multiple"
            f" of the micro-batch {micro_batch}",
            where=where,
            hint=f"--micro-batch {', '.join(fitting[:12])}; or another --global-batch",
        )
    return Batch(global_batch, micro_batch, share // micro_batch, data_parallel, seq_len)

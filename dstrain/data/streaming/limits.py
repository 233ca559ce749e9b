"""Where the first documents of a stream end, in the sorted list of its shards."""

from __future__ import annotations

from dstrain.data.streaming.blocks import read_shard
from dstrain.data.streaming.stream import Stream


def end_of_first(stream: Stream, documents: int) -> tuple[tuple[int, int], int]:
    """The shard and record behind the first documents, and how many bytes of files they take.

    Row groups of parquet are counted by what stands at the end of their file; of others the first documents are read.

    Args:
        documents: how many, at least 1.

    Raises:
        DstrainError: a file can't be read.
    """
    left, before, file = documents, 0, stream.shards[0].file
    for number, shard in enumerate(stream.shards):
        if shard.file != file:
            before, file = before + file.size, shard.file
        if shard.rows is not None and shard.rows < left:
            left -= shard.rows
            continue
        for one in read_shard(stream, number):
            left -= one.last
            if not left:
                return (number, one.record + 1), max(1, before + one.bytes_read)
    return (len(stream.shards), 0), stream.corpus.bytes

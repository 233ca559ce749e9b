"""Sizes of DeepSpeed's reduce and gather buckets."""

from __future__ import annotations

LARGEST_BUCKET = 200_000_000
"""Elements."""


def bucket_size(stage_parameters: int) -> int:
    """Elements of a bucket that holds the largest stage's parameters, an even number, where that is not too many.

    DeepSpeed's default of 5e8 would be allocated whole: 2 GB for a model of one million parameters.
    """
    return min(2 * ((stage_parameters + 1) // 2), LARGEST_BUCKET)

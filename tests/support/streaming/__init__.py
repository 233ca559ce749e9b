"""Processes that read a stream as the ranks of a training do, without a model."""

"""Estimates before a run: memory, time, traffic, disk."""

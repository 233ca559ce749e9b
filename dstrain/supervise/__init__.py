"""Supervises a run: monitors its ranks, finds the cause of a failure, and leaves nothing running. No torch."""

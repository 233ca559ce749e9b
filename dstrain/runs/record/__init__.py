"""The record of what determines a run's numbers, written at each launch and compared by ``reproduce``."""

"""The run folder: its files, the messages between supervisor and ranks, checkpoints and records."""

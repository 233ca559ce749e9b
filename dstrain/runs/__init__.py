"""The run folder: its files, what ranks and supervisor say to each other, checkpoints and records."""

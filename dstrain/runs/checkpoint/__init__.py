"""The checkpoints of a run folder: completeness, integrity, identity. No torch."""

"""What lies in checkpoints/ of a run folder: what makes one complete, whole, and ours. No torch."""

"""Saves checkpoints during training, and chooses the one to resume from."""

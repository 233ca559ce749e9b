"""The code of each rank: worker, training loop, evaluation, checkpoints, metrics."""

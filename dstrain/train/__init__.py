"""What each rank does: the worker, its loop, evaluation, checkpoints, metrics."""

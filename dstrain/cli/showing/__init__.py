"""Terminal output: plans, progress and results."""

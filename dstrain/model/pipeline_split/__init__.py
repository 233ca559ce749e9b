"""Splits a model family into pipeline layers: finds its parts, runs its forward in parts, tests the split."""

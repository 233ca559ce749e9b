"""Weights on disk: from a model folder or the hub into layers, and back under their names on disk."""

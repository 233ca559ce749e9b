"""Weights on disk: loads them from a model folder or the hub, and writes them under their original names."""

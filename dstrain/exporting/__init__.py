"""Exports a run's checkpoint as a Hugging Face folder, and checks the result."""

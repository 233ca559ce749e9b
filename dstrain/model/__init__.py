"""Hugging Face causal language models as pipeline layers: structure, initial weights, loss and measurements."""

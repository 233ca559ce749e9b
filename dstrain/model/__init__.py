"""Hugging Face causal language models as pipeline layers: their parts, initial weights, loss and measures."""

"""Tokenizers, and the workers that turn texts and records into tokens."""

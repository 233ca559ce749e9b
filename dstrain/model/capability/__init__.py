"""Tests what a model family supports on a small model of it."""

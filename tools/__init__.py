"""Generators of docs and data; no part of the package."""

"""Generators of documentation pages and data: run by `make docs`, not part of the wheel."""

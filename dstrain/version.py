"""The version number, importable without any dependency."""

__version__ = "0.2.0.dev0"

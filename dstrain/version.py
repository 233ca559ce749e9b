"""The version, where every room can read it without what the package itself imports."""

__version__ = "0.2.0.dev0"

"""Reads files: documents and records, each with its place."""

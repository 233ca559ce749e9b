"""What a file of a corpus is read as, by its name."""

from __future__ import annotations

import os
from typing import Literal

Kind = Literal["text", "json lines", "parquet", "arrow", "csv", "megatron", "nanogpt", "llm.c", "index"]
"""``index``: what tells where the documents of a ``megatron`` file are; it holds none itself."""
RECORD_KINDS = frozenset({"json lines", "parquet", "arrow", "csv"})
"""Kinds of files that hold records."""
TABLE_KINDS = frozenset({"parquet", "arrow", "csv"})
TOKEN_KINDS = frozenset({"megatron", "nanogpt", "llm.c"})
"""Kinds of files that hold tokens, and are read in place."""

TEXTS_OF_0_1 = "text-0.1"
"""The format of runs from before there were others: text files and JSON lines, and what else lies in a folder is passed
over."""

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".csv",
    ".tsv", ".log", ".srt", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go",
    ".java", ".kt",
    ".scala", ".js", ".ts", ".jsx", ".tsx", ".rb", ".pl", ".php", ".lua", ".jl", ".r", ".sh", ".bash", ".sql",
    ".swift", ".hs", ".ml", ".el", ".lisp", ".clj", ".ex", ".erl", ".yaml", ".yml", ".toml", ".ini", ".cfg",
})
# fmt: on
JSON_LINES_SUFFIXES = (
    *(".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst"),
)
# Inside a folder .json is usually a config or an index, so it is read as JSON lines only when it is named
# itself, or compressed.
NAMED_JSON_LINES_SUFFIXES = (*JSON_LINES_SUFFIXES, ".json")
_JSON_LINES_SUFFIXES_OF_0_1 = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
DELIMITED_SUFFIXES = (".csv", ".tsv")
_TABLES: dict[str, Kind] = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}


def kind_of_name(name: str, *, named: bool, of_0_1: bool = False) -> Kind | None:
    """What a file is read as; None: it is left out.

    A table of comma-separated values is a text here: what it is shows in its first line.

    Args:
        named: the user has named the file itself, and not its folder.
        of_0_1: as `TEXTS_OF_0_1` says it.
    """
    name = name.lower()
    if of_0_1:
        lines = (*_JSON_LINES_SUFFIXES_OF_0_1, *([".json"] if named else []))
        text = named or os.path.splitext(name)[1] in TEXT_SUFFIXES
        return "json lines" if name.endswith(lines) else "text" if text else None
    if name.endswith(NAMED_JSON_LINES_SUFFIXES if named else JSON_LINES_SUFFIXES):
        return "json lines"
    suffix = os.path.splitext(name)[1]
    if suffix in _TABLES:
        return _TABLES[suffix]
    return "text" if named or suffix in TEXT_SUFFIXES else None


def label_of(name: str, kind: Kind) -> str:
    """What a file is called where those that are read are counted: by its suffix."""
    name = name.lower()
    found = next(
        (suffix for suffix in JSON_LINES_SUFFIXES if name.endswith(suffix)), os.path.splitext(name)[1]
    )
    if found in DELIMITED_SUFFIXES:
        return f"{found} as {'tables' if kind == 'csv' else 'texts'}"
    return f"{found} of {kind}" if kind in TOKEN_KINDS else found

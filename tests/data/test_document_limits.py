"""A document is not larger than its limit: what a few bytes unpack to is not held in memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.data.listing.sources import find_files
from dstrain.data.prepare import prepare
from dstrain.data.reading.documents import LARGEST_FILE, LARGEST_LINE, read_documents
from dstrain.errors import DstrainError

LINE = json.dumps({"text": "a" * 1000})


def read(path: Path, limit: int | None) -> list[str]:
    source = replace(find_files(str(path)), max_document_bytes=limit)
    return [document.text for document in read_documents(source)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_line_is_refused_by_its_length(name: str, tmp_path: Path) -> None:
    content = f'{{"text": "b"}}\n{LINE}\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(tmp_path / name, len(LINE) + 1) == ["b", "a" * 1000]
    with pytest.raises(DstrainError, match="more than 500 bytes") as refused:
        read(tmp_path / name, 500)
    assert refused.value.where == f"{tmp_path / name}:2" and "max_document_bytes" in (
        refused.value.hint or ""
    )


def test_a_text_file_is_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 1001)
    assert read(tmp_path / "a.txt", 1000) == ["a" * 1000]
    with pytest.raises(DstrainError, match="more than 1,000 bytes") as refused:
        read(tmp_path, 1000)
    assert refused.value.where == str(tmp_path / "b.txt")


def test_the_limits_where_none_is_set() -> None:
    assert (LARGEST_LINE, LARGEST_FILE) == (64 * 2**20, 4 * 2**30)


def test_the_limit_is_no_part_of_what_is_cached(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{LINE}\n" * 3)
    first = prepare(str(tmp_path / "a.jsonl"), "bytes", 16, 0, tmp_path / "cache", max_document_bytes=5000)
    again = prepare(str(tmp_path / "a.jsonl"), "bytes", 16, 0, tmp_path / "cache")
    assert first.folder == again.folder and first.fingerprint == again.fingerprint


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "sparse.jsonl", "sparse.txt"])
def test_three_gigabytes_in_a_small_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        block = gzip.compress(b"a" * 2**24)  # members of a gzip file follow each other
        path.write_bytes(gzip.compress(b'{"text": "') + block * 192)
        assert path.stat().st_size < 4_000_000
    else:
        with path.open("wb") as file:
            file.truncate(3 * 2**30)
    program = (
        "import re, sys\n"
        "from dstrain.data.reading.documents import read_documents\n"
        "from dstrain.data.listing.sources import find_files\n"
        "from dstrain.errors import DstrainError\n"
        "try:\n    list(read_documents(find_files(sys.argv[1])))\n"
        "except DstrainError as error:\n    print(error)\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    *message, kilobytes = done.stdout.splitlines()
    assert str(path) in message[0], done.stdout
    assert int(kilobytes) < 400_000

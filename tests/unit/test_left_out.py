"""A plan counts what is read of a folder, and what is left out of it, each time anew."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from dstrain.api.events import SILENT
from dstrain.api.prepare_data import prepare_data
from dstrain.cli.showing.plan import show_plan
from dstrain.config.loader import load_config
from dstrain.planning.plan import Plan
from tests.support.plans import plan


def test_what_is_left_out_is_in_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text " * 400)
    leftover = tmp_path / "cache" / "data" / "corpus.0.part"
    leftover.mkdir(parents=True)
    leftover.with_name("corpus.lock").touch()
    config = load_config(settings=[f"data={corpus}", "seq_len=32"])
    first = prepare_data(config, "bytes", SILENT)
    assert (first.kinds, first.left_out) == ("1 .txt (2 kB)", "") and not leftover.exists()
    (corpus / "b.orc").write_bytes(b"PAR1\x1b[2J")
    (corpus / "bad\x1b[2J").write_bytes(b"x")
    second = prepare_data(config, "bytes", SILENT)  # of the same text: its summary is kept
    assert second == dataclasses.replace(first, left_out=second.left_out)
    assert second.left_out.startswith("1 .orc (8 bytes), bad")
    made = dataclasses.replace(plan(), data=second)
    assert Plan.from_record(json.loads(json.dumps(made.to_record()))) == made
    console = Console(file=io.StringIO(), width=200)
    show_plan(made, console, verbose=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"files\s+1 \.txt \(2 kB\); left out: .*1 \.orc \(8 bytes\), bad", text)
    assert "\x1b[2J" not in text

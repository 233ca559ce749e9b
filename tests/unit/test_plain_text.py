"""What comes from models, data and other hosts is shown, and carried out by no terminal."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from click.testing import CliRunner

from dstrain.cli.showing.tables import Column, FoldingTable, make_console
from dstrain.formatting import plain

ACTIVE = {
    "colour": "\x1b[31m",
    "title": "\x1b]0;owned\x07",
    "8-bit CSI": "\x9b31m",
    "back": "abc\x08\x08",
    "start of the line": "a\rb",
    "delete": "\x7f",
    "right to left": "\u202e",
    "isolate": "\u2067",
    "mark": "\u200f",
    "line": "\u2028",
    "half a character": "\ud800",
}


@pytest.mark.parametrize("text", ACTIVE.values(), ids=ACTIVE)
def test_what_a_terminal_would_carry_out_is_written_as_an_escape(text: str) -> None:
    shown = plain(f"a {text} b")
    assert shown.isprintable() and "\\" in shown


def test_other_text_stays_as_it_is() -> None:
    text = "Zoë:\n\t日本語 👩‍🔬 \u00a0— «naïve» \\x1b"
    assert plain(text) == text


@pytest.mark.parametrize("text", ACTIVE.values(), ids=ACTIVE)
def test_the_console_shows_all_text_so(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console()
    table = FoldingTable(Column("name"))
    table.add_row(f"x{text}y")
    for each in (f"x{text}y", table):
        console.print(each)
    out = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in out), ascii(out)
    assert "x" in out and "y" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_generated_text_is_raw_in_a_pipe_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstrain.cli.generate import command

    text = "one \x1b[31m two"
    monkeypatch.setattr("dstrain.api.exporting.generate", lambda *args, **options: text)

    runner = CliRunner()
    with runner.isolation() as streams:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        command.main(["out", "one"], standalone_mode=False)
        sys.stdout.flush()
        out: Any = streams[0].getvalue().decode()
    assert out == ("one \\x1b[31m two\n" if terminal else text + "\n")

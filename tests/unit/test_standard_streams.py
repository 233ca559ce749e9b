"""Standard output and error that can't be written end no command, and what is lost is said."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from dstrain.cli import main as command_line
from dstrain.cli.standard_streams import StandardStreams, standard_streams, wait_for_readers
from dstrain.train.trainer import _say
from dstrain.train.worker import _Console


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def reader_that_left() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def not_for_writing() -> int:
    return os.open("/dev/null", os.O_RDONLY)


BROKEN: dict[str, tuple[Callable[[], int], int]] = {
    "a full disk": (full_disk, errno.ENOSPC),
    "a reader that left": (reader_that_left, errno.EPIPE),
    "a closed terminal": (closed_terminal, errno.EIO),
    "not opened for writing": (not_for_writing, errno.EBADF),
}


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make a descriptor standard output, and standard error."""
    opened: list[io.TextIOWrapper] = []

    def be(number: int, *names: str, encoding: str = "utf-8") -> None:
        stream = io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w")), encoding=encoding)
        opened.append(stream)
        for name in names or ("stdout",):
            monkeypatch.setattr(sys, name, stream)

    yield be
    monkeypatch.undo()
    for stream in opened:
        stream.detach().close()


@pytest.mark.parametrize("broken", BROKEN)
def test_what_can_not_be_written_is_dropped(broken: str, output: Callable[..., None]) -> None:
    make, number = BROKEN[broken]
    output(make())
    with standard_streams() as streams:
        for _ in range(3):
            click.echo("x" * 100_000)
            sys.stdout.flush()
        lost = streams.lost_output
    assert lost == (None if number == errno.EPIPE else os.strerror(number))


# What a command that reports in its output, and one whose outcome lies elsewhere, end with.
@pytest.mark.parametrize(("name", "codes"), [("plan", (1, 0)), ("run", (0, 0))])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_exit_code_of_a_command_whose_output_is_lost(
    name: str,
    codes: tuple[int, int],
    broken: str,
    output: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make, number = BROKEN[broken]
    monkeypatch.setattr(command_line.group, "main", lambda *_, **__: click.echo("x" * 100_000))
    monkeypatch.setattr(sys, "argv", ["dstrain", name])
    output(make())
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code == codes[number == errno.EPIPE]
    said = f"error: standard output: {os.strerror(number)}: not all of it could be written\n"
    assert capfd.readouterr().err == ("" if number == errno.EPIPE else said)


def test_where_nothing_can_be_said_the_exit_code_still_tells(
    output: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dstrain", "plan", "--no-such-option"])
    output(full_disk(), "stdout", "stderr")
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code == 2


def test_a_reader_who_stands_still_is_not_waited_for_while_ranks_train(output: Callable[..., None]) -> None:
    reader, writer = os.pipe()
    output(writer)
    began = time.monotonic()
    with standard_streams():
        wait_for_readers(0.2)
        for _ in range(50):
            click.echo("x" * 10_000)
            sys.stdout.flush()
        assert time.monotonic() - began < 30
        while len(os.read(reader, 2**16)) == 2**16:
            pass
        click.echo("it is read again")
        sys.stdout.flush()
        assert os.read(reader, 100).endswith(b"it is read again\n")
    os.close(reader)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_slow_reader_gets_everything(blocking: bool, output: Callable[..., None]) -> None:
    """Another program may have made the terminal non-blocking, which Python takes for an error."""
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    output(writer)
    got = bytearray()

    def read() -> None:
        while block := os.read(reader, 3000):
            got.extend(block)
            time.sleep(0.001)

    thread = threading.Thread(target=read)
    thread.start()
    with standard_streams() as streams:
        click.echo("y" * 300_000)
    assert streams.lost_output is None
    os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # the end of the pipe
    thread.join(60)
    os.close(reader)
    assert bytes(got) == b"y" * 300_000 + b"\n"


def test_what_the_encoding_does_not_have_is_an_escape(output: Callable[..., None], tmp_path: Path) -> None:
    output(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), encoding="latin-1")
    with standard_streams():
        print("café ☕ \udcff")
    assert (tmp_path / "log").read_bytes() == b"caf\xe9 \\u2615 \\udcff\n"


def test_streams_that_are_closed(tmp_path: Path) -> None:
    """No file that is opened later is taken for standard output."""
    code = f"""
import os, sys
from dstrain.cli.standard_streams import standard_streams
with standard_streams():
    file = open({str(tmp_path / "file")!r}, "w")
    assert file.fileno() > 2, file.fileno()
    print("lost")
    os.write(1, b"lost too")
    file.write("kept")
"""
    command = f'exec "{sys.executable}" -c "$1" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", command, "bash", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("broken", BROKEN)
def test_a_rank_whose_console_is_gone_trains_on(broken: str) -> None:
    """Its launcher's log lies on a disk that is full, or the ssh that carried it was lost."""
    console = _Console(io.FileIO(BROKEN[broken][0](), "w"), encoding="utf-8", write_through=True)
    _say("a note", console)
    console.write("step 1\n")
    console.flush()
    with suppress(OSError):
        console.detach().close()


def test_a_stream_without_a_descriptor_stays(capsys: pytest.CaptureFixture[str]) -> None:
    with standard_streams() as streams:
        assert isinstance(streams, StandardStreams)
        print("heard")
    assert capsys.readouterr().out == "heard\n"

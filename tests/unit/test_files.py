"""Files are written where they were meant to be, not through links, and are as open as the folder that they are in."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dstrain.files import (
    make_executable,
    make_folder,
    make_shared_folder,
    open_to_group,
    open_to_write,
    parse_json,
    read_bounded,
    umask_in,
    write_atomically,
)
from dstrain.runs.run_folder import Access, RunFolder, json_lines

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
CANARY = "nobody has touched this\n"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "canary"
    path.write_text(CANARY)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)
    return path


def link(path: Path, canary: Path) -> None:
    path.symlink_to(canary)


def link_to_nothing(path: Path, canary: Path) -> None:
    path.symlink_to(canary.with_name("not there"))


def hard_link(path: Path, canary: Path) -> None:
    os.link(canary, path)


def pipe(path: Path, canary: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, canary: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("flags", [APPEND, os.O_RDWR | os.O_CREAT, os.O_WRONLY])
@pytest.mark.parametrize(
    ("put", "words"),
    [
        (link, "it is a link"),
        (link_to_nothing, "it is a link"),
        (hard_link, "it is a hard link"),
        (pipe, "it is a pipe"),
        (folder, "it is a folder"),
    ],
)
def test_what_is_no_file_of_its_own_is_not_written(
    put: Callable[[Path, Path], None], words: str, flags: int, run: Path, canary: Path
) -> None:
    path = run / "logs" / "rank-0.log"
    put(path, canary)
    with pytest.raises(OSError, match=words) as caught:
        open_to_write(path, flags, below=run)
    assert caught.value.filename == str(path)
    assert canary.read_text() == CANARY and not canary.with_name("not there").exists()


def test_a_link_that_comes_after_the_look_is_not_followed(
    run: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "launches.jsonl"
    monkeypatch.setattr("dstrain.files._refuse_other_kinds", lambda status, path: path.symlink_to(canary))
    path.touch()
    look = os.stat

    def replaced(name: str, **options: object) -> os.stat_result:
        status = look(name, **options)  # type: ignore[arg-type]
        if name == path.name:
            path.unlink()
        return status

    monkeypatch.setattr("dstrain.files.os.stat", replaced)
    with pytest.raises(OSError, match="symbolic links"):
        open_to_write(path, APPEND)
    assert canary.read_text() == CANARY


def test_no_folder_on_the_way_may_be_a_link_but_the_first(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / "logs").rmdir()
    (run / "logs").symlink_to(outside)
    for write in (
        lambda: open_to_write(run / "logs" / "rank-0.log", APPEND, below=run),
        lambda: write_atomically(run / "logs" / "rank-0.status.json", "{}", below=run),
        lambda: make_folder(run / "logs" / "inner", below=run),
        lambda: make_folder(run / "logs", below=run),
    ):
        with pytest.raises(OSError, match="it is a link, and not a folder"):
            write()
    assert not list(outside.iterdir())
    (run / "logs").unlink()
    linked = tmp_path / "linked"
    linked.symlink_to(run)
    make_folder(linked / "logs", below=linked)
    os.close(open_to_write(linked / "logs" / "rank-0.log", APPEND, below=linked))
    assert (run / "logs" / "rank-0.log").is_file()


def test_an_atomic_write_replaces_a_link(run: Path, canary: Path) -> None:
    (run / "plan.json").symlink_to(canary)
    write_atomically(run / "plan.json", "new")
    assert not (run / "plan.json").is_symlink() and (run / "plan.json").read_text() == "new"
    assert canary.read_text() == CANARY and len(list(run.iterdir())) == 2


def test_an_atomic_write_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "gone" / "plan.json", "new")
    assert "gone" in caught.value.filename and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
@pytest.mark.parametrize(
    ("access", "of_folder", "of_file"),
    [("private", 0o700, 0o600), ("group", 0o750, 0o640), ("umask", 0o777, 0o666)],
)
def test_modes(access: Access, of_folder: int, of_file: int, mask: int, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "run")
    if access == "umask":
        of_folder, of_file = of_folder & ~mask, of_file & ~mask
    with umask(mask):
        run.make(access)
        assert mode(run.path) == mode(run.logs) == of_folder
        for path in (run.plan, run.rank_status(0)):
            write_atomically(path, "text", below=run.path)
            assert mode(path) == of_file
        os.close(open_to_write(run.launches, APPEND))
        assert mode(run.launches) == of_file
        make_executable(run.plan)
        assert mode(run.plan) == of_file | (of_file & 0o444) >> 2
        run.record.touch(mode=0o600)
        open_to_group(run.record)
        assert mode(run.record) == (0o640 if access == "group" else 0o600)
        # What libraries make in a process that works in this folder.
        with umask(umask_in(run.path)):
            (run.path / "made").touch()
            (run.path / "folder").mkdir()
        assert mode(run.path / "made") == of_file and mode(run.path / "folder") == of_folder


def test_a_folder_that_is_there_keeps_its_permissions(tmp_path: Path) -> None:
    """As an older dstrain has made it; what is new in it is open to as many people."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.path.chmod(0o755)
    with umask(0o022):
        run.make("private")
        write_atomically(run.plan, "text")
        assert (mode(run.path), mode(run.logs), mode(run.plan)) == (0o755, 0o755, 0o644)
        assert umask_in(run.path) == 0o022


def test_a_group_that_is_inherited_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    make_shared_folder(tmp_path / "run", 0o750)
    assert mode(tmp_path / "run") == 0o2750


def test_without_a_folder_nobody_else_gets_anything(tmp_path: Path) -> None:
    with umask(0o000):
        assert umask_in(tmp_path / "not there") == 0o077


@pytest.mark.timeout(10)
def test_reads_are_bounded_and_never_wait(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "read"
    path.write_bytes(b"x" * 100)
    assert len(read_bounded(path, 100)) == 100
    with pytest.raises(ValueError, match="more than"):
        read_bounded(path, 99)
    for put in (link, pipe, folder):
        path.unlink()
        put(path, canary)
        with pytest.raises((ValueError, IsADirectoryError)):
            read_bounded(path, 100)
        if put is pipe:
            assert list(json_lines(path)) == []


def test_json_that_nobody_has_written_is_none(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "{", ""):
        with pytest.raises(ValueError):
            parse_json(text)
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1}\n[1]\n' + "[" * 100_000 + '\n{"step": 2}\n' + "x" * 200_001 + '\n{"step": 3}\n'
    )
    assert list(json_lines(path, 200_000)) == [{"step": 1}, {"step": 2}]

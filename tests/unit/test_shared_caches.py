"""A cache whose place several users share: another user's entries are passed over, and his locks hold up nobody."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dstrain.config.files import cache_folder, cache_note
from dstrain.data import prepare as prepare_module
from dstrain.data.dataset_summary_cache import read_summary
from dstrain.data.prepare import prepare
from dstrain.errors import DstrainError
from dstrain.launch.environment import default_environment
from dstrain.shared_caches import clear_leftovers, is_own, make_folder, open_lock, own_place, write_own

MALLORY = 4002


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Let a file or folder belong to another user, as far as `is_own` can see."""
    real, owners = Path.lstat, {}

    def lstat(path: Path) -> os.stat_result:
        status = real(path)
        uid = owners.get(str(path), os.getuid())
        return SimpleNamespace(st_mode=status.st_mode, st_uid=uid, st_gid=status.st_gid)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "lstat", lstat)
    return lambda path, uid: owners.update({str(path): uid})


def test_own_and_roots_are_believed(tmp_path: Path, owner: Callable[[Path, int], None]) -> None:
    file = tmp_path / "a"
    file.write_text("a")
    file.chmod(0o644)
    assert is_own(file)
    owner(file, 0)
    assert is_own(file)
    owner(file, MALLORY)
    assert not is_own(file)


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o622, 0o777])
def test_what_others_can_write_is_not(mode: int, tmp_path: Path) -> None:
    for path in (tmp_path / "file", tmp_path / "folder"):
        path.touch() if path.name == "file" else path.mkdir()
        path.chmod(mode)
        assert not is_own(path)


def test_a_group_of_ones_own_is_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.touch()
    file.chmod(0o664)
    group = file.stat().st_gid
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_name="alice", pw_gid=group))
    for name, members, own in (("alice", [], True), ("alice", ["bob"], False), ("users", [], False)):
        found = SimpleNamespace(gr_gid=group, gr_name=name, gr_mem=members)
        monkeypatch.setattr("grp.getgrgid", lambda gid, found=found: found)
        assert is_own(file) is own


def test_links_are_not_believed_nor_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "entry").symlink_to(victim)
    assert not is_own(tmp_path / "entry")
    write_own(tmp_path / "entry", "new")
    assert victim.read_text() == "mine" and (tmp_path / "entry").read_text() == "new"
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError):
        open_lock(tmp_path / "lock")


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_what_is_made_is_for_this_user_alone(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        make_folder(tmp_path / "a" / "b")
        write_own(tmp_path / "a" / "b" / "c", "")
        os.close(open_lock(tmp_path / "lock"))
        (tmp_path / "text.txt").write_text("some text " * 20)
        data = prepare(str(tmp_path / "text.txt"), "bytes", 16, 0, tmp_path / "a" / "data")
    finally:
        os.umask(before)
    made = [path for top in (tmp_path / "a", tmp_path / "lock") for path in (top, *top.rglob("*"))]
    assert data.folder in made
    assert {oct(path.stat().st_mode & 0o777) for path in made} == {"0o700", "0o600"}


def test_a_shared_cache_has_a_folder_for_each_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Callable[[Path, int], None]
) -> None:
    shared = tmp_path / "shared" / "dstrain"
    shared.mkdir(parents=True)
    shared.chmod(0o1777)
    monkeypatch.delenv("DSTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.parent))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own = shared / f"uid-{os.geteuid()}"
    assert cache_folder() == own and own.stat().st_mode & 0o777 == 0o700
    assert str(own) in (cache_note() or "")
    # Another user was there before, with a folder of this name.
    owner(own, MALLORY)
    assert cache_folder() == tmp_path / "home" / ".cache" / "dstrain"
    owner(tmp_path / "home" / ".cache" / "dstrain", MALLORY)
    owner(tmp_path / "home" / ".cache" / "dstrain" / f"uid-{os.geteuid()}", MALLORY)
    with pytest.raises(DstrainError, match="other users can write to the cache"):
        cache_folder()


def test_a_cache_of_ones_own_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "new"))
    assert cache_folder() == tmp_path / "new" and cache_note() is None
    (tmp_path / "link").symlink_to(tmp_path / "new")
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "link"))
    assert cache_folder() == tmp_path / "link" and cache_note() is None


def test_another_users_tokens_are_made_anew(tmp_path: Path, owner: Callable[[Path, int], None]) -> None:
    """His have matching checks, and other tokens."""
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text("some text " * 20)
    first = prepare(str(text), "bytes", 16, 0, cache)
    assert prepare(str(text), "bytes", 16, 0, cache).folder.stat().st_ino == first.folder.stat().st_ino
    before = first.folder.stat().st_ino
    owner(first.folder / "tokens.bin", MALLORY)
    with pytest.raises(DstrainError):  # here the owner sticks to the name, so that the new ones are his too
        prepare(str(text), "bytes", 16, 0, cache)
    assert first.folder.stat().st_ino != before


def test_another_users_summary_is_passed_over(
    tmp_path: Path, owner: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("some text " * 20)
    kept = []
    real = prepare_module.keep_summary
    monkeypatch.setattr(prepare_module, "keep_summary", lambda *all: kept.append(all[0]) or real(*all))
    prepare_module._prepare_and_keep(
        {
            "source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "seq_len": 16, "validation": 0,
            "cache_dir": str(tmp_path / "cache"), "pack": True, "begin": "auto",
        }
    )  # fmt: skip
    [file] = kept
    assert read_summary(file) is not None
    owner(file, MALLORY)
    assert read_summary(file) is None


def test_a_lock_of_another_user_does_not_wait(tmp_path: Path) -> None:
    """His own folder has no locks of others, and nobody else can open one in this user's."""
    descriptor = open_lock(tmp_path / "lock")
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)
    assert (tmp_path / "lock").stat().st_mode & 0o077 == 0
    (tmp_path / "lock").chmod(0o666)  # as an older dstrain made it
    os.close(open_lock(tmp_path / "lock"))
    assert (tmp_path / "lock").stat().st_mode & 0o077 == 0


def test_compiled_code_is_not_loaded_from_where_others_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(mode=0o700)
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "torch_extensions").mkdir()
    (shared / "torch_extensions").chmod(0o777)

    def folder(**environ: str) -> str | None:
        return default_environment("cpu", 1, True, environ=environ).get("TORCH_EXTENSIONS_DIR")

    assert folder(XDG_CACHE_HOME=str(own)) is None
    for environ in (
        {"XDG_CACHE_HOME": str(shared)},
        {"TORCH_EXTENSIONS_DIR": str(shared / "torch_extensions")},
    ):
        assert folder(**environ) == str(shared / "torch_extensions" / f"uid-{os.geteuid()}")
    assert own_place(shared / "torch_extensions") is not None


def test_what_killed_processes_left_behind_goes_and_what_is_written_stays(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("dead.aa.part", "alive.bb.part", "unknown.cc.part", "old.dd.part", "whole"):
        (data / name).mkdir(parents=True)
        (data / name / "tokens.bin").write_bytes(b"t")
    for path in (data / "old.dd.part" / "tokens.bin", data / "old.dd.part"):
        os.utime(path, (0, 0))
    (data / "summaries").mkdir()
    stale = data / "summaries" / "x.json.ee.part"
    stale.write_text("{")
    os.utime(stale, (0, 0))
    (data / "dead.lock").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (data / "dead.ff.part").symlink_to(elsewhere)
    with open(open_lock(data / "alive.lock"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        clear_leftovers(tmp_path)
        assert sorted(path.name for path in data.glob("*.part")) == ["alive.bb.part", "unknown.cc.part"]
    assert elsewhere.is_dir() and (data / "whole").is_dir() and not stale.exists()
    clear_leftovers(tmp_path)
    assert [path.name for path in data.glob("*.part")] == ["unknown.cc.part"]
    clear_leftovers(tmp_path / "nowhere")

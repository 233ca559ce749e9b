"""What is kept from one run of the tests to the next: for one key, for one run at a time, and only where it may be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.kept import kept_folder, key_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSTRAIN_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_left_there_is_there(tmp_path: Path) -> None:
    for wanted in ([], ["made"]):
        with kept_folder("kind", "key", tmp_path / "otherwise") as (folder, kept):
            assert kept and [path.name for path in folder.iterdir()] == wanted
            (folder / "made").touch()
    assert not (tmp_path / "otherwise").exists()


def test_another_key_begins_anew_and_the_old_one_goes(tmp_path: Path, cache: Path) -> None:
    for key in ("old", "new"):
        with kept_folder("kind", key, tmp_path / "otherwise") as (folder, _):
            assert not list(folder.iterdir())
            (folder / "made").touch()
    assert [path.name for path in (cache / "kind").iterdir()] == ["new"]


def test_who_comes_meanwhile_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with (
        kept_folder("kind", "key", tmp_path / "one") as (first, kept),
        kept_folder("kind", "other", tmp_path / "two") as (second, also_kept),
    ):
        assert kept and not also_kept and first.exists() and second == tmp_path / "two"
    assert first.exists() and not second.exists()


def test_nothing_is_kept_where_nothing_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_TEST_CACHE", "")
    with kept_folder("kind", "key", tmp_path / "otherwise") as (folder, kept):
        assert folder == tmp_path / "otherwise" and folder.exists() and not kept
    assert not folder.exists()


def test_a_key_knows_where_one_part_ends() -> None:
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("abc", "")}) == 4
    assert key_of("a", b"b") == key_of(b"a", "b")

"""Repositories that others have made: git says what was changed, and nothing that they name is run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.runs.record.source import UNKNOWN, source_of
from tests.unit import test_record
from tests.unit.test_record import git

repository = test_record.repository


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A program that leaves a word. At the end it must not have been run."""
    word = tmp_path / "word"
    program = tmp_path / "canary"
    program.write_text(f"#!/bin/sh\necho ran >> {word}\ncat\n")
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield str(program)
    assert not word.exists()


def change(repository: Path) -> None:
    """In the same size, so that nothing but the content tells, and with a racy time."""
    (repository / "train.yaml").write_text("zero: 3\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"core.fsmonitor": "{canary}"},
        {"filter.x.clean": "{canary}", "filter.x.smudge": "{canary}", "filter.x.required": "true"},
        {"filter.x.process": "{canary}"},
        {"diff.external": "{canary}"},
        {"diff.x.textconv": "{canary}", "diff.x.command": "{canary}"},
        {"core.pager": "{canary}", "pager.diff": "{canary}", "pager.ls-files": "{canary}"},
        {"core.sshCommand": "{canary}", "core.gitProxy": "{canary}", "core.askPass": "{canary}"},
        {"core.hooksPath": "{hooks}"},
        {"core.editor": "{canary}", "alias.diff": "!{canary}", "alias.ls-files": "!{canary}"},
        {"include.path": "{included}"},
        {"includeIf.gitdir:/.path": "{included}"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_configuration_names_is_not_run(
    settings: dict[str, str],
    repository: Path,
    canary: str,
    tmp_path: Path,
) -> None:
    hooks, included = tmp_path / "hooks", tmp_path / "included"
    hooks.mkdir()
    for name in ("post-index-change", "pre-auto-gc", "reference-transaction", "fsmonitor-watchman"):
        shutil.copy(canary, hooks / name)
    included.write_text(f'[core]\nfsmonitor = {canary}\n[filter "x"]\nclean = {canary}\nprocess = {canary}\n')
    (repository / ".gitattributes").write_text("* filter=x diff=x merge=x\n")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "attributes")
    for name, value in settings.items():
        git(repository, "config", name, value.format(canary=canary, hooks=hooks, included=included))
    change(repository)
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and b"+zero: 3" in source.diff


def test_nor_what_a_submodule_or_a_missing_object_names(
    repository: Path, canary: str, tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    shutil.copytree(repository, inner)
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "sub")
    git(repository, "commit", "-q", "-m", "sub")
    git(repository / "sub", "config", "core.fsmonitor", canary)
    git(repository / "sub", "config", "filter.x.clean", canary)
    (repository / "sub" / ".gitattributes").write_text("* filter=x\n")
    (repository / "sub" / "train.yaml").write_text("zero: 3\n")
    # A partial clone, which fetches what is missing with whatever its configuration says.
    git(repository, "config", "core.repositoryFormatVersion", "1")
    git(repository, "config", "extensions.partialClone", "origin")
    git(repository, "config", "remote.origin.promisor", "true")
    git(repository, "config", "remote.origin.url", f"ext::{canary}")
    git(repository, "config", "remote.origin.uploadpack", canary)
    git(repository, "config", "protocol.ext.allow", "always")
    blob = git(repository, "rev-parse", "HEAD:train.yaml")
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    change(repository)
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.changes == UNKNOWN


def test_variables_of_git_do_not_lead_elsewhere(
    repository: Path,
    canary: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    change(repository)
    for name, value in {
        "GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other), "GIT_EXTERNAL_DIFF": canary, "GIT_PAGER": canary,
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": canary,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.folder == str(repository) and b"+zero: 3" in source.diff


def test_a_work_tree_that_lies_elsewhere_is_not_read(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "train.yaml").write_text("mine: 1\n")
    git(repository, "config", "core.worktree", str(tmp_path / "private"))
    assert source_of(repository, besides=repository / "runs") is None


def test_a_bare_repository_among_files_is_none(repository: Path, canary: str, tmp_path: Path) -> None:
    planted = tmp_path / "data"
    shutil.copytree(repository / ".git", planted)
    with (planted / "config").open("a") as config:
        config.write(f"[core]\nworktree = {planted}\nfsmonitor = {canary}\n")
    assert source_of(planted, besides=planted / "runs") is None


def test_a_linked_work_tree_is_its_own(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "-q", str(tmp_path / "linked"))
    (tmp_path / "linked" / "train.yaml").write_text("zero: 3\n")
    source = source_of(tmp_path / "linked", besides=tmp_path / "runs")
    assert source is not None and b"+zero: 3" in source.diff
    clean = source_of(repository, besides=repository / "runs")
    assert clean is not None and clean.changes is None


def test_what_the_user_ignores_does_not_count(repository: Path, tmp_path: Path) -> None:
    for name in ("own", "exclude", "tree", "seen"):
        (repository / f"{name}.x").write_text("a")
    (tmp_path / "ignored").write_text("own.x\n")
    git(repository, "config", "core.excludesFile", str(tmp_path / "ignored"))
    (repository / ".git" / "info" / "exclude").write_text("exclude.x\n")
    (repository / ".gitignore").write_text("tree.x\n.gitignore\n")
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.names == ("seen.x",)


def test_another_users_repository_is_said_to_be_one(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """git itself looks at the owner; this variable of its own tests tells it that all are others'."""
    change(repository)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("dstrain.runs.record.source._CLOSED", {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"})
    source = source_of(repository, besides=repository / "runs")
    assert source is not None and source.refused == "it belongs to another user"
    assert (source.changes, source.diff, source.revision) == (UNKNOWN, b"", None)


def test_links_are_not_followed(repository: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("a")
    (repository / "link").symlink_to(outside)
    os.mkfifo(repository / "pipe")
    first = source_of(repository, besides=repository / "runs")
    outside.write_text("b")
    second = source_of(repository, besides=repository / "runs")
    assert first is not None and second is not None and first.changes == second.changes != UNKNOWN

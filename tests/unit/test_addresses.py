"""An address where a path is wanted is one message with what to do, and a file of such a name is a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.addresses import refuse_address
from dstrain.api.exporting import export
from dstrain.config.files import is_hub_name
from dstrain.config.text_file import read_text
from dstrain.data.tokenizing.tokenizer_files import tokenizer_folder
from dstrain.errors import DstrainError

DOWN, HUB = {}, {"hub": True}


@pytest.mark.parametrize(
    ("address", "options", "hint"),
    [
        ("https://a.org/x.txt", DOWN, "curl -LO https://a.org/x.txt, and name what it has fetched"),
        ("s3://bucket/x", DOWN, "aws s3 cp --recursive s3://bucket/x FOLDER, and name what it has fetched"),
        ("s3:/bucket/x", DOWN, "aws s3 cp --recursive s3://bucket/x FOLDER, and name what it has fetched"),
        ("gs://b/x", DOWN, "gcloud storage cp --recursive gs://b/x FOLDER, and name what it has fetched"),
        ("file:///data/a%20b.txt", DOWN, "name the path: /data/a b.txt"),
        ("FILE:/data/x", {"written": True}, "name the path: /data/x"),
        (
            "hf://datasets/org/x/a.txt",
            DOWN,
            "as data, name it as on the hub: org/x",
        ),
        ("https://huggingface.co/org/x/tree/main", HUB, "name it as on the hub: org/x"),
        ("https://huggingface.co/gpt2", HUB, "name it as on the hub: gpt2"),
        ("https://huggingface.co/org/x", DOWN, "hf download org/x --local-dir FOLDER, and name the folder"),
        ("hf://org/x", HUB, "name it as on the hub: org/x"),
        ("magnet://x", DOWN, "copy it to this machine"),
        ("s3://bucket/runs", {"written": True}, "name a folder, and copy it there afterwards"),
    ],
)
def test_addresses(address: str, options: dict[str, bool], hint: str) -> None:
    with pytest.raises(DstrainError) as refused:
        refuse_address(address, "--data", **options)
    assert refused.value.hint == hint and refused.value.where == "--data"
    assert " is an address" in refused.value.message


@pytest.mark.parametrize(
    "path", ["a/b", "C:/x", "module:name", "./a:/b", "org/name@v1", "", "~/x", "a b://c"]
)
def test_paths(path: str) -> None:
    refuse_address(path, "--data")


def test_a_folder_of_such_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:/bucket").mkdir(parents=True)
    refuse_address("s3://bucket", "--data")


def test_who_refuses_them(tmp_path: Path) -> None:
    """A path that was made of one has lost a slash."""
    for ask in (
        lambda: read_text(Path("https://a.org/c.yaml"), where="--config"),
        lambda: tokenizer_folder("https://huggingface.co/org/x"),
    ):
        with pytest.raises(DstrainError, match=r"https://\S+ is an address"):
            ask()
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(DstrainError, match="s3://b/x is an address, and what is written"):
        export(tmp_path, "s3://b/x")


def test_names_on_the_hub_without_an_organisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("gpt2") and is_hub_name("gpt2@main") and is_hub_name("org/gpt2")
    assert not is_hub_name("gpt-2") and not is_hub_name("quickstart") and not is_hub_name("models")
    Path("gpt2").mkdir()
    assert not is_hub_name("gpt2")

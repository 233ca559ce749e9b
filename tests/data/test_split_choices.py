"""Which split of a data set is trained on: what says so counts or is refused, and none is trained on unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.api.events import SILENT
from dstrain.api.prepare_data import prepare_data
from dstrain.config.loader import load_config
from dstrain.data.listing.sources import find_files
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import data_parts
from tests.support.table_files import parquet, saved
from tests.support.token_files import write_llm_c, write_megatron

TEXT = {"text": "some text"}
LINE = b'{"text": "some text"}\n'
Files = dict[str, bytes | Callable[[Path], object]]


def lay(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)


HERE: Files = {
    "one": saved([TEXT]),
    "several": saved({"train": [TEXT], "test": [TEXT]}),
    "a.jsonl": LINE,
    "tables/a.parquet": parquet(TEXT),
    "org/name/a.jsonl": LINE,
}
SPLIT = "is for data sets on the hub and for folders in which save_to_disk"


@pytest.mark.parametrize(
    ("source", "choice", "words", "hint"),
    [
        ("one", {"split": "test"}, f"split (test) {SPLIT}", "one/**/test-*.parquet"),
        ("a.jsonl", {"split": "train"}, SPLIT, "remove it"),
        ("tables", {"split": "train"}, SPLIT, "tables/**/train-*.parquet"),
        ("tables/*.parquet", {"split": "train"}, SPLIT, "by a pattern"),
        ("org/name", {"split": "train"}, SPLIT, "org/name/**/train-*.parquet"),
        ("stdlib", {"split": "train"}, SPLIT, "remove it"),
        *(
            (source, {choice: "v1"}, f"{choice} (v1) is for data sets on the hub, and this is", "remove it")
            for source in ("one", "several", "a.jsonl", "tables", "tables/*", "org/name", "stdlib", "./not/here")
            for choice in ("config", "revision")
        ),
    ],
)  # fmt: skip
def test_what_would_be_passed_over_is_refused(tmp_path, monkeypatch, source, choice, words, hint) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, HERE)
    with pytest.raises(DstrainError) as refused:
        find_files(source, **choice)
    assert words in refused.value.message and hint in str(refused.value.hint), str(refused.value)
    assert refused.value.where == source


def test_of_several_saved_splits_one_is_taken(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, HERE)
    assert [file.relative for file in find_files("several", split="test").files] == [
        "test/data-00000-of-00001.arrow"
    ]


def test_a_validation_file_has_nothing_of_the_source_on_the_hub(tmp_path: Path) -> None:
    """Only another split of a data set there has."""
    source = {"path": "org/name", "config": "english", "split": "train", "revision": "v1"}
    for validation, shared in (("held.jsonl", None), ("org/other", "english")):
        data = [{**source, "validation": validation}]
        config = load_config(recipe=None, config_file=None, settings=(), flags={"data": data}).config
        [trained, held] = data_parts(config)
        assert (trained.config, trained.split, trained.revision) == ("english", "train", "v1")
        assert (held.config, held.split) == (shared, None) and (held.revision is None) == (shared is None)


@pytest.mark.parametrize("choice", ["config", "split", "revision"])
def test_code_of_your_own_has_none_of_them(choice: str) -> None:
    data = [{"path": "my_module:texts", choice: "x"}]
    resolved = load_config(recipe=None, config_file=None, settings=(), flags={"data": data})
    words = rf"{choice} \(x\) is for data sets on the hub, and my_module:texts is code"
    with pytest.raises(DstrainError, match=words) as refused:
        prepare_data(resolved, "bytes", SILENT)
    assert refused.value.hint == f"make it an option of your function: options: {{{choice}: x}}"


BOTH: dict[str, tuple[Files, str]] = {
    "llm.c": (
        {
            "d/fineweb_train_000001.bin": lambda path: write_llm_c(path, [1, 2]),
            "d/fineweb_val_000000.bin": lambda path: write_llm_c(path, [1, 2]),
        }, "d/**/*train*.bin",
    ),
    "megatron": (
        {
            "d/x.train.bin": lambda path: write_megatron(path, [[[1]]]),
            "d/x.valid.bin": lambda path: write_megatron(path, [[[1]]]),
        }, "d/**/*train*.bin",
    ),
    "downloaded": (
        {"d/data/train-0.parquet": parquet(TEXT), "d/data/test-0.parquet": parquet(TEXT)}, "d/**/*train*.parquet"
    ),
    "folders": ({"d/train/0.parquet": parquet(TEXT), "d/dev/0.parquet": parquet(TEXT)}, "d/**/train/*.parquet"),
    "lines": ({"d/Train.jsonl": LINE, "d/validation.jsonl": LINE}, "d/**/*train*.jsonl"),
    "below train": ({"d/train/x.jsonl": LINE, "d/train/eval.jsonl": LINE}, ""),
    "csv": ({"d/train.csv": b"text\na\n", "d/test.csv": b"text\na\n"}, "d/**/*train*.csv"),
}  # fmt: skip


@pytest.mark.parametrize("pattern", [False, True], ids=["folder", "pattern"])
@pytest.mark.parametrize("name", BOTH)
def test_both_splits_of_a_folder_are_refused(tmp_path, monkeypatch, name, pattern) -> None:
    monkeypatch.chdir(tmp_path)
    files, way_out = BOTH[name]
    lay(tmp_path, files)
    with pytest.raises(
        DstrainError, match=r"both .*rain.* and .* would be trained on, and the second"
    ) as refused:
        find_files("d/**/*" if pattern else "d")
    if not way_out:
        assert str(refused.value.hint).startswith("move the files of eval")
    if pattern or not way_out:
        return
    assert way_out in str(refused.value.hint), refused.value.hint
    found = find_files(way_out.replace("*train*", "*[tT]rain*")).files
    assert found and "dev" not in found[0].relative


@pytest.mark.parametrize(
    "files",
    [
        {"d/train.py": b"text", "d/tests/test_train.py": b"text", "d/test.csv": b"1,2\n3,4\n", "d/train.csv": b"1,2\n"},
        {"d/dev/train-0.jsonl": LINE, "d/dev/train-1.jsonl": LINE},
        {"d/training.jsonl": LINE, "d/testing.jsonl": LINE, "d/latest.jsonl": LINE},
        {"d/test.jsonl": LINE, "d/valid.jsonl": LINE},
        {"d/train.jsonl": LINE, "d/tests/test.txt": b"text"},
    ],
)  # fmt: skip
def test_other_names_are_read(tmp_path, monkeypatch, files) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path, files)
    assert len(find_files("d").files) == len(files)

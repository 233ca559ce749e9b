"""`python -m dstrain.data.prepare`: two at once, what it says about errors, and where it writes."""

import json
import os
import subprocess
import sys

import pytest

from dstrain.data.prepare import main


def write_request(tmp_path, **changes):
    request = {"source": "stdlib", "tokenizer": "bytes", "seq_len": 128, "validation": 0.05}
    request |= {"cache_dir": str(tmp_path / "cache"), "pack": True, "begin": "auto", **changes}
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request))
    return path


def test_two_processes_at_once_share_the_work_and_keep_to_the_cache_folder(tmp_path):
    request = write_request(tmp_path)
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith(("HF_", "XDG_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dstrain.data.prepare", request, tmp_path / f"out{number}.json"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    summaries = [json.loads((tmp_path / f"out{number}.json").read_text()) for number in range(2)]
    assert summaries[0] == summaries[1]
    assert summaries[0]["tokens"] == summaries[0]["bytes"] + summaries[0]["documents"]
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 2 and tmp_path / "cache" / "summaries" in folders
    assert len(list((tmp_path / "cache" / "summaries").iterdir())) == 1
    assert list((tmp_path / "home").iterdir()) == []


def test_the_command_line_says_one_thing_about_an_error(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    assert main([str(write_request(tmp_path, source=str(path))), str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    problem, hint = said.err.splitlines()
    assert problem == f"error: {path}:2: this line has no field 'text'; its fields are 'body'"
    assert hint.startswith('  hint: each line is one object: {"text": "..."}; on_bad_record: skip ')
    assert not (tmp_path / "out.json").exists()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "exactly source"),
        ('{"source": "stdlib"}', "exactly source"),
        (
            '{"source": "", "tokenizer": "", "seq_len": "8", "validation": 0,'
            ' "cache_dir": "", "pack": true, "begin": ""}',
            "'seq_len' is '8'",
        ),
        (
            '{"source": "", "tokenizer": "", "seq_len": 8, "validation": true,'
            ' "cache_dir": "", "pack": true, "begin": ""}',
            "'validation' is True",
        ),
        (
            '{"source": "s", "tokenizer": "b", "seq_len": 8, "validation": 0,'
            ' "cache_dir": "", "pack": 1, "begin": ""}',
            "'pack' is 1",
        ),
    ],
)
def test_requests_that_are_none(tmp_path, capsys, content, words):
    (tmp_path / "request.json").write_text(content)
    assert main([str(tmp_path / "request.json"), str(tmp_path / "out.json")]) == 2
    assert words in capsys.readouterr().err


def test_command_line_files_that_are_not_there(tmp_path, capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json"), "out.json"]) == 2
    assert "can't be read" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("enough text for some rows " * 9)
    request = write_request(tmp_path, source=str(tmp_path / "a.txt"), seq_len=8)
    assert main([str(request), str(tmp_path / "no" / "out")]) == 2
    assert "can't be written" in capsys.readouterr().err

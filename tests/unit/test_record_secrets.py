"""The recorded diff holds no secrets, and is still one that git takes where no secret stood."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from dstrain.runs.record.secrets import looks_secret, names_secrets
from dstrain.runs.record.source import source_of
from tests.unit import test_record
from tests.unit.test_record import git

repository = test_record.repository

HEX = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    "line",
    [
        "token: hf_" + "aB3" * 10,
        "x = 'sk-proj-" + "aB3" * 10 + "'",
        "export ANTHROPIC=sk-ant-" + "aB3_" * 6,
        "ghp_" + "aB3x" * 9,
        "github_pat_" + "aB3x" * 9,
        "aws = AKIA" + "ABCD1234EFGH5678",
        "https://hooks/xoxb-1234567890-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
        "password = hunter",
        'password: "swordfish"',
        "DB_PASSWORD=swordfish",
        "  'api_key': 'abcdef123456',",
        "export WANDB_API_KEY=" + HEX[:40],
        "AWS_SECRET_ACCESS_KEY = wJalrXUtnFEMI7MDENGbPxRfiCYEXAMPLEKEY",
        "secret: a1b2c3d4e5",
        "url: postgres://me:swordfish@db/runs",
        "Authorization: Bearer abcdefghijkl1234",
        "MIIEpAIBAAKCAQEA" + "aB3+" * 12,
    ],
)
def test_what_looks_like_a_secret(line: str) -> None:
    assert looks_secret(line.encode())


@pytest.mark.parametrize(
    "line",
    [
        "tokenizer: models/llama-3-8b",
        "max_tokens: 120",
        "sample_tokens=8",
        'pad_token = "[PAD]"',
        'eos_token: "<|endoftext|>"',
        "password: str",
        "password = None",
        "password = config.password",
        "password: ${DB_PASSWORD}",
        "def login(password, token=None):",
        'key = "model.layers.0.weight"',
        "revision: " + HEX[:40],
        "sha256: " + "ab01" * 16,
        "lr: 3e-4",
        "from dstrain.runs.checkpoint.manifest import choose_newest_of_all_that_are_there",
        "path: /mnt/data/projects/2024/alpha/Beta/gamma/delta/files",
    ],
)
def test_what_does_not(line: str) -> None:
    assert not looks_secret(line.encode())


def test_names_of_files() -> None:
    secret = (
        *(".env", "a/.env.local", "deploy/server.pem", "id_rsa", "x/id_ed25519.pub", ".netrc", ".pypirc"),
        *("credentials", "gcp-credentials.json", "tls.key", ".aws/config", ".ssh/known", "secrets.yaml"),
    )
    assert [name for name in secret if not names_secrets(name)] == []
    plain = ("train.yaml", "environment.py", "keys.py", "tokenizer.json", "secret_sauce.py", "monkey.py")
    assert [name for name in plain if names_secrets(name)] == []


def test_a_diff_says_in_place_what_it_leaves_out(repository: Path) -> None:
    key = [
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "b3BlbnNzaC1rZXk",
        "c2hvcnQ",
        "-----END OPENSSH PRIVATE KEY-----",
    ]
    before = {"train.yaml": "zero: 1\nlr: 1\n", "notes.txt": "a\n", ".env": "A=1\n", "tls.p12": b"\0\1"}
    after = {
        "train.yaml": "zero: 2\nwandb_api_key: a1b2c3d4e5f6\nlr: 1\n",
        "notes.txt": "\n".join(["a", *key, "b", ""]),
        ".env": "A=1\nB=plain\n",
        "tls.p12": b"\0\2\3",
    }
    for files in (before, after):
        for name, content in files.items():
            (repository / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if files is before:
            git(repository, "add", "-f", ".")
            git(repository, "commit", "-q", "-m", "second")
    source = source_of(repository, besides=repository / "runs")
    assert source is not None
    assert source.left_out == 1 + 4 + 1 + 1
    for word in (b"a1b2c3", b"b3Blb", b"c2hvcnQ", b"B=plain", b"A=1"):
        assert word not in source.diff, word
    assert b"+# 1 line left out: looks like a secret\n" in source.diff
    assert b"# tls.p12: left out: a file of this name holds secrets\n" in source.diff
    # The hash is of all: another secret is another state.
    (repository / ".env").write_text("A=1\nB=other\n")
    other = source_of(repository, besides=repository / "runs")
    assert other is not None and other.changes != source.changes
    # And git takes the rest of it.
    git(repository, "checkout", "-q", ".")
    included = ["--include=train.yaml", "--include=notes.txt"]
    subprocess.run(["git", "apply", *included, "-"], cwd=repository, input=source.diff, check=True)
    assert (repository / "train.yaml").read_text() == (
        "zero: 2\n# 1 line left out: looks like a secret\nlr: 1\n"
    )


@pytest.mark.parametrize(
    "unit", ["a", "key=", "password:", "eyJ-", "x://", "a:b@", "://a:", "token = '", "Bearer ", "aB3"]
)
def test_a_long_line_takes_no_long_time(unit: str) -> None:
    start = time.monotonic()
    looks_secret((unit * 2**20)[: 2**20].encode())
    assert time.monotonic() - start < 20

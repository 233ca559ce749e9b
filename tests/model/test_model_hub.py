"""Names on the hub: the library's own code against a small server in its place, in a process of its own as in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SAFE = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
    "one.safetensors": b"1" * 3000,
    "two.safetensors": b"2" * 3000,
    "consolidated.safetensors": b"3" * 3000,
    "pytorch_model.bin": b"4" * 3000,
    "README.md": b"",
}
REPOSITORIES = {
    "tiny/safe": SAFE,
    "gpt2": {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"1" * 3000},
    "tiny/old": {"config.json": b"{}", "pytorch_model.bin": b"4" * 3000, "tf_model.h5": b"5"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of https://huggingface.co as ``snapshot_download`` asks for."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models")
        count = 1 if path.split("/")[1] == "gpt2" else 2  # an old name has no organisation
        repository = "/".join(path.split("/")[1 : 1 + count])
        if repository == "tiny/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repository not in REPOSITORIES:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        files, (what, revision, *rest) = REPOSITORIES[repository], path.split("/")[1 + count :]
        if revision not in ("main", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if what == "revision":
            return self.answer(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{len(content):040x}"}
                for name, content in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        name = "/".join(rest)
        return self.answer(200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815 - a name of http.server

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def ask(endpoint: str, home: Path, name: str, what: str) -> tuple[int, str, Path]:
    """Exit code, what it says, and the folder that it names."""
    out = home / "out.json"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    for key in ("HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(key, None)
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.model.weights.hub", name, what, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    folder = Path(json.loads(out.read_text())["folder"]) if out.exists() else home
    return done.returncode, done.stderr, folder


@pytest.mark.parametrize(
    ("name", "what", "wanted"),
    [
        ("tiny/safe", "config", {"config.json", "tokenizer.json", "model.safetensors.index.json"}),
        ("tiny/safe", "weights", set(SAFE) - {"consolidated.safetensors", "pytorch_model.bin", "README.md"}),
        (f"tiny/safe@{COMMIT}", "config", {"config.json", "tokenizer.json", "model.safetensors.index.json"}),
        ("gpt2", "config", {"config.json", "tokenizer.json"}),
        ("gpt2", "weights", {"config.json", "tokenizer.json", "model.safetensors"}),
        ("tiny/old", "weights", {"config.json", "pytorch_model.bin"}),
    ],
)
def test_what_is_fetched(name: str, what: str, wanted: set[str], endpoint: str, tmp_path: Path) -> None:
    code, said, folder = ask(endpoint, tmp_path, name, what)
    assert code == 0, said
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == wanted
    files = REPOSITORIES[name.partition("@")[0]]
    assert all((folder / file).read_bytes() == files[file] for file in wanted)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny/none", ["'tiny/none' is neither a local folder", "nor a model on the hub"]),
        ("tiny/gated", ["tiny/gated is a gated repository", "hf auth login", "HF_TOKEN"]),
        ("tiny/safe@v9", ["tiny/safe has no revision 'v9'", "tree/main"]),
        ("ti--ny/safe", ["nor a valid name on the hub"]),
    ],
)
def test_what_the_hub_does_not_give(name: str, words: list[str], endpoint: str, tmp_path: Path) -> None:
    code, said, _ = ask(endpoint, tmp_path, name, "config")
    assert code == 2 and "Traceback" not in said
    assert all(word in said for word in words), said

"""A small server in the place of https://huggingface.co: as much as fetching a data set asks for."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "76543210fedcba9876543210fedcba9876543210"


def parquet(*texts: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), sink)
    return sink.getvalue()


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


SEVERAL = b"""---
configs:
- config_name: english
  data_files: en.jsonl
- config_name: german
  data_files: de.jsonl
---
"""
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "tiny/texts": {
        "README.md": b"# texts\n",
        "data/train-00000-of-00001.parquet": parquet(*[f"text number {n} of these" for n in range(30)]),
        "data/test-00000-of-00001.parquet": parquet("a test of these texts, " * 5),
    },
    "tiny/configs": {
        "README.md": SEVERAL,
        "en.jsonl": lines({"text": "one"}),
        "de.jsonl": lines({"text": "eins"}),
    },
    "tiny/chat": {"train.jsonl": lines(*[CHAT] * 20)},
    "tiny/shards": {
        f"data/train-{shard}.jsonl.gz": gzip.compress(
            lines(*[{"text": f"{shard}.{number} " + "of a text " * (number % 7)} for number in range(40)]),
            mtime=0,
        )
        for shard in range(7)
    },
    "tiny/script": {"README.md": b"", "script.py": b"import datasets\n"},
    "tiny/nothing": {"README.md": b"# nothing\n", "notes.xyz": b"?"},
    "tiny/broken": {"train.parquet": b"PAR1" + bytes(40) + b"PAR1"},
}


_FREE = Event()
_FREE.set()


class _Hub(BaseHTTPRequestHandler):
    server: DataHub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if not path.startswith(("/api/datasets/", "/datasets/")):
            return self.answer(404, b"")
        self.server.asked.append(path)
        _, org, name, *rest = path.removeprefix("/api").strip("/").split("/")
        repository = f"{org}/{name}"
        if repository == "tiny/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if self.server.status != 200:
            return self.answer(self.server.status, b"")
        if repository not in REPOSITORIES:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        what, revision, *inside = [*rest, "revision", "main"][:2] + rest[2:]
        if revision not in ("main", self.server.commit, OLDER):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit = self.server.commit if revision == "main" else revision
        files = REPOSITORIES[repository]
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
            )
        if what == "tree":
            return self.answer(200, json.dumps(entries(files, "/".join(inside))).encode())
        if what == "paths-info":
            wanted = json.loads(self.body())["paths"]
            found = [
                entry
                for name in wanted
                for entry in entries({name: files[name]} if name in files else {}, "")
            ]
            return self.answer(200, json.dumps(found).encode())
        name = "/".join(inside)
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if self.server.failing.get(name, 0) > 0:
            self.server.failing[name] -= 1
            return self.answer(500, b"")
        if self.command == "GET" and what == "resolve":
            self.server.served.append(name)
            self.server.stalled.get(name, _FREE).wait()
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    do_HEAD = do_POST = do_GET  # noqa: N815 - names of http.server

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Type", "").startswith("application/x-www-form"):
            from urllib.parse import parse_qs

            return json.dumps({"paths": parse_qs(content.decode())["paths"]}).encode()
        return content

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def entries(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """Files below a folder, and the folders, as the hub lists them."""
    inside = {name: content for name, content in files.items() if not folder or name.startswith(f"{folder}/")}
    folders = {name.rpartition("/")[0] for name in inside} - {"", folder}
    return [
        *({"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)),
        *(
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in inside.items()
        ),
    ]


class DataHub(ThreadingHTTPServer):
    """Used as a context; ``asked`` are the paths of requests, ``commit`` what main is, ``status`` what it answers.

    Of files, ``served`` are those that were sent, ``failing`` says how often one is answered with 500 before, and
    ``stalled`` what one waits for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.asked: list[str] = []
        self.commit = COMMIT
        self.status = 200
        self.served: list[str] = []
        self.failing: dict[str, int] = {}
        self.stalled: dict[str, Event] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> DataHub:
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

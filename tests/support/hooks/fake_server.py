"""A tracking server that does not do what it should, and one that does: W&B's, as far as metrics need it."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["hangs", "refuses", "answers 500"]


@contextmanager
def _listening(handler: type[BaseHTTPRequestHandler], over: threading.Event) -> Iterator[str]:
    """The address of a server; ``over`` is set before it is taken down."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            over.set()
            listening.shutdown()


@contextmanager
def server(fault: Fault) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths of the requests that came."""
    asked: list[str] = []
    if fault == "refuses":
        with socket.socket() as taken:  # bound, and nobody listens
            taken.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{taken.getsockname()[1]}", asked
        return
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            if fault == "hangs":
                over.wait()
                return
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with _listening(Handler, over) as address:
        yield address, asked


class Wandb:
    """Keeps the history that it is sent, by step. The answers are those that wandb-core 0.31 asks for.

    Attributes:
        inits: the variables of each request that made or changed a run.
        hangs: set, so that it answers nothing any more.
    """

    def __init__(self) -> None:
        self.history: dict[int, dict[str, Any]] = {}
        self.inits: list[dict[str, Any]] = []
        self.hangs = threading.Event()
        self.over = threading.Event()
        self._lines: list[str] = []

    def answer(self, path: str, body: bytes, address: str) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation) (\w+)", asked["query"])
            return {"data": self._graphql(named[1] if named else "", asked.get("variables") or {}, address)}
        if path.endswith("/file_stream"):
            sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            for line in sent["content"]:
                self._lines.append(line)
                record = json.loads(line)
                step = record.pop("_step")
                assert step not in self.history, f"step {step} was sent twice"
                self.history[step] = {key: value for key, value in record.items() if not key.startswith("_")}
        return {"exitcode": None, "limits": {}}

    def _graphql(self, name: str, variables: dict[str, Any], address: str) -> dict[str, Any]:
        project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
        if name == "UpsertBucket":
            self.inits.append(variables)
            bucket = {
                "id": "B",
                "name": variables.get("name"),
                "displayName": "d",
                "config": "{}",
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": len(self.inits) == 1}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{address}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket() if self._lines else None}}
        return {}

    def _bucket(self) -> dict[str, Any]:
        return {
            "name": self.inits[0]["name"], "historyLineCount": len(self._lines), "eventsLineCount": 0,
            "logLineCount": 0, "historyTail": json.dumps(self._lines[-1:]), "eventsTail": "[]",
            "summaryMetrics": self._lines[-1], "config": "{}", "tags": [], "wandbConfig": "{\"t\": 1}",
        }  # fmt: skip


@contextmanager
def wandb_server() -> Iterator[tuple[str, Wandb]]:
    """Its address, and what it has been sent."""
    kept = Wandb()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            if kept.hangs.is_set():
                kept.over.wait()
                return
            address = f"http://127.0.0.1:{self.server.server_address[1]}"
            answer = json.dumps(kept.answer(self.path, body, address)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    with _listening(Handler, kept.over) as address:
        yield address, kept

"""`make audit`: against a service of known vulnerabilities that runs here, one that fails, and none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.audit import BROKEN, FOUND, audit, pins

PINS = "# head\nsound==1.0\nleaky==2.0 ; python_full_version < '3.11'\nleaky==3.0 ; python_full_version >= '3.11'\n"
FAULT = {
    "id": "PYSEC-0000-1",
    "aliases": ["CVE-0000-1"],
    "affected": [
        {
            "package": {"name": "leaky", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.1"}]}],
        }
    ],
}


class Service(ThreadingHTTPServer):
    """Speaks OSV's protocol: which versions it was asked for, and which of them have the fault."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.vulnerable: list[str] = []
        self.fails_for: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/query"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pin = f"{query['package']['name']}=={query['version']}"
        self.server.asked.append(pin)
        answer = json.dumps({"vulns": [FAULT]} if pin in self.server.vulnerable else {}).encode()
        self.send_response(503 if pin in self.server.fails_for else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def options(url: str, cache: Path) -> list[str]:
    return ["--vulnerability-service", "osv", "--osv-url", url, "--cache-dir", str(cache)]


def test_each_version_of_the_constraints_is_in_a_list_once(repository: Path) -> None:
    assert list(pins(PINS)) == [["sound==1.0", "leaky==2.0"], ["leaky==3.0"]]
    constraints = (repository / "constraints.txt").read_text()
    lines = {line.split(" ;")[0] for line in constraints.splitlines() if not line.startswith("#")}
    assert sorted(pin for pinned in pins(constraints) for pin in pinned) == sorted(lines)


def test_nothing_is_known(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(PINS, options(service.url, tmp_path)) == 0
    assert sorted(service.asked) == ["leaky==2.0", "leaky==3.0", "sound==1.0"]
    assert capsys.readouterr().out == "audited 3 versions: none with known vulnerabilities\n"


def test_what_is_known_is_told_and_fails(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.vulnerable = ["leaky==3.0"]
    assert audit(PINS, options(service.url, tmp_path)) == FOUND
    assert capsys.readouterr().out.splitlines() == [
        "leaky 3.0: PYSEC-0000-1, CVE-0000-1; fixed in 3.1",
        "audited 3 versions: 1 with known vulnerabilities",
    ]
    ignored = [*options(service.url, tmp_path), "--ignore-vuln", "CVE-0000-1"]
    assert audit(PINS, ignored) == 0


def test_a_service_that_cannot_be_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/query"
        assert audit(PINS, options(url, tmp_path)) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("not audited: ") and "Connection" in line


def test_a_service_that_fails_midway_hides_nothing_of_what_was_found(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.vulnerable, service.fails_for = ["leaky==2.0"], ["leaky==3.0"]
    assert audit(PINS, options(service.url, tmp_path)) == FOUND
    out = capsys.readouterr().out
    assert out.startswith("not audited: ") and "leaky 2.0: PYSEC-0000-1" in out


def test_what_pip_audit_does_not_read_is_no_lack_of_data(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit("sound==not a version\n", options(service.url, tmp_path)) == BROKEN
    captured = capsys.readouterr()
    assert "not audited" not in captured.out and captured.err.strip()

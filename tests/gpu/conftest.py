"""Keeps what each test found in gpu-results.json, with the cards and versions: to be sent with a report."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu.machine import described, device_names, has_devices

RESULTS = "gpu-results.json"
"""In the folder that the tests are started in."""

_found: list[dict[str, Any]] = []


@pytest.fixture(autouse=True, scope="session")
def _gpus() -> tuple[str, ...]:
    return device_names()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One entry a test: its call, or the setup that it did not get beyond."""
    if "tests/gpu/" not in report.nodeid or not (report.when == "call" or report.outcome != "passed"):
        return
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[-1]).removeprefix("Skipped: ")
    elif report.failed:
        reason = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr).strip()
    _found.append(
        {
            "test": report.nodeid.removeprefix("tests/gpu/"),
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
            "reason": reason,
            **dict(report.user_properties),
        }
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _found or not has_devices():  # each test has said it
        return
    cards = list(device_names())
    record = {"date": str(datetime.date.today()), "cards": cards, **described(), "results": _found}
    path = Path(session.config.invocation_params.dir) / RESULTS
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _found and has_devices():
        terminalreporter.line(f"results: {RESULTS}; please send it with a report, also when all passed")

"""Caches go to a folder of this test run and not into the user's home; what was not tried is said loudly."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.materials import write_materials

OWN_CODE = Path(__file__).parent / "support" / "own_code"

# No test measures speed: on a busy machine an example may take any time.
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")


def pytest_configure() -> None:
    """Signals that whoever started the tests ignores (`nohup`, a script's background job) are not ignored here."""
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGQUIT,
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("DSTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        patch.setenv(name, "1")
    # A module that a test writes twice in a second is not taken for the first one.
    patch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@pytest.fixture(autouse=True)
def _no_code_of_another_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of a user's own that a test loads is out of reach for the next one."""
    places, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = places
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).is_relative_to(OWN_CODE) or Path(file).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model/`` (a Llama of 4 layers) and ``text.jsonl`` (40 documents of 200 bytes)."""
    folder = tmp_path_factory.mktemp("materials")
    write_materials(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data and measured shapes, shared by all tests that run the command line."""
    return tmp_path_factory.mktemp("shared-cache")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip is one letter among thousands; that nothing was tried between hosts, or in the image, deserves more."""
    for room in ("tests/cluster", "tests/image"):
        skipped = [
            report for report in terminalreporter.stats.get("skipped", []) if f"{room}/" in report.nodeid
        ]
        if skipped:
            title = f"{len(skipped)} tests of {room} did NOT run"
            terminalreporter.section(title, sep="!", red=True, bold=True)
            for reason in dict.fromkeys(str(report.longrepr[-1]) for report in skipped):
                terminalreporter.line(reason, red=True)

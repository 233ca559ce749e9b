"""Which signals end a command, in which phase, and what it ends with; those that the caller ignores end nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest
from torch import distributed

from dstrain.cli import main as command_line
from dstrain.stop_signals import AT_ONCE, STOPS, StoppedError, handled, raised
from dstrain.train.graceful_shutdown import SIGNALS, GracefulShutdown

# Of a command that trains nothing at the time: it plans, tokenizes, exports, ...
CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGUSR1: 75,
    signal.SIGUSR2: 75,
    signal.SIGQUIT: 131,
}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*STOPS, AT_ONCE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # a moment in which Python sees it


@pytest.mark.parametrize("number", [*STOPS, AT_ONCE])
def test_a_stop_undoes_what_is_half_done(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the second one that a closing terminal sends does not disturb that."""
    undone = []

    def work(*_: object, **__: object) -> None:
        try:
            send(number)
            raise AssertionError("it went on")
        finally:
            send(signal.SIGHUP)
            send(number)
            undone.append(True)

    monkeypatch.setattr(command_line.group, "main", work)
    monkeypatch.setattr(sys, "argv", ["dstrain", "export"])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        command_line.main()
    assert undone
    if number != signal.SIGINT:  # of which click, in the place of `work`, makes an exit code
        assert end.value.code == CODES[number]  # type: ignore[union-attr]
        assert capsys.readouterr().err == f"error: stopped by {number.name}\n"


@pytest.mark.parametrize("number", [*STOPS, AT_ONCE])
def test_what_the_caller_ignores_stays_ignored(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``nohup dstrain``, and SIGINT for the background jobs of a script."""
    signal.signal(number, signal.SIG_IGN)
    went_on = []

    def work(*_: object, **__: object) -> None:
        send(number)
        with handled(lambda *_: went_on.append("handled")):  # as the supervisor does
            send(number)
        went_on.append("to the end")

    monkeypatch.setattr(command_line.group, "main", work)
    monkeypatch.setattr(sys, "argv", ["dstrain", "run"])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code == 0 and went_on == ["to the end"]
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ignored", [False, True])
def test_a_rank_heeds_what_is_not_ignored(
    number: signal.Signals, ignored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in any case: with Slurm it is ignored only until the rank can save."""
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    if ignored:
        signal.signal(number, signal.SIG_IGN)
    leaving = GracefulShutdown(lambda: False, None)
    send(number)
    stays = ignored and number != signal.SIGTERM
    assert leaving.wanted() is not stays
    assert signal.getsignal(number) == (signal.SIG_IGN if stays else signal.SIG_DFL)


def test_signals_are_as_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(StoppedError) as stop, raised():
        send(signal.SIGTERM)
    assert stop.value.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in STOPS] == before

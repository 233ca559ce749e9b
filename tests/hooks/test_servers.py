"""The real libraries and a server that hangs, refuses or answers 500: nothing waits for it, and it is said once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dstrain.hooks import wandb_tracker
from dstrain.hooks.mlflow_tracker import MlflowTracker
from dstrain.hooks.wandb_tracker import WandbTracker
from tests.hooks.test_libraries import RESUMED, RUN_ID, expected, launch
from tests.support.hooks.fake_server import Fault, server, wandb_server
from tests.support.hooks.readers import from_wandb

FAULTS: list[Fault] = ["hangs", "refuses", "answers 500"]
KEY = "fake0key1" * 4 + "fake"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(wandb_tracker, "SECONDS_TO_BEGIN", 3.0)


@pytest.mark.parametrize("fault", FAULTS)
def test_wandb_is_kept_offline(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(fault) as (address, asked):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        [line] = launch(WandbTracker, tmp_path, 1, 5, completed=True)
    assert asked or fault == "refuses"
    assert "is offline" in line and f"wandb sync {tmp_path}" in line
    histories, _ = from_wandb(tmp_path / "wandb")
    assert expected(range(1, 6)) in histories
    assert not [child for child in psutil.Process().children() if child.name().startswith("wandb")]
    assert not holding_the_key(tmp_path)


def test_wandb_online_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as (address, sent):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert not launch(WandbTracker, tmp_path, 1, 6, completed=False)
        # From the checkpoint of step 4: steps 5 and 6 are there already, and are the same again.
        assert not launch(WandbTracker, tmp_path, 5, 8, completed=True, origins=RESUMED, steps=9)
    assert sent.history == expected(range(1, 9))
    assert {init["name"] for init in sent.inits if init.get("name")} == {RUN_ID}
    assert sent.inits[0]["project"] == "dstrain" and sent.inits[0]["displayName"] == "a run"
    assert not holding_the_key(tmp_path)


# In a process of its own: what is left behind there can't be used any more.
HANGS_LATER = """
import os, sys
from pathlib import Path
import psutil, wandb
from dstrain.hooks.wandb_tracker import WandbTracker
from tests.support.hooks.fake_server import wandb_server
from tests.hooks.test_libraries import launch

usual = wandb.Settings
wandb.Settings = lambda **own: usual(**own, x_file_stream_transmit_interval=0.2)
with wandb_server() as (os.environ["WANDB_BASE_URL"], sent):
    def it_works():
        if sent.history:
            sent.hangs.set()
        return sent.hangs.is_set()

    lines = launch(WandbTracker, Path(sys.argv[1]), 1, 6, completed=True, until=it_works, patience=3)
    left = [child.name() for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
print(lines, left, flush=True)
os._exit(0)  # as a rank does
"""


@pytest.mark.heavy  # it sends every 15 seconds
def test_wandb_that_hangs_later_is_left_behind(tmp_path: Path, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS_LATER, str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    lines, left = ast.literal_eval(done.stdout.strip().splitlines()[-1].replace("] [", "], ["))
    assert lines == ["tracker wandb is left behind: it did not end in time"] and not left
    histories, _ = from_wandb(tmp_path / "wandb")
    assert histories == [expected(range(1, 7))], "all of it is on the disk, for `wandb sync`"


@pytest.mark.parametrize("fault", FAULTS)
def test_mlflow_is_left_behind(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(fault) as (address, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        failed, left = launch(MlflowTracker, tmp_path, 1, 5, completed=True)
    assert asked or fault == "refuses"
    assert "MlflowException" in failed and "the run continues" in failed and KEY not in failed
    assert "6 steps are not written" in left
    assert not holding_the_key(tmp_path)


def holding_the_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]

"""The batch script of a job: what it asks for, and what it does with signals and exit codes, in a real bash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.launch.batch_script import Job, batch_script
from dstrain.runs.run_folder import RunFolder

# In place of dstrain: says which signal it got, and ends as it is told.
FAKE = """#!/bin/sh
trap 'echo USR1 > {folder}/got; exit {code}' USR1
trap 'echo TERM > {folder}/got; exit {code}' TERM
echo "$@" > {folder}/called
[ -z "{at_once}" ] || exit {code}
while :; do sleep 0.02; done
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Start the script of a job as Slurm does, with a dstrain that ends with ``code``."""

    def call(code: int, *, at_once: bool = False) -> subprocess.Popen[bytes]:
        (tmp_path / "bin").mkdir()
        python = tmp_path / "python"
        python.write_text(FAKE.format(folder=tmp_path, code=code, at_once="yes" if at_once else ""))
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
        job = Job(tmp_path / "runs" / "a b", 2, 4, python=str(python), directory=tmp_path)
        script = tmp_path / "launch.sbatch"
        script.write_text(batch_script(job))
        for file in (python, scontrol, script):
            file.chmod(0o755)
        path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [script], env={"PATH": path, "SLURM_JOB_ID": "12"}, cwd="/", stdout=subprocess.DEVNULL
        )

    return call


def read(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [
        (signal.SIGUSR1, 75, "requeue 12"),  # its time is over
        (signal.SIGTERM, 75, None),  # requeued: Slurm does it; or cancelled: nobody shall
        (signal.SIGUSR1, 1, None),  # it failed while it left
    ],
)
def test_a_signal_reaches_dstrain(
    start: Callable[..., subprocess.Popen[bytes]],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    requeued: str | None,
) -> None:
    script = start(code)
    deadline = time.monotonic() + 30
    while not read(tmp_path / "called") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read(tmp_path / "called") == f"-m dstrain.cli.main resume {tmp_path}/runs/a b"
    script.send_signal(number)  # to the shell alone, as --signal=B: does
    assert script.wait(30) == code
    assert read(tmp_path / "got") == number.name.removeprefix("SIG")
    assert read(tmp_path / "requeued") == requeued


@pytest.mark.parametrize(("code", "requeued"), [(0, None), (1, None), (75, "requeue 12"), (137, None)])
def test_its_exit_code_is_dstrains(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, code: int, requeued: str | None
) -> None:
    """75 without a signal: --time-limit is over."""
    assert start(code, at_once=True).wait(30) == code
    assert read(tmp_path / "requeued") == requeued


def test_what_it_asks_for(tmp_path: Path) -> None:
    job = Job(tmp_path / "100% mine", 4, 8, gpus=8, options=("--time=04:00:00", "--partition=gpu"))
    directives = [line for line in batch_script(job).splitlines() if line.startswith("#SBATCH ")]
    assert [line.removeprefix("#SBATCH ") for line in directives] == [
        *("--job-name=100--mine", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"),
        f'--output="{tmp_path}/100%% mine"/slurm-%j.log',
        *("--open-mode=append", "--requeue", "--signal=B:USR1@120", "--time=04:00:00", "--partition=gpu"),
    ]


@pytest.mark.parametrize("option", ["time=1", "", "--time=1\nrm -rf /"])
def test_what_is_no_option_is_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(DstrainError, match="not an sbatch option"):
        batch_script(Job(tmp_path, 1, 1, options=(option,)))


def test_a_path_that_sbatch_would_not_understand_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="can't handle the path"):
        batch_script(Job(tmp_path / 'a"b', 1, 1))


class Said:
    def __init__(self, place: Path, *arguments: str, path: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "dstrain.cli.main", "submit", *arguments],
            cwd=place,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


SUBMIT = ["--pipeline", "2", "--nodes", "2", "--tasks-per-node", "2", "--name", "mine"]


def test_without_slurm_nothing_is_written(tmp_path: Path) -> None:
    said = Said(tmp_path, *SUBMIT, path="/nowhere")
    assert said.code == 2 and "sbatch is not in PATH" in said.err
    assert not (tmp_path / "runs").exists()
    dry = Said(tmp_path, *SUBMIT, "--dry-run", path="/nowhere")
    assert dry.code == 0 and "#SBATCH --nodes=2" in dry.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "mine"], "the number of ranks per node is not set"),
        (["--gpus-per-node", "2", "--tasks-per-node", "2"], "the number of ranks per node is not set"),
        ([*SUBMIT, "--hostfile", "hosts"], "can't use a hostfile"),
        ([*SUBMIT, "--launcher", "pdsh"], "srun, not with the launcher pdsh"),
        ([*SUBMIT, "--data-parallel", "4"], "need 8 devices, but there are 4"),
        (
            ["--pipeline", "3", "--nodes", "2", "--tasks-per-node", "2"],
            "4 devices can't be divided evenly into 3 stages",
        ),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    said = Said(tmp_path, *arguments, path=os.environ["PATH"])
    assert said.code == 2 and message in said.err
    assert not (tmp_path / "runs").exists()


def test_what_sbatch_refuses_can_be_mended(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    sbatch.chmod(0o755)
    said = Said(tmp_path, *SUBMIT, path=f"{tmp_path}:/usr/bin:/bin")
    folder = RunFolder(tmp_path / "runs" / "mine")
    assert said.code == 2 and "error: invalid partition" in said.err
    assert f"sbatch {folder.batch_script}" in said.err and folder.config.exists()
    sbatch.write_text("#!/bin/sh\n[ \"$1\" = --parsable ] && echo '31;west'\n")
    said = Said(tmp_path, *SUBMIT, "--resume", path=f"{tmp_path}:/usr/bin:/bin")
    assert said.code == 0 and said.out.startswith("job 31 submitted: nodes 2, ranks per node 2\n")


def test_a_job_gets_nothing_of_the_job_that_it_is_submitted_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun refuses the memory per core of one beside the memory per node of the other."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/env; echo 31\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for job in ({}, {"SLURM_JOB_ID": "12", "SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_PER_TASK": "2"}):
        for name, value in job.items():
            monkeypatch.setenv(name, value)
        said = Said(tmp_path, *SUBMIT[:-1], f"job-{len(job)}", path=f"{tmp_path}:/usr/bin:/bin")
        assert said.code == 0, said.err
        names = [line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()]
        assert [name for name in names if name.startswith("SLURM_")] == ["SLURM_CONF"] and "PATH" in names


@pytest.mark.parametrize("trust", [False, True])
def test_trust_is_passed_on(trust: bool, tmp_path: Path) -> None:
    script = batch_script(Job(tmp_path / "a b", 1, 1, python="python", trust=trust))
    words = f"resume '{tmp_path}/a b'" + (" --trust" if trust else "")
    assert f"python -m dstrain.cli.main {words} &\n" in script

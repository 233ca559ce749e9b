"""A real Slurm on the hosts of a cluster: munged and slurmd on each, slurmctld on n1. For Slurm 22.05 and newer.

No systemd, no control groups, no database. Each host claims two processors and two GPUs (character devices that
hold nothing), so that CUDA_VISIBLE_DEVICES is set as on a real one. Times are short: a lost host is noticed in
ten seconds, and TERM comes five before KILL.

    with Slurm(cluster) as slurm:
        print(slurm.run(["sbatch", "--parsable", "job.sbatch"], cwd=place).out)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.cluster.commands import Command, Result
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import tool

# What must be there before the daemons of a host start. They run in the foreground, so that they are ours.
_PREPARE = """
mkdir -p -m 755 /run/munge "$1/spool"
for gpu in 0 1; do
    [ -e /run/gpu$gpu ] || mknod /run/gpu$gpu c 1 3 2>/dev/null ||
        { touch /run/gpu$gpu && mount --bind /dev/null /run/gpu$gpu; }
done
"""
_START_SECONDS = 30.0


class Slurm:
    """Slurm on all hosts of ``cluster``, from ``with`` on; the first host is the controller.

    Its daemons count as part of the hosts: :meth:`Cluster.stop_all` leaves them alone.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folder = cluster.shared / "slurm"

    def __enter__(self) -> Slurm:
        state = self.folder / "state"
        state.mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "slurm.conf").write_text(self._configuration())
        (self.folder / "gres.conf").write_text("Name=gpu File=/run/gpu[0-1]\n")
        # Slurm looks for a mounted tree of control groups to guess the version otherwise.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for host in self.cluster.names:
            self._start(host)
        self.wait_for_hosts()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The hosts go back to what they were before Slurm; its files stay in :attr:`folder`."""
        for host in self.cluster.names:
            if self.cluster.up(host):
                self.cluster.reset(host)

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """``base``, or what a login gives, with what leads Slurm's commands to this Slurm."""
        base = self.cluster.login_environment() if base is None else base
        return {**base, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        host: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
    ) -> Result:
        """Run a command (sbatch, squeue, scontrol, srun, ...) on ``host``, the controller by default."""
        host = host or self.cluster.names[0]
        return self.cluster.run(host, argv, env=self.environment(env), cwd=cwd, timeout=timeout)

    def state(self, job: str) -> str:
        """A job's state in Slurm's words (``PENDING``, ``RUNNING``, ``COMPLETED``, ``NODE_FAIL``, ...)."""
        return self.show(job)["JobState"]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it. Raises RuntimeError where Slurm knows no such job."""
        said = self.run(["scontrol", "show", "job", "--oneliner", job])
        if said.code:
            raise RuntimeError(said.err.strip())
        return dict(word.partition("=")[::2] for word in said.out.split())

    def wait_for(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of ``states``, and return it. Raises TimeoutError, with the logs."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {seconds} s\n{self.logs()}")
            time.sleep(0.1)
        return state

    def revive(self, host: str) -> None:
        """ModuleStub a crashed host on, its daemons with it, and wait until Slurm has it back."""
        self.cluster.revive(host)
        self._start(host)
        self.wait_for_hosts()

    def wait_for_hosts(self) -> None:
        """Wait until every host that is up can take jobs. Raises TimeoutError, with the logs."""
        wanted = sum(self.cluster.up(host) for host in self.cluster.names)
        deadline = time.monotonic() + _START_SECONDS
        while True:
            said = self.run(["sinfo", "--noheader", "--states=idle,mix,alloc", "--responding", "--format=%D"])
            if said.out.split() and sum(map(int, said.out.split())) >= wanted:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{wanted} hosts were due: {said}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 20) -> str:
        """The last lines of each daemon."""
        found = []
        for path in sorted(self.folder.glob("*.log")):
            found += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(found)

    def _start(self, host: str) -> None:
        prepared = self.cluster.run(host, ["sh", "-c", _PREPARE, "sh", self.cluster.local])
        if prepared.code:
            raise RuntimeError(f"{host}: {prepared}")
        # --force: in a user namespace the folder / belongs to nobody, which munged holds for unsafe.
        munge = [tool("munged"), "--foreground", "--force", f"--key-file={self.folder / 'munge.key'}"]
        munge += ["--socket=/run/munge/munge.socket.2", "--pid-file=/run/munge/pid"]
        munge += ["--log-file=/run/munge/log", "--seed-file=/run/munge/seed"]
        daemon = self.cluster.start(host, munge)
        self._until_it_answers(daemon, ["munge", "--no-input", "--socket=/run/munge/munge.socket.2"])
        env = self.environment()
        if host == self.cluster.names[0]:
            daemon = self.cluster.start(host, [tool("slurmctld"), "-D"], env=env)
            self._until_it_answers(daemon, ["scontrol", "ping"])
        daemon = self.cluster.start(host, [tool("slurmd"), "-D", "-N", host], env=env)
        self._until_it_answers(daemon, ["test", "-s", "/run/slurmd.pid"])
        self.cluster.adopt(host)

    def _until_it_answers(self, daemon: Command, command: list[str]) -> None:
        """Wait until ``command`` succeeds on the daemon's host."""
        deadline = time.monotonic() + _START_SECONDS
        while (said := self.run(command, host=daemon.host)).code:
            if not daemon.running() or time.monotonic() > deadline:
                words = f"{daemon.argv} on {daemon.host} does not answer"
                raise RuntimeError(f"{words}: {said}{daemon.err[-3000:]}\n{self.logs()}")
            time.sleep(0.02)

    def _configuration(self) -> str:
        first, *_ = names = self.cluster.names
        return f"""\
ClusterName=lab
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
# A job that is requeued waits as long as credentials live, two minutes by default.
AuthInfo=cred_expire=5,socket=/run/munge/munge.socket.2
StateSaveLocation={self.folder / "state"}
SlurmdSpoolDir={self.cluster.local / "spool"}
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={self.folder / "slurmctld.log"}
SlurmdLogFile={self.folder / "slurmd-%n.log"}
# Nothing that wants control groups or a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# What a host claims is believed, whatever this machine has.
SlurmdParameters=config_overrides
# A host that comes back is used again.
ReturnToService=2
# In seconds.
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
InactiveLimit=0
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=n[1-{len(names)}] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
# A job of `urgent` takes the hosts of one of `lab`, which is told with TERM and goes back into the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""

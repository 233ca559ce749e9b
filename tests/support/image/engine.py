"""A container engine: this machine's own Docker where one runs, else one that lives as long as the tests.

The latter is Debian's dockerd, unpacked and not installed: its own socket, folder and networks, no rules for the
machine's firewall. It needs root, and ``NEEDED``.

Its programs, its base and the steps of its builds are kept from one run of the tests to the next: `tests.support.kept`.
Docker knows by itself whether a step must be taken anew, by the step, by the content of what is copied, and by the
image below. What it can't know stands in the folder's key: where packages come from here, and the week, since no file
says which versions Debian has today.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.image.base import debian_python, make_base, package_sources, pip_sources, torch_lock
from tests.support.kept import kept_folder, key_of

# A tool or library, and the Debian package that it comes from.
NEEDED = {
    "mmdebstrap": "mmdebstrap",
    "runc": "runc",
    "iptables": "iptables",
    "dpkg": "dpkg",
    "apt-get": "apt",
}
_LIBRARIES = {"libdevmapper.so.1.02.1": "libdevmapper1.02.1"}
_UNPACKED = ("docker.io", "containerd", "tini")
# What a build stands on where a registry can be reached.
_BASE, _BASE_PYTHON = "debian:bookworm-slim", "3.11"
_OWN_BASE = "localhost/base:own"
_START_SECONDS = 60
OWN_LOCK = "requirements/own-torch.txt"
REVISION = "0123456789abcdef0123456789abcdef01234567"
"""Of the source, as the tests tell it to a build."""
BUILD_ARGUMENTS = ("--build-arg", f"REVISION={REVISION}", "--build-arg", f"TORCH_LOCK={OWN_LOCK}")
SBOM = "/usr/share/dstrain/sbom.cdx.json"
_KEPT_STEPS = "12GB"
"""Of a build's steps, the oldest go: an image has 2 GB of packages for CPUs, 6 for GPUs."""


class NoEngineError(Exception):
    """Why there is none here, and what would help."""


@dataclass
class Engine:
    """Docker's command line.

    Attributes:
        environment: of every command: PATH, and where the daemon listens.
        base: the image that builds start from.
        python: the version that the base has or gets.
    """

    environment: dict[str, str]
    base: str
    python: str
    folder: Path
    _started: list[str] = field(default_factory=list)
    _built: list[str] = field(default_factory=list)

    def run(self, *words: str, timeout: float = 900) -> str:
        """``docker WORDS``: what it prints. Raises AssertionError, with all that it said, where it fails."""
        done = self.tried(*words, timeout=timeout)
        said = f"{done.stdout[-6000:]}{done.stderr[-6000:]}"
        assert done.returncode == 0, f"docker {' '.join(words)}: exit code {done.returncode}\n{said}"
        return done.stdout

    def tried(self, *words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """``docker WORDS``, whatever comes of it."""
        return self.call(["docker", *words], timeout=timeout)

    def call(
        self, argv: Sequence[str], *, timeout: float = 900, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command that may use the engine; ``more`` goes into its environment."""
        return subprocess.run(
            argv,
            env={**self.environment, **more},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *words: str) -> str:
        """``docker run --detach WORDS``: its name, for as long as the tests last."""
        name = self.run("run", "--detach", *words).strip()
        self._started.append(name)
        return name

    def build(self, context: Path, tag: str, *words: str, base: str | None = None) -> None:
        """``docker build WORDS``, with the packages that pip finds on this machine; ``base`` by default our own."""
        with pip_sources(self.folder) as pip_conf:
            said = self.tried(
                *("build", "--network", "host", "--progress", "plain", "--tag", tag),
                *("--build-arg", f"BASE_IMAGE={base or self.base}", "--secret", f"id=pip,src={pip_conf}"),
                *(*words, str(context)),
                timeout=3600,
            )
        assert said.returncode == 0, f"docker build: exit code {said.returncode}\n{said.stderr[-6000:]}"
        self._built.append(tag)

    def context(self, repository: Path) -> Path:
        """A copy of what the image is built from, with a lock of this machine's torch in ``OWN_LOCK``."""
        context = self.folder / "context"
        if not context.exists():
            wanted = (repository / ".dockerignore").read_text()
            for name in [*re.findall(r"^!(.+)$", wanted, re.MULTILINE), ".dockerignore", "Dockerfile"]:
                source, copy = repository / name, context / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
            (context / OWN_LOCK).write_text(torch_lock(self.python))
        return context

    def packages(self, image: str) -> list[str]:
        """All that an image of ours holds of Python's and of Debian's, with its version, in order."""
        look = "/opt/dstrain/bin/pip freeze --all && dpkg-query --show && python --version"
        words = ("--rm", "--network", "none", "--entrypoint", "sh", image, "-c", look)
        return sorted(self.run("run", *words).splitlines())

    def forget_images(self) -> None:
        """What these tests have built."""
        if self._built:
            self.tried("image", "rm", "--force", *self._built)

    def end_all(self) -> None:
        """What these tests have started."""
        if self._started:
            self.tried("rm", "--force", *self._started)
        self._started.clear()


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """The machine's own, or one of our own in this folder. Raises NoEngineError."""
    own = {**os.environ, "DOCKER_BUILDKIT": "1"}
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "info"], env=own, capture_output=True, timeout=30)
        if asked.returncode == 0:
            found = Engine(own, _BASE, _BASE_PYTHON, folder)
            try:
                yield found
            finally:
                found.end_all()
                found.forget_images()
            return
    _refuse_what_lacks()
    with kept_folder("engine", _key(), folder / "engine") as (place, kept), _daemon(place) as environment:
        made = Engine(environment, _OWN_BASE, debian_python(), folder)
        # Of tests that were killed.
        if left := made.run("ps", "--all", "--quiet").split():
            made.run("rm", "--force", *left)
        made.run("network", "prune", "--force")
        if made.tried("image", "inspect", _OWN_BASE).returncode:
            _import_base(made, place)
        try:
            yield made
        finally:
            made.end_all()
            if kept:
                made.forget_images()
                made.tried("builder", "prune", "--force", "--keep-storage", _KEPT_STEPS)


def _key() -> str:
    ours = (path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return key_of(*ours, *package_sources(), time.strftime("%G-%V"))


@contextmanager
def _daemon(place: Path) -> Iterator[dict[str, str]]:
    """Unpacks and starts dockerd, and ends it; yields the environment of its clients."""
    programs = _unpack(place)
    path = os.pathsep.join([*map(str, programs), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    environment = {
        **os.environ,
        "PATH": path,
        "DOCKER_BUILDKIT": "1",
        "DOCKER_HOST": f"unix://{place}/socket",
    }
    # A socket's path has at most 107 characters, and containerd appends to the longest: not below a long home folder.
    sockets = tempfile.mkdtemp(prefix="dockerd-", dir="/tmp")
    # The machine's own file may hold what contradicts ours.
    (place / "daemon.json").write_text("{}")
    (place / "pid").unlink(missing_ok=True)  # of one that was killed: its number may be another's by now
    command = [
        *("setpriv", "--pdeathsig", "TERM"),  # it ends with the tests, however they end
        *("dockerd", "--config-file", str(place / "daemon.json"), "--host", environment["DOCKER_HOST"]),
        *("--data-root", str(place / "data"), "--exec-root", sockets),
        *("--pidfile", str(place / "pid"), "--bridge", "none"),
        *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
    ]
    with (place / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(daemon, environment, place / "dockerd.log")
        yield environment
    finally:
        daemon.terminate()
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        # dockerd leaves the network namespace of `--network host` mounted.
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith((f"{place}/", f"{sockets}/")):
                subprocess.run(["umount", line.split()[1]], check=False)
        shutil.rmtree(sockets, ignore_errors=True)


def _wait_for(daemon: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        answered = subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode == 0
        # Another one may answer in its place.
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise NoEngineError(f"dockerd does not start here: {log.read_text()[-600:]}")
        if answered:
            return
        time.sleep(0.2)


def _refuse_what_lacks() -> None:
    if os.getuid() != 0:
        raise NoEngineError("no Docker daemon answers, and only root can start one: start Docker, or be root")
    where = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [package for name, package in NEEDED.items() if shutil.which(name, path=where) is None]
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    missing += [package for name, package in _LIBRARIES.items() if name not in known]
    if missing:
        packages = " ".join(sorted(missing))
        raise NoEngineError(
            f"no Docker daemon answers, and {packages} are missing to start one "
            f"(Debian: apt-get install --no-install-recommends {packages})"
        )


def _unpack(place: Path) -> list[Path]:
    """Debian's engine, without its services. Returns the folders of its programs."""
    root = place / "programs"
    if not (root / "usr/sbin/dockerd").exists():
        (place / "packages").mkdir(exist_ok=True)
        fetched = subprocess.run(
            ["apt-get", "-qq", "download", *_UNPACKED], cwd=place / "packages", capture_output=True, text=True
        )
        if fetched.returncode:
            raise NoEngineError(f"Debian's {' '.join(_UNPACKED)} can't be fetched: {fetched.stderr[-300:]}")
        for package in (place / "packages").glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)
    return [root / "usr/bin", root / "usr/sbin"]


def _import_base(engine: Engine, place: Path) -> None:
    tar = place / "base.tar"
    if not tar.exists():
        make_base(tar)
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    engine.run("import", "--change", 'CMD ["/bin/bash"]', "--change", f"ENV {path}", str(tar), _OWN_BASE)

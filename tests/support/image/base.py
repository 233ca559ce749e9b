"""What an image is built on where no registry can be reached: a Debian like this machine's, and pip's own sources."""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tools.lock import resolve_own_torch

# In order, each with the ones before it: what pip looks through for packages.
_SOURCES = ("index-url", "extra-index-url", "find-links", "trusted-host")
_CERTIFICATES = Path("/usr/local/share/ca-certificates")
_RELEASE = Path("/etc/os-release")
_APT = Path("/etc/apt")


def make_base(tar: Path) -> None:
    """A minimal Debian from this machine's package sources, as a tar, in about 20 s.

    It holds the certificates that this machine trusts beside the usual ones, since what is fetched during a build may
    come through the same proxy as here.

    Raises:
        RuntimeError: mmdebstrap failed.
    """
    released = dict(line.split("=", 1) for line in _RELEASE.read_text().splitlines() if "=" in line)
    sources = _debian_sources()
    hooks = [f"--customize-hook=upload {file} {file}" for file in _certificates()]
    hooks.append('--customize-hook=chroot "$1" update-ca-certificates >/dev/null 2>&1')
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", *hooks]
    made = tar.with_suffix(".part.tar")
    done = subprocess.run(
        [*command, released["VERSION_CODENAME"].strip('"'), str(made), *map(str, sources)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tar.parent), "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode:
        raise RuntimeError(f"mmdebstrap: {done.stderr[-2000:]}")
    made.rename(tar)


def torch_lock(python: str) -> str:
    """A lock of the torch that pip finds on this machine, whose build need not be PyPI's, for a Python (``3.11``)."""
    found = _configured()
    names = {"index-url": "--default-index", "extra-index-url": "--index", "find-links": "--find-links"}
    options = [
        word for key, name in names.items() for one in found.get(key, "").split() for word in (name, one)
    ]
    return resolve_own_torch([*options, "--python-version", python])


def debian_python() -> str:
    """The version of Python that this machine's Debian has, such as ``3.11``, whether it is installed or not."""
    said = subprocess.run(["apt-cache", "show", "python3"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^Version: (\d+\.\d+)", said, re.MULTILINE)[0]


def package_sources() -> list[str | bytes]:
    """All that says, on this machine, where packages of Debian and of Python come from."""
    files = [_RELEASE, *_debian_sources(), *_certificates()]
    return [platform.machine(), *(path.read_bytes() for path in files), repr(sorted(_configured().items()))]


def _debian_sources() -> list[Path]:
    return [*_APT.glob("sources.list"), *sorted(_APT.glob("sources.list.d/*.*"))]


def _certificates() -> list[Path]:
    return sorted(_CERTIFICATES.glob("*.crt"))


@contextmanager
def pip_sources(folder: Path) -> Iterator[Path]:
    """A pip.conf with this machine's own sources of packages, for a build that shares this machine's network.

    Folders among them are served to it, on the loopback device and while this context lasts.
    """
    found = _configured()
    folders: list[Path] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folders))
    port = server.server_address[1]

    def reachable(source: str) -> str:
        url = urlsplit(source)
        if url.scheme not in ("", "file"):
            return source
        path = Path(unquote(url.path)).resolve()
        # The pages of an index name its files beside them.
        folders.append(path.parent if path.name == "simple" else path)
        return f"http://127.0.0.1:{port}{path}/"

    lines = ["[global]", "disable-pip-version-check = true"]
    if "cert" in found:
        lines.append("cert = /etc/ssl/certs/ca-certificates.crt")
    for name in _SOURCES:
        if name in found:
            lines.append(f"{name} = {' '.join(map(reachable, found[name].split()))}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield folder / "pip.conf"
    finally:
        server.shutdown()
        server.server_close()


def _configured() -> dict[str, str]:
    """What pip is told here by its files and by its environment, which comes last."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = sorted(line.split("=", 1) for line in said.splitlines() if "=" in line)
    in_files = {key.split(".")[-1]: value for key, value in pairs if not key.startswith(":env:")}
    in_environment = {key.split(".")[-1]: value for key, value in pairs if key.startswith(":env:")}
    return {key: str(ast.literal_eval(value)) for key, value in (in_files | in_environment).items()}


class _Handler(SimpleHTTPRequestHandler):
    """Serves files under their own paths, and none but those of the given folders."""

    def __init__(self, folders: list[Path], *arguments: object) -> None:
        self._folders = folders
        super().__init__(*arguments, directory="/")  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        wanted = Path(super().translate_path(path)).resolve()
        if any(wanted.is_relative_to(folder) for folder in self._folders):
            return str(wanted) + ("/" if path.endswith("/") else "")
        return "/nowhere"

    def log_message(self, *_: object) -> None:
        """Nothing: a build asks for hundreds of files."""

"""Builds and loads the guard that lets a torch without CUDA hold fake tensors on CUDA devices.

A torch that was built for GPUs brings its own, and nothing is built. What is built is kept in the cache, for a version
of torch and of the source. This module imports no torch: the guard must be loaded before it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from dstrain.config.files import cache_folder
from dstrain.errors import DstrainError
from dstrain.shared_caches import is_own, make_folder

_SOURCE = Path(__file__).with_name("device_guard.cpp")
_GPU_LIBRARIES = ("libtorch_cuda.so", "libtorch_hip.so")
_INSTALL = "install one (Debian: apt-get install g++), or name it: CXX=PROGRAM"


def load_device_guard() -> None:
    """Load the guard into this process, and build it where that was not done before.

    Raises:
        DstrainError: no compiler is there, or it can't build the guard; the message says what is missing.
    """
    torch = _torch_folder()
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: the guard comes too late")
    if any((torch / "lib" / name).exists() for name in _GPU_LIBRARIES):
        return
    ctypes.CDLL(str(_built(torch)), ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _built(torch: Path) -> Path:
    """The guard as a shared library in the cache. Raises DstrainError."""
    version = importlib.metadata.version("torch")
    # The folder stands in the library, as the place of torch's own.
    key = hashlib.sha256(f"{version} {torch} ".encode() + _SOURCE.read_bytes()).hexdigest()[:24]
    library = cache_folder() / "rehearsal" / f"device-guard-{key}.so"
    if is_own(library):
        return library
    try:
        make_folder(library.parent)
        aside = library.with_name(f"{library.name}.{os.urandom(8).hex()}.part")
        try:
            _compile(torch, version, aside)
            aside.chmod(0o600)
            aside.replace(library)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DstrainError(
            f"cannot write the fake device's library: {error.strerror}",
            where=str(library),
            hint="name a cache folder on a writable disk: DSTRAIN_CACHE=FOLDER",
        ) from None
    return library


def _compile(torch: Path, version: str, library: Path) -> None:
    compiler = _compiler()
    include, lib = torch / "include", torch / "lib"
    missing = [
        str(path) for path in (include / "ATen" / "ATen.h", lib / "libtorch_cpu.so") if not path.exists()
    ]
    if missing:
        raise DstrainError(
            f"this torch has no headers and libraries to compile against: {', '.join(missing)} is missing",
            where=str(torch),
            hint="install torch from its wheels (pip install torch)",
        )
    done = subprocess.run(
        [
            *(compiler, "-O0", "-std=c++20", "-w", "-shared", "-fPIC"),
            *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
            *(str(_SOURCE), "-o", str(library)),
            *(f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise DstrainError(
            f"{compiler} could not build the fake device against torch {version}: {said or done.stderr.strip()}",
            where=str(_SOURCE),
            hint="a compiler that knows C++20 (g++ 11 or newer), or a torch that was built with CUDA, which needs none",
        )


def _compiler() -> str:
    """The C++ compiler: ``CXX``, else what is there. Raises DstrainError."""
    named = os.environ.get("CXX")
    if named:
        found = shutil.which(named)
        if found is None:
            raise DstrainError(f"there is no program {named!r}", where="CXX", hint=_INSTALL)
        return found
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise DstrainError(
        "this torch was built without CUDA, and to rehearse with it a C++ compiler is needed: none is installed",
        hint=f"{_INSTALL}; or a torch that was built with CUDA, which needs none",
    )

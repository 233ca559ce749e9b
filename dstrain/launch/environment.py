"""The environment of the ranks, and the file that carries it to other hosts."""

from __future__ import annotations

import getpass
import os
import re
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dstrain.config.files import cache_folder
from dstrain.config.passed_variables import matching, passed
from dstrain.errors import DstrainError
from dstrain.planning.layout import HOSTS
from dstrain.runs.run_folder import DIRECTORY
from dstrain.runs.this_machine import loopback_card
from dstrain.shared_caches import is_own, own_place

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# DeepSpeed puts a value between double quotes into a remote shell's line, and pdsh replaces %h, %u and %n.
_UNSAFE_REMOTELY = '"$`\\%!'
# The user's own, where set: ssh keeps nothing. Patterns as of file names; `pass_env` adds to them. They set how the
# network is used (NCCL, UCX, libfabric, Elastic Fabric Adapters), how long is waited and how memory is allocated, where
# libraries are found, and with what DeepSpeed compiles its operators.
_CARRIED = (
    *("DSTRAIN_CACHE", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "GLOO_SOCKET_IFNAME"),
    *("NCCL_*", "UCX_*", "FI_*", "OFI_NCCL_*", "RDMAV_FORK_SAFE"),
    *("DEEPSPEED_TIMEOUT", "TORCH_NCCL_*", "PYTORCH_*ALLOC_CONF"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"),
)
# What another launcher has left in the user's shell: a rank would take it for its own number or meeting place.
_OTHER_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
_OTHER_LAUNCHERS_BEGINNINGS = ("TORCHELASTIC_",)
_LIBRARIES = "LD_LIBRARY_PATH"
# What DeepSpeed hands to other hosts by itself, in the command line of pdsh, where everybody can read it
# (MLFLOW_TRACKING_TOKEN), and with signs that a remote shell obeys.
_CARRIED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
# cuBLAS works in one order of additions with this workspace (its guide, section 2.1.4); flash attention's backward
# pass is told by transformers; NVLink's switches add in the order in which the numbers come.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC = {
    _WORKSPACE: ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_NVLS_ENABLE": "0",
}
# How torch allocates: the variable's name, and the older one, which torch reads where the new one is not set.
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
SAFE_PATH = sys.version_info >= (3, 11)
"""Whether Python knows PYTHONSAFEPATH. Without it ``python -m``, which every launcher uses, looks for modules in the
current folder first, and a random.py there is imported in place of Python's: the ranks are started in / then."""
START_FOLDER = "/"
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def default_environment(
    accelerator: str,
    processes_per_host: int,
    single_host: bool,
    *,
    hosts: Sequence[str] = (),
    deterministic: bool = False,
    carried: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    python: str = sys.executable,
) -> dict[str, str]:
    """The variables that every rank needs beside the user's own; what the user has set already is kept.

    Args:
        accelerator: ``cuda`` or ``cpu``.
        processes_per_host: ranks that share a host's cores.
        single_host: True when all ranks run on this machine.
        hosts: the names of all, where there are others.
        deterministic: what is read before a rank could choose it, for the same bits each time.
        carried: patterns of the names of more variables of the user's that the ranks need. They are written to files:
            what is named like a secret is left out.
    """
    # Named on GPUs as well, so that launch.sh does the same in a shell with another DS_ACCELERATOR.
    environment = {"DS_ACCELERATOR": accelerator, "PATH": _path(environ, python)}
    if SAFE_PATH:
        environment["PYTHONSAFEPATH"] = environ.get("PYTHONSAFEPATH") or "1"
    else:
        environment[DIRECTORY] = os.getcwd()
    # PyTorch takes all cores for each process: 4 ranks on 8 cores would fight with 32 threads. torchrun would set 1: on
    # GPUs too the CPU computes, in the optimizer of offloaded states.
    threads = max(1, _cores() // max(1, processes_per_host))
    environment["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS") or str(threads)
    if accelerator == "cuda":
        # So that GPU 2 is the same one here, in nvidia-smi and in the plan: CUDA's default order is by speed.
        environment["CUDA_DEVICE_ORDER"] = environ.get("CUDA_DEVICE_ORDER") or "PCI_BUS_ID"
        # Blocks that grow: memory that is free, but in pieces too small for the next tensor, is none that is lacking.
        if not environ.get(_ALLOCATOR) and not environ.get(_OLD_ALLOCATOR):
            environment[_ALLOCATOR] = "expandable_segments:True"
    if deterministic and accelerator == "cuda":
        environment |= _DETERMINISTIC
        # There are two workspaces that do so.
        environment[_WORKSPACE] = environ.get(_WORKSPACE) or _DETERMINISTIC[_WORKSPACE]
    if single_host:
        # Gloo listens on the address of the own host name; Debian's 127.0.1.1 makes it hang.
        # Which interface joins several hosts, each rank finds out (train.rank_environment).
        loopback = loopback_card()
        if loopback is not None:
            environment["GLOO_SOCKET_IFNAME"] = loopback
    else:
        # A pulled cable is noticed after 15 s instead of never.
        environment["PDSH_SSH_ARGS_APPEND"] = (
            environ.get("PDSH_SSH_ARGS_APPEND") or "-oServerAliveInterval=5 -oServerAliveCountMax=3"
        )
        if hosts:
            environment[HOSTS] = ",".join(hosts)
    environment |= _carried(environ, carried)
    environment |= _code_caches(environ)
    paths = [os.path.abspath(path) for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not _is_installed(environ):
        paths = [_PACKAGE_ROOT, *paths]
    if paths and (not single_host or not SAFE_PATH or _PACKAGE_ROOT in paths):
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


def _carried(environ: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """The user's own variables that the ranks get: those of `_CARRIED`, and of ``more`` patterns."""
    found = passed(environ, more) | matching(environ, _CARRIED)
    # One that is relative, or empty, would be another folder where a rank starts.
    folders = [os.path.abspath(each) for each in found.pop(_LIBRARIES, "").split(os.pathsep) if each]
    return found | ({_LIBRARIES: os.pathsep.join(dict.fromkeys(folders))} if folders else {})


def start_folder(directory: Path) -> str:
    """Where the ranks' launcher is started, for ranks that shall work in ``directory``."""
    return str(directory.absolute()) if SAFE_PATH else START_FOLDER


def forgetting(*, remote: bool) -> str:
    """A line of bash that unsets what must not reach the ranks; in front of the exports of what must."""
    beginnings = _OTHER_LAUNCHERS_BEGINNINGS + (_CARRIED_BY_DEEPSPEED if remote else ())
    return " ".join(["unset", *_OTHER_LAUNCHERS, *(f"${{!{beginning}@}}" for beginning in beginnings)])


def check_environment(environment: Mapping[str, str], *, remote: bool) -> None:
    """Refuse what the way to the ranks would change or lose.

    Raises:
        DstrainError: a bad name, a value with a line end, or (``remote``) with signs that ssh alters.
    """
    for name, value in environment.items():
        if not _NAME.fullmatch(name):
            raise DstrainError(
                f"{name!r} is not a valid name of an environment variable",
                hint="use letters, digits and _",
                where="environment",
            )
        if any(sign in value for sign in "\n\r\0"):
            raise DstrainError(
                f"the value of {name} contains a newline, which an environment file can't hold",
                hint="write it into a file on every host and pass the file's path",
                where=f"environment: {name}",
            )
        altered = sorted(set(value) & set(_UNSAFE_REMOTELY))
        if remote and (altered or value != value.strip()):
            what = " ".join(altered) or "spaces at its ends"
            raise DstrainError(
                f"the value of {name} contains {what}, which DeepSpeed's launch over ssh does not preserve",
                hint="write it into a file on every host and pass the file's path",
                where=f"environment: {name}",
            )


def environment_text(environment: Mapping[str, str]) -> str:
    """``NAME=value`` lines, nothing else: DeepSpeed's parser dies of a blank line, and a comment with a ``=``
    comments out the whole remote command."""
    return "".join(f"{name}={value}\n" for name, value in sorted(environment.items()))


def _path(environ: Mapping[str, str], python: str) -> str:
    """PATH with python's own folder: DeepSpeed looks up ninja there when it compiles its CPU operators."""
    own = os.path.dirname(os.path.abspath(python))
    paths = environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([own, *(path for path in paths if path != own)])


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def _code_caches(environ: Mapping[str, str]) -> dict[str, str]:
    """Folders of this user's in place of those into which others could put compiled code for the ranks to load.

    Sources: torch.utils.cpp_extension and torch._inductor.runtime.cache_dir_utils.
    """
    base = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    usual = {
        "TORCH_EXTENSIONS_DIR": base / "torch_extensions",
        "TORCHINDUCTOR_CACHE_DIR": Path(tempfile.gettempdir(), f"torchinductor_{user}"),
    }
    found = {}
    for name, place in usual.items():
        chosen = Path(environ[name]) if environ.get(name) else place
        there = next(path for path in (chosen, *chosen.absolute().parents) if os.path.lexists(path))
        sticky = there != chosen and there.stat().st_mode & stat.S_ISVTX and name not in environ
        if not is_own(Path(os.path.realpath(there))) and not sticky:
            found[name] = str(own_place(chosen) or cache_folder() / chosen.name)
    return {name: path for name, path in found.items() if path != environ.get(name)}


def _is_installed(environ: Mapping[str, str]) -> bool:
    """Whether python finds this dstrain by itself: not through PYTHONPATH, nor from the current folder.

    In doubt the answer is no: naming the path once more does no harm.
    """
    borrowed = {os.path.realpath(path) for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    borrowed.add(os.path.realpath(os.getcwd()))
    own = {os.path.realpath(path) for path in sys.path[1:] if path}
    return _PACKAGE_ROOT in own - borrowed

"""What a run is made with: software versions, environment variables, container image, pretrained weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from dstrain.runs.record.secrets import looks_secret
from dstrain.version import __file__ as VERSION_FILE
from dstrain.version import __version__


def packages() -> dict[str, str]:
    """The version of every installed package, by its normalised name (PEP 503), sorted."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # what an interrupted installation leaves behind has none
            # The first one of a name is the one that is imported.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return dict(sorted(found.items()))


def python_version() -> str:
    """Such as ``CPython 3.11.2``."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def own_version() -> str:
    """The number, and a hash of the source: a checkout that was not updated has the same number."""
    root = Path(VERSION_FILE).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"


IMAGE = "DSTRAIN_IMAGE"
"""The environment variable in which ``launch/docker.sh`` tells a container which image it was made from."""

# Threads decide in which order a CPU adds; the others choose kernels, algorithms, precisions, or other code altogether.
_VARIABLES = (
    *("PYTHONHASHSEED", "DS_ACCELERATOR", "LD_PRELOAD", "FLASH_ATTENTION_DETERMINISTIC"),
    "DISABLE_ADDMM_CUDA_LT",
)
_PREFIXES = (
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "NCCL_", "UCX_"),
)
# Where something lies, what is told, and which card happens to be free, is not what is computed.
_OTHER_VARIABLES = (
    *(
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_VERSION",
        "CUDA_CACHE_PATH",
    ),
    *("TORCH_EXTENSIONS_DIR", "TORCH_HOME", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    *("NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_VERSION"),
)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of ``environment`` that can change a run's numbers, sorted; none that looks like a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if value
        and name not in _OTHER_VARIABLES
        and (name in _VARIABLES or name.startswith(_PREFIXES))
        and not looks_secret(f"{name}={value}".encode(errors="replace"))
    }


def image(environ: Mapping[str, str] = os.environ) -> str | None:
    """The digest of the image that this container was made from; None outside, or where nobody told it."""
    return environ.get(IMAGE) or None


_WEIGHT_FILES = ("*.safetensors", "*.bin")
_BLOCK = 2**16  # bytes that are read
_STRIDE = 2**20  # of so many; all of a file that has no more than _WHOLE
_WHOLE = 2**26


def weights_fingerprint(folder: Path) -> str:
    """A hash of the weight files' names, sizes and bytes.

    Of large files one block of 64 KiB in each MiB counts, and the last: training changes every tensor, so that other
    weights differ there, but a change by hand in between is not seen.

    Raises:
        OSError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        starts = (
            [*range(0, size, _STRIDE), max(0, size - _BLOCK)] if size > _WHOLE else range(0, size, _BLOCK)
        )
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]

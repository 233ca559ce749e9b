"""The surroundings of a run that can change its numbers: environment variables and container image."""

from __future__ import annotations

import os
from collections.abc import Mapping

IMAGE = "DSTRAIN_IMAGE"
"""The environment variable in which ``launch/docker.sh`` tells a container which image it was made from."""

# Threads decide in which order a CPU adds; the others choose kernels, algorithms, precisions, or other code altogether.
_NAMES = (
    *("PYTHONHASHSEED", "DS_ACCELERATOR", "LD_PRELOAD", "FLASH_ATTENTION_DETERMINISTIC"),
    "DISABLE_ADDMM_CUDA_LT",
)
_BEGINNINGS = (
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32", "NCCL_", "UCX_"),
)
# Where something lies, what is told, and which card happens to be free, is not what is computed.
_NOT = (
    *(
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_HOME",
        "CUDA_PATH",
        "CUDA_VERSION",
        "CUDA_CACHE_PATH",
    ),
    *("TORCH_EXTENSIONS_DIR", "TORCH_HOME", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_VERSION"),
)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of ``environment`` that can change a run's numbers, sorted."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if value and name not in _NOT and (name in _NAMES or name.startswith(_BEGINNINGS))
    }


def image(environ: Mapping[str, str] = os.environ) -> str | None:
    """The digest of the image that this container was made from; None outside, or where nobody told it."""
    return environ.get(IMAGE) or None

"""The device of a rank: which one it takes, its peak memory, and ``deterministic: true``, the same bits each time."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping

import torch
from deepspeed.accelerator import get_accelerator

from dstrain.errors import DstrainError


def take_device() -> None:
    """Make the GPU of this rank its current one, and LOCAL_RANK the number of it: DeepSpeed reads that there.

    Raises:
        DstrainError: this rank has no GPU.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cuda":
        os.environ["LOCAL_RANK"] = str(device_number(os.environ, accelerator.device_count()))
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))


def device_number(environ: Mapping[str, str], visible: int) -> int:
    """The number of a rank's GPU among the ``visible`` ones: its local rank, or 0 where Slurm shows each rank only its
    own (``--gpus-per-task``, ``--gpu-bind``). That no other rank has the same one is checked by NCCL.

    Raises:
        DstrainError: there is none for this rank.
    """
    local_rank = int(environ["LOCAL_RANK"])
    ranks = int(environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    number = 0 if visible < ranks and _has_own_gpus(environ, visible) else local_rank
    if number >= visible:
        raise DstrainError(
            f"local rank {local_rank} has no GPU: this process sees {visible or 'none'}",
            where="CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in environ else "GPUs",
            hint="each rank needs a GPU of its own: request fewer ranks per host, or more GPUs (in a Slurm job"
            " --gpus-per-node=N with --ntasks-per-node=N, or --gpus-per-task=1); `dstrain doctor` checks them",
        )
    return number


def _has_own_gpus(environ: Mapping[str, str], visible: int) -> bool:
    """Whether Slurm has given this task GPUs of its own, and hides those of the others from it (srun(1))."""
    if "SLURM_PROCID" not in environ:
        return False
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or environ.get("SLURM_GPU_BIND", "none") != "none"
        or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
        or (on_node.isdigit() and int(on_node) > visible)
    )


def be_deterministic() -> None:
    """For this process, before anything is computed.

    An operation without a deterministic implementation raises RuntimeError from now on. The variables that cuBLAS and
    flash attention read are set by the launch (``dstrain.launch.environment``): they are read when these are loaded.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.use_deterministic_algorithms(True)
    # It would fill each new tensor with NaN, a pass over the memory of all activations and buffers. That only makes an
    # operation that reads what nobody has written repeatable, which is a fault and not a result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def used_memory(device: torch.device) -> int:
    """Peak bytes of this rank: device memory on a GPU, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

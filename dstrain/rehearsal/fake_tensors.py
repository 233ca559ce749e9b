"""What keeps fake tensors from being trained as real ones are, and what is put in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer
from transformers.utils import import_utils

from dstrain.rehearsal.replacing import replace

PINNED = "_is_pinned_for_rehearsal"


def dtype_name(dtype: torch.dtype) -> str:
    """As ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def prepare_fake_tensors() -> None:
    """Patch torch and transformers, for the rest of this process. After transformers' import."""
    # No device is there to be initialised; torch takes a guard that does nothing for one then.
    replace(FakeTensorMode, "avoid_device_init", True)
    # torch's optimizers take all tensors at a time on a GPU, but only those of these types.
    optimizer._foreach_supported_types.append(FakeTensor)
    # `parameter.data = tensor` of another device leaves a fake tensor's own note of its device as it was.
    data: Any = torch.Tensor.data
    replace(FakeTensor, "data", property(data.__get__, _set_data(data)))
    # `module.to()` swaps parameters, which fake tensors refuse.
    replace(torch.utils, "swap_tensors", _swap)
    # A fake storage lies nowhere; what is known by its address must not be taken for another one's.
    replace(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    # Where host memory is pinned, it is remembered: copies from elsewhere wait.
    replace(torch.Tensor, "pin_memory", _pinned)
    replace(torch.Tensor, "is_pinned", lambda tensor, *device: bool(getattr(tensor, PINNED, False)))
    # A list of numbers is read in one copy; fake tensors read one number after the other.
    read: Any = FakeTensor.tolist
    replace(FakeTensor, "tolist", lambda tensor: read(tensor.cpu()))
    # transformers takes a fake tensor for a sign of an export, and computes otherwise then.
    replace(import_utils, "is_fake_tensor", lambda tensor: False)


def _set_data(data: Any) -> Any:
    def set_data(tensor: FakeTensor, value: torch.Tensor) -> None:
        data.__set__(tensor, value)
        if isinstance(value, FakeTensor):
            tensor.fake_device = value.fake_device

    return set_data


def _swap(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours.data = theirs


def _pinned(tensor: torch.Tensor, *device: Any) -> torch.Tensor:
    found = tensor.clone()
    setattr(found, PINNED, True)
    return found

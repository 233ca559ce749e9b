"""What keeps fake tensors from being trained as real ones are, and what is put in its place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import optimizer
from transformers.utils import import_utils

from dstrain.model.skeleton import empty_model
from dstrain.model.weights.weight_files import StoredTensor
from dstrain.rehearsal.replacing import replace, replace_everywhere

_PINNED: dict[int, weakref.ref[torch.UntypedStorage]] = {}


_KERNELS = torch.library.Library("aten", "IMPL")


def dtype_name(dtype: torch.dtype) -> str:
    """As ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def prepare_fake_tensors() -> FakeTensorMode:
    """Patch torch and transformers, for the rest of this process, and make the mode. After transformers' import."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # No device is there to be initialised; torch takes a guard that does nothing for one then.
    replace(FakeTensorMode, "avoid_device_init", True)
    # torch's optimizers take all tensors at a time on a GPU, but only those of these types.
    optimizer._foreach_supported_types.append(FakeTensor)
    # `parameter.data = tensor` of another device leaves a fake tensor's own note of its device as it was.
    data: Any = torch.Tensor.data
    replace(FakeTensor, "data", property(data.__get__, _set_data(data)))
    # A parameter on meta that was made before is given the type of the training.
    replace(torch.nn.Parameter, "data", property(data.__get__, _set_meta(data)))
    # `module.to()` swaps parameters, which fake tensors refuse.
    replace(torch.utils, "swap_tensors", _swap)
    # A fake storage lies nowhere; what is known by its address must not be taken for another one's.
    replace(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    # Where host memory is pinned, it is remembered: copies from elsewhere wait.
    replace(torch.Tensor, "pin_memory", _pinned)
    replace(torch.Tensor, "is_pinned", lambda tensor, *device: is_pinned(tensor))
    # A list of numbers is read in one copy; fake tensors read one number after the other.
    read: Any = FakeTensor.tolist
    replace(FakeTensor, "tolist", lambda tensor: read(tensor.cpu()))
    # A tensor on meta that was made before is copied as one, and not into a fake one.
    copied: Any = torch.Tensor.__deepcopy__
    replace(torch.Tensor, "__deepcopy__", _copy_as_it_is(copied))
    # What a file holds is of no interest. transformers reads in threads, which know of no mode.
    replace(StoredTensor, "read", _read(mode))
    # A torch without CUDA would compute these step by step, which takes more memory than CUDA's kernels do.
    for name in ("silu_backward", "mish_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            _KERNELS.impl(name, lambda gradient, value: torch.empty_like(value), "CUDA")
    # A model without weights is made as it always is, also that of a family without layers.
    replace_everywhere(empty_model, _outside(empty_model))
    # transformers takes a fake tensor for a sign of an export, and computes otherwise then.
    replace(import_utils, "is_fake_tensor", lambda tensor: False)
    return mode


def _read(mode: FakeTensorMode) -> Any:
    def read(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        with mode:
            return torch.empty(stored.shape, dtype=dtype)

    return read


def _outside(function: Any) -> Any:
    """The function, called without the mode."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def _set_data(data: Any) -> Any:
    def set_data(tensor: FakeTensor, value: torch.Tensor) -> None:
        data.__set__(tensor, value)
        if isinstance(value, FakeTensor):
            tensor.fake_device = value.fake_device

    return set_data


def _set_meta(data: Any) -> Any:
    def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, FakeTensor) and value.is_meta and not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        data.__set__(tensor, value)

    return set_data


def _copy_as_it_is(copied: Any) -> Any:
    def copy(tensor: torch.Tensor, memo: dict[int, Any]) -> Any:
        if isinstance(tensor, FakeTensor):
            return copied(tensor, memo)
        with unset_fake_temporarily():
            return copied(tensor, memo)

    return copy


def _swap(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    ours.data = theirs


def _pinned(tensor: torch.Tensor, *device: Any) -> torch.Tensor:
    found = tensor.clone()
    storage = found.untyped_storage()
    _PINNED[storage._cdata] = weakref.ref(storage)
    return found


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether its storage is pinned: of a part of it too."""
    storage = tensor.untyped_storage()
    known = _PINNED.get(storage._cdata)
    return known is not None and known() is storage

"""A Hugging Face model without weights: parameters on the meta device, buffers real.

A plain ``torch.device("meta")`` would lose the rotary tables and embedding scales that no checkpoint holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import TORCH_INIT_FUNCTIONS, no_init_weights

from dstrain.errors import DstrainError
from dstrain.model.architecture import canonical_config
from dstrain.model_config_bounds import leaves_of

KEPT = 65_536
"""Elements up to which a parameter's value from the constructor is kept."""


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Restore the CPU generator's state afterwards, and leave those of the accelerators alone."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def return_freed_memory() -> None:
    """Whole layers were freed between parts that stay: without this, most of their pages would stay too.

    Source: malloc_trim(3), of the GNU C library; others manage without.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


HUGE = 2**28
"""Elements above which a new tensor, empty or zeros, is made on meta. Only weights are as large, such as all experts of
a block in one: a machine may refuse the memory, and writing the zeros takes seconds a block."""


class _MarkUninitialised(TorchFunctionMode):
    """Fill small new tensors of undefined contents with NaN, so that they can be told from set ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            shape = func(*args, **{**kwargs, "device": "meta"})
            if shape.numel() > HUGE and shape.is_floating_point():
                return shape
        result = func(*args, **kwargs)
        undefined = func in (torch.empty, torch.empty_like, torch.Tensor.new_empty)
        if undefined and result.is_floating_point() and not result.is_meta and result.numel() <= KEPT:
            result.fill_(float("nan"))
        return result


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Send every parameter to meta as soon as a module registers it; its memory was never written to.

    What a constructor set by itself (``torch.zeros``, a learned slope of an activation) stays with the
    parameter as its attribute ``constructed``, for families whose ``_init_weights`` passes it by. Where it called
    one of ``torch.nn.init``, that call is the attribute ``draw``, to be made once there is memory.
    """
    original = nn.Module.register_parameter
    functions = {name: getattr(nn.init, name) for name in TORCH_INIT_FUNCTIONS}
    draws: dict[str, Any] = dict(TORCH_INIT_FUNCTIONS)

    def noted(name: str) -> Any:
        def note(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if tensor.is_meta:
                tensor.__dict__["draw"] = lambda real: draws[name](real, *args, **kwargs)
            return tensor

        return note

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta:
            empty = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
            empty.__dict__.update(param.__dict__)
            if param.numel() <= KEPT and not param.data.isnan().any():
                empty.__dict__["constructed"] = param.data.clone()
            module._parameters[name] = empty

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    for name in functions:
        setattr(nn.init, name, noted(name))
    try:
        with _MarkUninitialised():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        for name, function in functions.items():
            setattr(nn.init, name, function)


def empty_model(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Build the causal language model of ``config`` in fp32: parameters on meta, buffers on CPU.

    Args:
        attention: "sdpa", "eager", "flash_attention_2" ...; "auto" or None: sdpa where the family has it,
            else eager.

    Raises:
        DstrainError: the family cannot be built with this configuration or this attention.
    """
    config = canonical_config(config)
    options = {} if attention in (None, "auto") else {"attn_implementation": attention}
    try:
        with untouched_rng(), no_init_weights(), _parameters_on_meta():
            # Constructors that draw values shall draw the same on every rank.
            torch.default_generator.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False, **options
            )
    except Exception as error:  # families raise what they like for values that do not fit together
        text = _unknown_value(config, error) or " ".join(str(error).split())
        hint = f"compare its config.json with that of a {config.model_type} model on the hub"
        if options and "attention" in text.lower():
            text = text.split(". ")[0]
            hint = "attention: auto takes sdpa where the family has it, else eager"
        raise DstrainError(f"the {config.model_type} model cannot be built: {text}", hint=hint) from error
    model.tie_weights()
    model.train()
    return model


def _unknown_value(config: PretrainedConfig, error: Exception) -> str | None:
    """A word of the configuration that is in none of the family's tables, whose error is the word alone."""
    if not isinstance(error, KeyError) or not error.args or not isinstance(error.args[0], str):
        return None
    for path, value in leaves_of(config.to_dict()):
        if value == error.args[0]:
            return f"{path} is {value!r}, which transformers does not know"
    return None


def put_at_paths(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Register modules below ``root`` at their paths, in containers without a forward pass."""
    for path, module in modules.items():
        parent = root
        *parts, name = path.split(".")
        for part in parts:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]  # type: ignore[assignment]
        parent.add_module(name, module)


Result = TypeVar("Result")


def keep_buffer_types(module: nn.Module, apply: Callable[[], Result]) -> Result:
    """Run ``apply`` (a move or a cast of ``module``) without rounding its float buffers.

    ``module.to(torch.bfloat16)``, as DeepSpeed's engines call it, would round rotary tables, embedding
    scales and router corrections, which Hugging Face keeps in fp32.
    """
    before = [
        (child, name, buffer)
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    result = apply()
    for child, name, buffer in before:
        after = child._buffers[name]
        if after is not None and after.dtype != buffer.dtype:
            child._buffers[name] = buffer.to(after.device)
    return result

"""A base model in 4 or 8 bits: bitsandbytes' linear layers in place of its own, filled with the weights that it has."""

from __future__ import annotations

import functools
import logging
import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dstrain.errors import DstrainError
from dstrain.lora import Bits
from dstrain.model.skeleton import return_freed_memory

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_BLOCK = 64
"""Weights that share a scale in 4 bits: bitsandbytes' own choice."""
_PIECE = 2**18
"""Weights that are quantized at a time."""
_NESTED = 256
"""Scales that share a scale of their own. Source: Dettmers et al. 2023, QLoRA, section 3 (double quantization)."""


def quantized_modules(model: PreTrainedModel, whole: Collection[str] = ()) -> tuple[str, ...]:
    """The paths of the linear layers that transformers would quantize: all but the head, and what shares its weight.

    Of a model that is quantized on disk, those that are there.

    Args:
        whole: modules that are trained as a whole, and so stay as they are.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    told = _quantization_of(model.config)
    skipped = HfQuantizer.get_modules_to_not_convert(
        model,
        told.get("llm_int8_skip_modules") if told else list(whole),
        list(model._keep_in_fp32_modules or ()),
        add_default_skips=not told,
    )
    return tuple(sorted(name for name in linear_modules(model) if should_convert_module(name, skipped)))


def linear_modules(model: nn.Module) -> set[str]:
    """The paths of the layers that can be quantized."""
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }


class StoredWeights(Protocol):
    """Weights that lie quantized in a model's files.

    Attributes:
        names: of its parameters.
    """

    names: frozenset[str]

    def parameter(self, bnb: Any, name: str, module: Any) -> nn.Parameter:
        """One of them, for one of bitsandbytes' linear layers. Raises DstrainError."""


def bits_on_disk(config: PretrainedConfig, where: str) -> Bits | None:
    """Of a model whose weights are quantized in its files; None of one whose are not.

    Args:
        where: its folder, for the message.

    Raises:
        DstrainError: they are quantized otherwise than by bitsandbytes.
    """
    told = _quantization_of(config)
    bits = bits_of_bitsandbytes(config)
    if told and bits is None:
        raise DstrainError(
            f"these weights are quantized by {told.get('quant_method') or 'an unknown method'}, and dstrain trains"
            " weights of 16 and 32 bits, and adapters for those that bitsandbytes has quantized",
            where=where,
            hint="name a folder with the model's unquantized weights, or --init random",
        )
    return bits


def bits_of_bitsandbytes(config: PretrainedConfig) -> Bits | None:
    """Of a model that bitsandbytes has quantized in its files; None of any other."""
    told = _quantization_of(config)
    if told.get("load_in_4bit"):
        return "4bit"
    return "8bit" if told.get("load_in_8bit") else None


def _quantization_of(config: PretrainedConfig) -> Mapping[str, Any]:
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return {}
    told: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    return told


def bitsandbytes_config(bits: Bits, dtype: torch.dtype, unquantized: Collection[str]) -> BitsAndBytesConfig:
    """What tells ``from_pretrained`` to quantize a model as it was quantized here.

    Args:
        unquantized: paths of its other linear layers.
    """
    from transformers import BitsAndBytesConfig

    skipped = list(unquantized)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


@torch.no_grad()
def quantize(
    root: nn.Module,
    names: Collection[str],
    bits: Bits,
    dtype: torch.dtype,
    stored: StoredWeights | None,
    *,
    unpacked: bool = False,
) -> None:
    """Put bitsandbytes' layers in the place of these linear layers below ``root``, one after the other.

    4 bits: NF4 with double quantization. 8 bits: a scale for each row, and none of the columns of activations kept in
    16 bits: which of them stand out depends on all rows of a micro-batch.

    Args:
        dtype: to compute in, which the weights are rounded to before.
        stored: weights that are quantized in the model's files, and have no values yet.
        unpacked: leave the layers as they are, with the weights, in fp32, that would be computed with.

    Raises:
        DstrainError: bitsandbytes is not installed, or what is stored can't be read.
    """
    bnb = import_bitsandbytes()
    for name in names:
        linear = root.get_submodule(name)
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        linear.weight = None  # type: ignore[assignment]
        turned = isinstance(linear, Conv1D)
        if turned:
            weight = weight.T
        weight = weight.to(dtype)
        rows, columns = weight.shape
        new: Any
        with torch.device("meta"):
            if bits == "4bit":
                new = bnb.nn.Linear4bit(columns, rows, bias is not None, dtype, True, "nf4")
            else:
                new = bnb.nn.Linear8bitLt(columns, rows, bias is not None, has_fp16_weights=False)
        new.bias = bias
        if stored is not None and f"{name}.weight" in stored.names:
            new.weight = stored.parameter(bnb, f"{name}.weight", new)
        else:
            new.weight = _in_4_bits(bnb, weight, new) if bits == "4bit" else _in_8_bits(bnb, weight)
        del weight
        if unpacked:
            values = _unpacked(bnb, new.weight, dtype).float()
            linear.weight = nn.Parameter(values.T.contiguous() if turned else values, requires_grad=False)
            continue
        keep_packing(new)
        new.register_forward_pre_hook(_refuse_integers)
        new.train(linear.training)
        new.requires_grad_(False)
        root.set_submodule(name, new)
    return_freed_memory()


def _refuse_integers(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Some families cast a layer's input to the type of its weight, which is none to compute in here."""
    if inputs and isinstance(inputs[0], Tensor) and not inputs[0].is_floating_point():
        raise TypeError(f"it casts the input of a {type(module).__name__} to the type of its packed weight")


def keep_packing(module: nn.Module) -> None:
    """Forbid bitsandbytes to pack weights anew in a validation on a CPU with bfloat16, for good and with their scales
    rounded."""
    for child in module.modules():
        if hasattr(child, "support_avx512bf16_for_cpu"):
            child.__dict__["support_avx512bf16_for_cpu"] = False


def import_bitsandbytes() -> Any:
    """Raises DstrainError where it can't be imported."""
    try:
        with no_fetched_kernels():
            import bitsandbytes
    except Exception as error:  # a build for another accelerator raises what it likes
        raise DstrainError(
            f"adapter.base needs bitsandbytes, which can't be imported: {' '.join(str(error).split())}",
            where="adapter.base",
            hint="pip install bitsandbytes, or leave adapter.base out",
        ) from None
    return bitsandbytes


@contextmanager
def no_fetched_kernels() -> Iterator[None]:
    """For the import of bitsandbytes, or of what imports it.

    On a CPU with bfloat16 it would fetch a compiled kernel from the hub and run it, where the package ``kernels`` is
    installed, and warn where it is not.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let the quantized weights below be unpacked to this type: a cast changes the others alone."""
    for child in module.modules():
        if getattr(child, "quant_state", None) is not None:
            weight: Any = child.weight
            weight.quant_state.dtype = dtype
            child.__dict__["compute_dtype"] = dtype


def unpacked_shapes(module: nn.Module) -> set[torch.Size]:
    """The shapes of all weights below, quantized or not, as the passes compute with them."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in module.parameters())
    return {parameter.shape if state is None else torch.Size(state.shape) for parameter, state in states}


def keeps_inputs(module: nn.Module) -> bool:
    """Whether layers below keep their inputs where autograd's hooks do not see it: bitsandbytes' 8-bit ones."""
    return any(getattr(parameter, "SCB", None) is not None for parameter in module.parameters())


def elements(parameter: Tensor) -> int:
    """How many weights it holds, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def quantized_bytes(parameter: Tensor) -> int | None:
    """What a quantized weight takes with its scales; None of one that is not."""
    tensors = list(quantized_parts(parameter))
    return sum(tensor.nbytes for tensor in (parameter, *tensors)) if tensors else None


def quantized_parts(parameter: Tensor) -> Iterator[Tensor]:
    """The scales and tables of a quantized weight."""
    state = getattr(parameter, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        if part is not None:
            yield from (value for value in vars(part).values() if isinstance(value, Tensor))
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        yield scales


def _unpacked(bnb: Any, weight: Any, dtype: torch.dtype) -> Tensor:
    """What is computed with in place of a quantized weight."""
    values: Tensor
    if getattr(weight, "quant_state", None) is not None:
        values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        values = weight.CB.to(dtype).mul_(weight.SCB.unsqueeze(1).mul(1.0 / 127.0))
    return values


def _in_4_bits(bnb: Any, weight: Tensor, module: Any) -> nn.Parameter:
    """Packed piece by piece: bitsandbytes takes twenty bytes a weight meanwhile on a CPU."""
    functional, number = bnb.functional, weight.numel()
    blocks = -(-number // _BLOCK)
    packed = torch.empty((number + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(blocks, device=weight.device)
    if weight.is_meta:
        code = torch.empty(16, device="meta")
        absmax, offset = torch.empty(blocks, dtype=torch.uint8, device="meta"), torch.empty((), device="meta")
        of_scales = functional.QuantState(
            absmax=torch.empty(-(-blocks // _NESTED), device="meta"),
            code=torch.empty(256, device="meta"),
            blocksize=_NESTED,
            dtype=torch.float32,
        )
    else:
        flat = weight.reshape(-1)
        for start in range(0, number, _PIECE):
            part, state = functional.quantize_4bit(
                flat[start : start + _PIECE], blocksize=_BLOCK, quant_type="nf4"
            )
            packed[start // 2 : start // 2 + part.numel()] = part
            scales[start // _BLOCK : start // _BLOCK + state.absmax.numel()] = state.absmax
        code = state.code
        offset = scales.mean()
        absmax, of_scales = functional.quantize_blockwise(scales - offset, blocksize=_NESTED)
    module.quant_state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=code,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=offset,
        state2=of_scales,
    )
    kind = _copied_on_meta(bnb) if weight.is_meta else bnb.nn.Params4bit
    parameter: nn.Parameter = kind(
        packed,
        requires_grad=False,
        quant_state=module.quant_state,
        blocksize=_BLOCK,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )
    return parameter


def _in_8_bits(bnb: Any, weight: Tensor) -> nn.Parameter:
    """Row by row, and so piece by piece too."""
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, _PIECE // weight.shape[1])
    for start in range(0, 0 if weight.is_meta else weight.shape[0], rows):
        part = slice(start, start + rows)
        packed[part], scales[part], _ = bnb.functional.int8_vectorwise_quant(weight[part].to(torch.float16))
    parameter: nn.Parameter = bnb.nn.Int8Params(packed, requires_grad=False, CB=packed, SCB=scales)
    return parameter


@functools.cache
def _copied_on_meta(bnb: Any) -> Any:
    """bitsandbytes' class of that name, whose own copies begin with a tensor on the CPU."""

    class Params4bit(bnb.nn.Params4bit):  # type: ignore[misc]
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            options = {key: value for key, value in vars(self).items() if key != "data"}
            return type(self)(torch.empty_like(self.data), self.requires_grad, **options)

    return Params4bit

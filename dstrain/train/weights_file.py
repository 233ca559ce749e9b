"""Writes a safetensors file tensor by tensor: of what is written, one tensor is in the host's memory at a time.

The library's own ``save_file`` wants all tensors at once. The format: 8 bytes with the length of the header, the header
as JSON with type, shape and place of each tensor, and the tensors' bytes one behind the other.

Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dstrain.strict_json import to_json

_ALIGNMENT = 8
_FP32_BYTES = 4


def write_weights(
    path: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Write ``tensors`` to ``path``, which has the name only when all are there.

    Args:
        shapes: of each tensor, by name.
        tensors: fp32 in host memory, each name once, in any order.

    Raises:
        OSError: the disk takes no more.
        ValueError: a tensor is missing, or has another shape or type.
    """
    places, end = {}, 0
    for name in sorted(shapes):
        places[name] = end
        end += _FP32_BYTES * math.prod(shapes[name])
    header = to_json(
        {
            name: {
                "dtype": "F32",
                "shape": list(shapes[name]),
                "data_offsets": [start, start + _FP32_BYTES * math.prod(shapes[name])],
            }
            for name, start in places.items()
        }
    ).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    missing = set(shapes)
    try:
        with open(aside, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            begin = file.tell()
            for name, tensor in tensors:
                if tensor.dtype != torch.float32 or list(tensor.shape) != list(shapes[name]):
                    raise ValueError(f"{name} is {tensor.dtype} of {list(tensor.shape)}")
                missing.discard(name)
                file.seek(begin + places[name])
                file.write(tensor.contiguous().view(-1).numpy().data)
                del tensor  # before the next one is made
            if missing:
                raise ValueError(f"{', '.join(sorted(missing))} are missing")
            file.truncate(begin + end)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

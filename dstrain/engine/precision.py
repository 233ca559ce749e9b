"""The supported precisions as torch dtypes."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""``precision`` of the configuration -> the type of the weights that the model computes with."""

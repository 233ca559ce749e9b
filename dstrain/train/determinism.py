"""``deterministic: true``: bit-identical results, or an error that names the operation."""

from __future__ import annotations

import torch


def be_deterministic() -> None:
    """For this process, before anything is computed.

    An operation without a deterministic implementation raises RuntimeError from now on. The variables that cuBLAS and
    flash attention read are set by the launch (``dstrain.launch.environment``): they are read when these are loaded.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True

"""Imported once by the fork server of `workers`: all that a rank imports later, or each job pays for it."""

import importlib

import torch

for name in (
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported, and compiled, by every engine
    "deepspeed.runtime.zero.stage3",
    "dstrain.engine.build",
    "dstrain.model.measuring.measure",
    "dstrain.plan.plan",
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

from deepspeed.comm.torch import build_shm_op  # noqa: E402

torch.set_num_threads(1)
# Compiled on first use and then looked up by ninja in every process: once is enough.
SHARED_MEMORY_OPERATOR = build_shm_op()

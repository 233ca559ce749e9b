"""Imported once by the fork server of `workers`: all that a rank imports later, or each job pays for it."""

import importlib

import torch

for name in (
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported, and compiled, by every engine
    "deepspeed.runtime.zero.stage3",
    "dstrain.engine.build",
    "dstrain.engine.communication",
    "dstrain.model.measuring.measure",
    "dstrain.plan.plan",
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

torch.set_num_threads(1)

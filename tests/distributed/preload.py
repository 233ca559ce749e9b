"""Imported once by the fork server of `workers`: all that a rank imports later, or each job pays for it."""

import importlib

import torch

for name in (
    "deepspeed.module_inject.auto_ep_layer",  # imported by every engine
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported, and compiled, by every engine
    "deepspeed.runtime.zero.stage3",
    "dstrain.cli.execute",
    "dstrain.cli.resume",
    "dstrain.cli.run",
    "dstrain.engine.build",
    "dstrain.engine.communication",
    "dstrain.model.measuring.measure",
    "dstrain.plan.plan",
    "dstrain.train.loop",
    "setuptools",  # DeepSpeed looks for compilers with it
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

torch.set_num_threads(1)

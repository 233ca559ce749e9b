"""Imported once by the fork server of `workers`: all that a rank imports later, or each job pays for it."""

import gc
import importlib

# Nothing of this is garbage, and looking for some is a seventh of the work.
gc.disable()

import torch  # noqa: E402

for name in (
    "deepspeed.module_inject.auto_ep_layer",  # imported by every engine
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported, and compiled, by every engine
    "deepspeed.runtime.zero.stage3",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "dstrain.api.running",
    "dstrain.cli.export",
    "dstrain.cli.generate",
    "dstrain.cli.main",
    "dstrain.cli.plan",
    "dstrain.cli.resume",
    "dstrain.cli.run",
    "dstrain.cli.verify",
    "dstrain.data.prepare",
    "dstrain.engine.build",
    "dstrain.engine.build",
    "dstrain.exporting.convert",
    "dstrain.exporting.generate",
    "dstrain.supervise.subreaper",
    "dstrain.model.measuring.measure",
    "dstrain.model.capability.independence",
    "dstrain.model.weights.check_weights",
    "dstrain.planning.plan",
    "dstrain.train.trainer",
    "setuptools",  # DeepSpeed looks for compilers with it
    "torch.distributed.run",
    "torch.utils.checkpoint",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

torch.set_num_threads(1)
# A collection in a fork would write to each object, and so copy all that is shared with the server.
gc.freeze()
gc.enable()

"""Imported once by the fork server of `workers`."""

import deepspeed
import deepspeed.comm
import deepspeed.runtime.pipe.engine
import torch
import torch.utils.checkpoint
import transformers.models.llama.modeling_llama
from deepspeed.comm.torch import build_shm_op

torch.set_num_threads(1)
# Compiled on first use and then looked up by ninja in every process: once is enough.
SHARED_MEMORY_OPERATOR = build_shm_op()

import dstrain.engine.build  # noqa: E402

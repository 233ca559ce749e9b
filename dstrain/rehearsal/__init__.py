"""A rank of any plan on a GPU that is not there: its memory, messages and waits, without computing a number.

The model, DeepSpeed's engine and dstrain's own code run as in a training, on fake tensors: they have shapes, types
and a device, and no values. A process of its own, `dstrain.rehearsal.rank_process`, rehearses one rank.
"""

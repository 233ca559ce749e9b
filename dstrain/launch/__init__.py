"""How a run is started and how it ends: hosts, devices, the command, the supervisor.

Standard library only (with ``dstrain.errors`` and the run folder): this room must never import torch or
DeepSpeed, since ``dstrain --help``, a plan and a bad hostfile are answered before those could load.
"""

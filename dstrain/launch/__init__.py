"""How a run is started: hosts, devices, the command, the environment.

This room must never import torch or DeepSpeed, since ``dstrain --help``, a plan and a bad hostfile are answered before
those could load.
"""

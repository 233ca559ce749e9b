"""Launching a run: hosts, devices, launch command, environment.

This room must never import torch or DeepSpeed, since ``dstrain --help``, a plan and a bad hostfile are answered before
those could load.
"""

"""Writes the table of DeepSpeed's keys, by asking the DeepSpeed that is installed: no part of a training."""

import os

# Read when DeepSpeed is imported: defaults must not depend on the machine that writes the table.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

"""Golden tests: what version 0.1 did, and what every later version must still do.

They reach the product through its outer surfaces only, the command line and the files of run folders, so that modules
can be moved and renamed beneath them. `data/` was written by the last commit of 0.1. What is renamed on purpose goes
into the tables of `compare.py`; the data itself is not written anew.
"""

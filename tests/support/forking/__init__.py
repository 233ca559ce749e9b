"""Interpreters that have imported everything before they start.

A run starts some ten interpreters (the command line, a guard, DeepSpeed's launcher, its launcher on each node, the
ranks), and each imports torch for seconds. Here the process tree is the real one, and each process runs the same
module with the same arguments, environment, session and open files; but where a python would be started anew, one
that has imported all is forked and goes on as if it were new. The kernel's part of dying is the real one.

`program.Program` starts such a process from a test, on this machine or on a host of tests/cluster; `becoming` is
what happens in it, and in those that it starts; `hook` brings a node's launcher, which ssh starts, to fork its ranks.
"""

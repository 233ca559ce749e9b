"""Rows that are made while training goes on: a stream of shards, read, tokenized and packed ahead on each host.

Row numbers count up from 0 without an end; which tokens a row holds is a pure function of the files, the tokenizer and
the options of the stream, whoever makes it and wherever that begins. `rows` is what training uses, in a process that
reads the ring which another one, `producer`, writes.
"""

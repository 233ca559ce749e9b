"""The data pipeline: sources -> documents or conversations -> tokens and what is trained -> rows -> their order.

In the order in which data pass through: ``listing`` (which files a source has), ``reading`` (documents and records of
files), ``chat`` (conversations by a chat template), ``tokenizing`` (tokenizers, and workers that use them),
``token_files`` (what holds tokens already), ``token_cache`` (tokens on disk), ``rows`` (split, packing, order,
mixtures), ``prepare`` (all of it for one source) and ``training_data`` (all sources of a run). ``streaming`` makes rows
while they are trained on. ``show`` says what a sample holds.

Nothing is imported here: `listing.sources` alone costs milliseconds, `prepare` pulls in numpy, and transformers for its
tokenizers.
"""

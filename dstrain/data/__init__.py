"""The data pipeline: text -> tokens -> packed rows -> the order in which a run reads them.

Read in this order: ``sources`` (which files; ``left_out``: which not), ``documents`` (their text), ``tokenizers``,
``safe_cuts`` (pieces of long texts), ``token_cache`` (tokens on disk), ``split`` (training and validation documents),
``packing`` (rows and labels), ``order`` (which rows make up a step), ``prepare`` (all of it in one call, and on the
command line).

Nothing is imported here: `sources` alone costs milliseconds, `prepare` pulls in numpy, and transformers for its
tokenizers.
"""

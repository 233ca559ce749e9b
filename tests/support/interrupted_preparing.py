"""Tokenizes a corpus in a process that a test kills: ``SOURCE TOKENIZER CACHE WORKERS RECORDS``, the last as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dstrain.data.chat import corpus
from dstrain.data.chat.options import RecordOptions
from dstrain.data.listing.sources import find_files
from dstrain.data.token_cache import load_or_build
from dstrain.data.tokenizing import encoders, token_output
from dstrain.data.tokenizing.tokenizers import load_tokenizer

token_output._SAVE_SECONDS = 0.02
encoders._BATCH = 2**13
encoders._PIECE = 2**11
corpus._BATCH = 2**13

if __name__ == "__main__":
    source, name, cache, workers, records = sys.argv[1:]
    tokenizer = load_tokenizer(name)
    found = corpus.source_of(find_files(source), RecordOptions(**json.loads(records)), tokenizer)
    print("begins", flush=True)
    print(load_or_build(found, tokenizer, Path(cache), int(workers)).content)

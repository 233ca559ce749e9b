"""What a run writes at its end: the final weights as safetensors, and a continuation of the prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from dstrain.control_group import barrier
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.engine.interface import Engine, MicroBatch
from dstrain.files import make_folder
from dstrain.json_collectives import broadcast_json
from dstrain.train.weights_file import write_weights


def save_weights(engine: Engine, folder: Path, stage: int, replica: int) -> None:
    """Write ``stage-N.safetensors``; the first replica of each stage does, tensor by tensor. Collective."""
    if replica == 0:
        make_folder(folder, below=folder.parent)
        write_weights(folder / f"stage-{stage}.safetensors", engine.weight_shapes(), engine.weights())
    else:
        engine.help_with_weights()
    barrier()


TEMPERATURE = 0.7


def continuation(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    tokens: int,
    seq_len: int,
    micro_batch: int,
    seed: int,
    stop_tokens: Collection[int] = (),
) -> str:
    """Sample up to ``tokens`` tokens after the tokens ``prompt`` and return both as text.

    Collective. The whole sequence is run again for each token, in the shape of a training
    micro-batch: slow, but it works for every layout and needs no other form of the model.
    """
    ids = list(prompt)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        window = ids[-seq_len:]
        logits = engine.next_token_logits(_as_micro_batch(window, micro_batch, seq_len), 0, len(window) - 1)
        logits = logits[: tokenizer.vocab_size] / TEMPERATURE
        drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)
        token = int(broadcast_json(int(drawn)))
        if token == tokenizer.end_of_document or token in stop_tokens:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def _as_micro_batch(window: list[int], micro_batch: int, seq_len: int) -> MicroBatch:
    """The window in row 0, padded behind: a causal model does not see what comes later.

    Positions restart behind it, since rotary tables may depend on how long a document is.
    """
    input_ids = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
    input_ids[0, : len(window)] = torch.tensor(window)
    position_ids = torch.arange(seq_len).repeat(micro_batch, 1)
    position_ids[0, len(window) :] -= len(window)
    labels = torch.full((micro_batch, seq_len), -100)
    return MicroBatch(input_ids, position_ids, labels, torch.zeros(1))

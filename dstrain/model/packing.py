"""Whether documents that are packed into one row can see each other."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.model.architecture import canonical_config
from dstrain.model.whole import WholeModel

LENGTH = 8
"""Tokens of each of the two documents in the test row."""


VOCABULARY = 256


@torch.no_grad()
def packing_leaks(config: PretrainedConfig, attention: str = "sdpa") -> str | None:
    """Change the first of two packed documents and see whether the second one's logits move.

    Positions restart at 0 with each document, which is how Hugging Face recognises packing. The test runs
    on CPU in fp32 with a small vocabulary and with as few blocks as show each kind, but at full width:
    about 3 GB for two blocks of 400M parameters.

    Returns:
        What leaks, in one sentence, or None.

    Raises:
        DstrainError: the model cannot be built.
    """
    model = WholeModel(shallow(config), seed=0, attention=attention).eval()
    random = torch.Generator().manual_seed(0)
    one = torch.randint(3, model.config.vocab_size, (1, 2 * LENGTH), generator=random)
    other = one.clone()
    other[:, :LENGTH] = torch.randint(3, model.config.vocab_size, (1, LENGTH), generator=random)
    positions = torch.arange(LENGTH).repeat(2)[None]
    try:
        moved = (model((one, positions)) - model((other, positions)))[:, LENGTH:].abs().max()
    except Exception as error:  # whatever the family's code runs into
        text = " ".join(str(error).split())[:200]
        raise DstrainError(f"the {config.model_type} model does not run on packed rows: {text}") from error
    if moved == 0:
        return None
    return (
        f"{config.model_type} lets a document see the ones before it in a packed row "
        f"(logits move by {moved:.1e})"
    )


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of ``config`` with a small vocabulary and as few blocks as show each kind of its blocks."""
    config = canonical_config(config)
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token >= config.vocab_size:
            setattr(config, name, 0)
    kinds = getattr(config, "layer_types", None)
    depth = 2 if not kinds else 1 + max(kinds.index(kind) for kind in set(kinds))
    if depth < config.num_hidden_layers:
        config.num_hidden_layers = depth
        for name, value in list(vars(config).items()):
            if name.endswith("layer_types") and isinstance(value, list):
                setattr(config, name, value[:depth])
    return config

"""Which model families can be split into pipeline layers: all that transformers knows are tried, and written down.

``python -m tools.models_page > docs/models.md``, or with ``--json`` the findings themselves.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dstrain.errors import DstrainError
from dstrain.model.capability.independence import judge_packing
from dstrain.model.capability.parity import CLOSE, compare_stages, compare_unsplit
from dstrain.model.capability.small_model import small_family

CHOICES: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "rwkv": {"rescale_every": 0},
}
"""With which values of its configuration a family can be split, where it can't be with its defaults."""

NOTES: dict[str, str] = {
    "big_bird": "its sparse attention is exchanged for full attention, for good, when a row is short",
    "blt": "it cuts the text into patches whose lengths depend on the text",
    "cpmant": "it puts prompt tokens before the text, and hands learned positions to each block",
    "deepseek_v4": "the experts of its first blocks are chosen by the token itself",
    "gemma3n_text": "it carries four hidden states at once, an embedding for each block, and keys that blocks share",
    "gemma4_text": "each block is given an embedding of its own for each token",
    "gemma4_assistant": "it drafts tokens for a larger model, and reads that model's cache",
    "gemma4_unified_assistant": "it drafts tokens for a larger model, and reads that model's cache",
    "hrm_text": "it runs the same blocks several times",
    "hy_v4": "a block may reuse the positions that the block before it chose to look at",
    "inkling2_text": "a block looks at what many earlier blocks returned",
    "mllama": "the blocks that look at images are left out where there is no image",
    "musicgen": "it writes sound, and AutoModelForCausalLM does not build it from its configuration",
    "musicgen_melody": "it writes sound, and AutoModelForCausalLM does not build it from its configuration",
    "prophetnet": "it carries a hidden state for each of the tokens to come",
    "reformer": "its blocks are reversible: they hand on two states, and recompute by themselves",
    "roformer": "its table of positions is a weight that each block is given",
    "rwkv": "it halves the hidden state between blocks, outside of training",
    "xlm": "its blocks are spread over several lists: attention, norms and the rest",
    "xlnet": "it is not a plain decoder: its hidden state is [sequence, batch, hidden], in two streams",
    "zamba": "each block is given the embedding of the tokens, and blocks share weights",
    "zamba2": "each block is given the embedding of the tokens, and blocks share weights",
    "zaya": "each block's router is given what the router before it computed",
}
"""Why, in plain words, where the probe can only tell what it ran into."""


@dataclass(frozen=True)
class Finding:
    """What was found about one family.

    Attributes:
        family: its ``model_type``.
        text: the ``model_type`` of the model that is trained; another one for many multimodal families.
        not_small: why no small model of it could be made; then it could not be tried. Or None.
        refused: why it cannot be split with its defaults, or None.
        whole: why it does not train in one piece, or None.
        choice: with which setting it can be split although it is refused without, or None.
        difference: the largest difference of loss, logits and gradients, over all ways to cut it, to Hugging
            Face's model; None if it cannot be split.
        leak: in packed rows documents are not kept apart with sdpa and eager attention; and so with flash attention.
        wrong: what went wrong although nothing refused it: a mistake in this program; or None.
    """

    family: str
    text: str
    not_small: str | None = None
    refused: str | None = None
    whole: str | None = None
    choice: str | None = None
    difference: float | None = None
    leak: bool = False
    flash_leak: bool = False
    wrong: str | None = None


def families() -> list[str]:
    """The ``model_type`` of all families with a causal language model."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def examine(family: str) -> Finding:
    """Make a small model of the family, and compare it with Hugging Face's, in stages and in one piece."""
    try:
        config = small_family(CONFIG_MAPPING[family])
    except DstrainError as error:
        return Finding(family, family, not_small=error.message, whole=error.message)
    refused = whole = choice = difference = wrong = None
    leak = flash_leak = False
    try:
        difference, refused = _try_stages(config)
        packing = judge_packing(config)
        leak, flash_leak = packing.leak is not None, packing.flash_leak is not None
        if packing.looks_ahead:
            whole = "a token sees the ones after it, so there would be nothing to learn"
        elif refused:
            whole = compare_unsplit(config)
        if refused and config.model_type in CHOICES:
            choices = CHOICES[config.model_type]
            chosen = small_family(type(config), **choices)
            difference, wrong = _try_stages(chosen)
            wrong = wrong or judge_packing(chosen).looks_ahead
            choice = ", ".join(f"{name}: {value}" for name, value in choices.items())
    except Exception as error:  # told as such, and the other families are tried
        wrong = f"{type(error).__name__}: {error}"
    return Finding(
        family, config.model_type, None, refused, whole, choice, difference, leak, flash_leak, wrong
    )


def _try_stages(config: PretrainedConfig) -> tuple[float | None, str | None]:
    try:
        return compare_stages(config), None
    except DstrainError as error:
        return None, error.message.partition("pipeline layers: ")[2] or error.message


def sweep(names: Iterable[str], processes: int = 2) -> list[Finding]:
    """Examine the families, in the order of their names. To be called before torch has computed anything."""
    names = sorted(names)
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(processes, _quiet) as pool:
        return pool.map(examine, names, chunksize=1)


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()


INTRODUCTION = """\
# Which model families can be split into pipeline stages

Written by `make docs`, with transformers {version}: do not edit.

`dstrain` has no code for single families: it drives each family's own forward in parts. Whether a model can be split is
found out before a run starts, so a family that is not listed here, from a newer transformers, is told apart as well.

Each of the {count} families with an `AutoModelForCausalLM` was tried with a small model of its kind: four blocks, cut
into two and into three stages, in fp32 on a CPU. **{exact} give the same loss, logits and gradients as Hugging Face's
own model, to the bit.**{close} The rest can't be split, for the reason given. Most of those still train with
`--pipeline 1`, where ZeRO spreads the weights.

Of a family for text and images the text model is trained. A family of encoders, such as `bert`, was tried as a decoder
(`is_decoder: true`).

In packed rows, several documents share a row. Where one can see another, `dstrain` refuses to pack; `--no-pack` trains
without.

| family | in stages | with `--pipeline 1` | packed rows |
| --- | --- | --- | --- |
"""


def page(findings: list[Finding]) -> str:
    """``docs/models.md``."""
    split = [f for f in findings if f.difference is not None]
    close = [f for f in split if f.difference]
    sentence = f" {len(close)} come within {CLOSE:g}, since they add up in another order." if close else ""
    text = INTRODUCTION.format(
        version=transformers.__version__,
        count=len(findings),
        exact=len(split) - len(close),
        close=sentence,
    )
    return text + "".join(
        f"| {_name(f)} | {_stages(f)} | {_one_piece(f)} | {_packed(f)} |\n" for f in findings
    )


def _name(found: Finding) -> str:
    return f"`{found.family}`" + (f", as `{found.text}`" if found.text != found.family else "")


def _stages(found: Finding) -> str:
    if found.not_small:
        return _no(found, found.not_small)
    if found.choice:
        return f"with `{found.choice}`; else {_no(found, found.refused or '')}"
    return _no(found, found.refused) if found.refused else "yes"


def _no(found: Finding, reason: str) -> str:
    note = NOTES.get(found.text)
    reason = reason.replace("|", "/")
    return f"no: {note} ({reason})" if note else f"no: {reason}"


def _one_piece(found: Finding) -> str:
    if found.not_small:
        return "no"
    if found.whole and found.choice:
        return f"with `{found.choice}`; else no: {found.whole}"
    return f"no: {found.whole}" if found.whole else "yes"


def _packed(found: Finding) -> str:
    if found.not_small or found.leak:
        return "no"
    return "yes, but not with flash attention" if found.flash_leak else "yes"


def main() -> None:
    _quiet()
    findings = sweep(sys.argv[2:] or families())
    if "--json" in sys.argv[1:]:
        json.dump([asdict(finding) for finding in findings], sys.stdout)
    else:
        print(page(findings), end="")


if __name__ == "__main__":
    main()

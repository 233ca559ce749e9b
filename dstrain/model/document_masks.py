"""Separates packed documents in families that don't, and for flash attention over several rows.

Masks: Hugging Face's mask functions see documents where position ids jump, but only if the family hands these on, and
hands on no mask of its own. Some families (falcon, opt, gpt_oss) call them without position ids: each document would
see those before it, silently. While a family's forward runs, the mask functions that its modules have imported are
therefore given our position ids.

Lengths: flash and varlen attention take no mask. Hugging Face's flash path finds the documents by position ids in a
batch of one row only; with more rows it must be told where each document begins, which families hand down as keyword
arguments.

Both need to know where documents begin. What is known of that on the host (`dstrain.model.document_lengths`) is taken
from there; else it is found on the device, for which the host waits.

Rotary tables: see `dstrain.model.rotary_tables`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from dstrain.model.document_lengths import DocumentLengths, document_begins, document_lengths, known_lengths
from dstrain.model.rotary_tables import rotary_tables_by_document
from dstrain.model.varlen_attention import VARLEN

Mask = Callable[..., Any]

MASKS: tuple[Mask, ...] = tuple(
    function
    for name, function in vars(masking_utils).items()
    if name.startswith("create_") and name.endswith("_causal_mask")
)
"""transformers' functions that make the causal mask of one kind of attention: full, sliding, in chunks."""

FLASH = "flash_attention"
"""How the names of the attention implementations begin that take lengths instead of masks."""

FLEX = "flex_attention"

_TAKE_LENGTHS = FLASH, VARLEN


class Documents:
    """Keeps documents apart in the forward of one model.

    Args:
        model: all of it, so before parts are replaced: its modules' Python modules are looked through, once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        rotary_tables_by_document(model)
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        self._takes_lengths = inspect.Parameter.VAR_KEYWORD in kinds
        # Python modules by their names: a copy of the model shall not try to copy them.
        self._masks: list[tuple[str, str, Mask]] = [
            (where, name, value)
            for where in sorted({type(module).__module__ for module in model.modules()})
            for name, value in vars(sys.modules[where]).items()
            if callable(value) and any(value is mask for mask in MASKS)
        ]

    @contextmanager
    def apart(self, position_ids: Tensor) -> Iterator[dict[str, Any]]:
        """Run the model's forward inside this context, with the keyword arguments that it yields.

        The names are replaced in the family's Python modules for this while only, but for all threads.

        Args:
            position_ids: int64 [B, S], which restart at 0 with each document.
        """
        lengths = known_lengths(position_ids)
        for where, name, original in self._masks:
            setattr(sys.modules[where], name, with_positions(original, position_ids))
        try:
            flash = self._takes_lengths and str(self._config._attn_implementation).startswith(_TAKE_LENGTHS)
            with nullcontext() if lengths is None else _found(document_numbers(lengths, position_ids)):
                yield flash_arguments(lengths or document_lengths(position_ids)) if flash else {}
        finally:
            for where, name, original in self._masks:
                setattr(sys.modules[where], name, original)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Run a forward inside this context where no block sees the mask: then nobody looks for documents."""
        with _found(None):
            yield


@contextmanager
def without_kernels(config: PretrainedConfig) -> Iterator[None]:
    """Let a model with flash, varlen or flex attention do without it for a while: on meta their kernels do not run, or
    know no documents.

    Args:
        config: the very one that the model's modules look at.
    """
    implementation = config._attn_implementation
    if str(implementation).startswith((*_TAKE_LENGTHS, FLEX)):
        config._attn_implementation = "eager"  # which every family has
    try:
        yield
    finally:
        config._attn_implementation = implementation


def with_positions(create: Mask, position_ids: Tensor) -> Mask:
    """``create``, called as the family calls it, but with our ``position_ids`` and without a mask that hides nothing.

    Rows hold no padding that must be hidden (what a row is filled up with comes last), so a two-dimensional mask that
    a family makes for itself is all ones. With it transformers would not look for documents.
    """
    signature = inspect.signature(create)

    def create_apart(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given["inputs_embeds"].shape[1] == position_ids.shape[1]:  # not over patches of tokens
            given["position_ids"] = position_ids
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and bool(mask.all()):
                given["attention_mask"] = None
        return create(**given)

    return create_apart


def document_numbers(lengths: DocumentLengths, position_ids: Tensor) -> Tensor | None:
    """The document of each token, counted from 0 in its row: int64 [B, S]; None where no row holds several.

    As transformers' ``find_packed_sequence_indices`` finds it, which asks the device whether there are several.
    """
    return document_begins(position_ids).cumsum(-1) - 1 if lengths.packed else None


@contextmanager
def _found(numbers: Tensor | None) -> Iterator[None]:
    """Within it transformers' mask functions are told the documents of their tokens, instead of finding them."""
    original = masking_utils.find_packed_sequence_indices

    def find(position_ids: Tensor) -> Tensor | None:
        same = numbers is None or numbers.shape == position_ids.shape
        return numbers if same else original(position_ids)

    masking_utils.find_packed_sequence_indices = find
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def flash_arguments(lengths: DocumentLengths) -> dict[str, Any]:
    """Where the documents of a batch lie, by the names of Hugging Face's flash attention."""
    edges, longest = lengths.edges, lengths.longest
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}

"""Where the documents of a micro-batch lie: made on the host with the batch, and known beside its position ids.

Whether there are several documents in a row, and where each begins, could be read off the position ids on a GPU, but
then the host waits for the device, once a micro-batch and stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class DocumentLengths:
    """Of the B * S tokens of a micro-batch, laid end to end.

    Attributes:
        packed: whether a row holds more than one document.
        edges: int32 [documents + 1], where each document begins, and the end of the last.
        longest: tokens of the longest document.
        seeds: of each row, 63 bits: what is drawn for its tokens (`dstrain.model.adapter_dropout`). Empty: nothing is.
    """

    packed: bool
    edges: Tensor
    longest: int
    seeds: tuple[int, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> DocumentLengths:
        """With the tensor changed: moved, or pinned."""
        return replace(self, edges=change(self.edges))


def document_begins(position_ids: Tensor) -> Tensor:
    """Where documents begin: bool [B, S], of int64 [B, S].

    One begins with each row, and wherever a position is not the one before plus 1, as Hugging Face's masks have it.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins


def document_lengths(position_ids: Tensor, seeds: Sequence[int] = ()) -> DocumentLengths:
    """Of int64 [B, S]. On a GPU the host waits for it."""
    begins = document_begins(position_ids)
    places = begins.flatten().nonzero().flatten()
    edges = torch.cat([places, places.new_tensor([begins.numel()])]).to(torch.int32)
    return DocumentLengths(len(places) > len(begins), edges, int(edges.diff().max()), tuple(seeds))


_Key = tuple[StorageWeakRef, int, torch.Size, tuple[int, ...]]
_known: dict[_Key, DocumentLengths] = {}


def note_lengths(position_ids: Tensor, lengths: DocumentLengths | None) -> None:
    """From now on `known_lengths` of this tensor are ``lengths``, which lie on its device, for as long as its memory
    lives. It must not be written to. None: nothing."""
    for key in [key for key in _known if key[0].expired()]:
        del _known[key]
    if lengths is not None:
        _known[_key(position_ids)] = lengths


def known_lengths(position_ids: Tensor) -> DocumentLengths | None:
    """What was noted of this tensor, also by another name of the same memory; None where nobody has."""
    return _known.get(_key(position_ids))


def _key(tensor: Tensor) -> _Key:
    """Autograd and ZeRO-3's hooks hand on another Python object of the same memory."""
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, int(tensor.storage_offset()), tensor.shape, tensor.stride()

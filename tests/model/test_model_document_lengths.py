"""Document lengths that are known on the host: the same masks, and no question to the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils

from dstrain.model import document_lengths as document_lengths_module
from dstrain.model.document_lengths import DocumentLengths, document_lengths, known_lengths, note_lengths
from dstrain.model.document_masks import document_numbers
from dstrain.model.layers import EmbedLayer, HeadLayer
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.host_waits import HostWaits
from tests.support.model_families import tiny

PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
WHOLE = torch.arange(8).expand(2, 8).contiguous()
IDS = torch.arange(16).reshape(2, 8)

rows_of_lengths = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(st.integers(1, size), min_size=1), min_size=1, max_size=4).map(
        lambda rows: [_cut(row, size) for row in rows]
    )
)


def _cut(lengths: list[int], size: int) -> list[int]:
    """Lengths that sum up to the size of a row."""
    found: list[int] = []
    for length in [*lengths, size]:
        found.append(min(length, size - sum(found)))
    return [length for length in found if length]


@given(rows_of_lengths)
def test_lengths_are_those_that_the_rows_were_made_of(rows: list[list[int]]) -> None:
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    found = document_lengths(positions)
    lengths = [length for row in rows for length in row]
    assert found.edges.diff().tolist() == lengths and found.edges[0] == 0 and found.edges.dtype == torch.int32
    assert found.longest == max(lengths) and found.packed == (len(lengths) > len(rows))
    expected = masking_utils.find_packed_sequence_indices(positions)
    numbers = document_numbers(found, positions)
    if expected is None:
        assert numbers is None
    else:
        assert numbers is not None and torch.equal(numbers, expected) and numbers.dtype == expected.dtype


def test_they_are_known_of_the_very_memory_and_forgotten_with_it() -> None:
    positions, lengths = PACKED.clone(), document_lengths(PACKED)
    note_lengths(positions, lengths)
    assert known_lengths(positions) is lengths and known_lengths(positions.detach()) is lengths
    assert known_lengths(positions.clone()) is None and known_lengths(positions[:1]) is None
    note_lengths(positions, None)
    assert known_lengths(positions) is lengths
    for _ in range(100):  # the allocator gives the same memory again
        del positions
        positions = PACKED.clone()
        assert known_lengths(positions) is None
        note_lengths(positions, lengths)
    assert sum(known is lengths for known in document_lengths_module._known.values()) <= 2


def layers(config: Any, **options: Any) -> list[Any]:
    model = PipelineModel(config, seed=0, **options)
    return [model.build(index).train() for index in range(model.num_layers)]


def trained(run: Any, positions: torch.Tensor, lengths: DocumentLengths | None) -> tuple[HostWaits, Any]:
    """Waits and loss of a forward and a backward pass."""
    positions = positions.clone()
    note_lengths(positions, lengths)
    torch.manual_seed(0)
    with HostWaits() as waits:
        loss = run(positions)
        loss.backward()
    return waits, loss.detach()


NAMES = ["llama", "qwen2-sliding", "gemma3_text", "granite", "falcon", "bloom", "opt"]


@pytest.mark.parametrize("positions", [PACKED, WHOLE], ids=["packed", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_no_layer_asks_the_device_where_documents_are(name: str, positions: torch.Tensor) -> None:
    built = layers(tiny(name), attention="auto")
    head = built[-1]
    assert isinstance(built[0], EmbedLayer) and isinstance(head, HeadLayer)
    head.set_loss(None, 4)  # in four chunks, each of which runs the family's forward twice

    def run(places: torch.Tensor) -> torch.Tensor:
        state = (IDS, places)
        with head.asked(target=(IDS, torch.ones(1))):
            for layer in built:
                state = layer(state)
        return state  # type: ignore[return-value]

    asking, expected = trained(run, positions, None)
    waits, loss = trained(run, positions, document_lengths(positions))
    assert torch.equal(loss, expected)
    assert asking.total >= 1, "without them the device is asked"
    assert not waits.seen


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_nor_does_a_model_in_one_piece(name: str) -> None:
    model = UnsplitModel(tiny(name), seed=0)

    def run(places: torch.Tensor) -> torch.Tensor:
        with model.asked(target=(IDS, torch.ones(1))):
            return model((IDS, places))  # type: ignore[no-any-return]

    asking, expected = trained(run, PACKED, None)
    waits, loss = trained(run, PACKED, document_lengths(PACKED))
    assert torch.equal(loss, expected) and asking.total and not waits.seen

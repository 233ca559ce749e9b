"""The data of a run: one source, or several in a mixture, and the validation sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dstrain.data.prepare import PackedData
from dstrain.data.rows.mixture import MixedRows, MixtureOrder, Order, RowsInOrder
from dstrain.data.rows.order import SampleOrder
from dstrain.data.rows.packing import Rows
from dstrain.data.streaming.prepare import StreamedData
from dstrain.data.streaming.rows import StreamRows
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.mixture_shares import MixturePhase


@dataclass(frozen=True)
class ValidationSet:
    """Rows that a validation loss is taken of.

    Attributes:
        name: in metrics; empty for the only one of a single source.
    """

    name: str
    rows: Rows


@dataclass(frozen=True)
class TrainingSource:
    """A source that is trained on.

    Attributes:
        name: in metrics; that of a single source is not asked for.
    """

    name: str
    data: PackedData | StreamedData


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on, and what it evaluates on.

    Attributes:
        sources: at least one.
        phases: their shares of the rows; none for a single source.
        rows: those to train on of all sources, numbered through.
        validation_sets: maybe none.
    """

    sources: tuple[TrainingSource, ...]
    phases: tuple[MixturePhase, ...]
    rows: Rows
    validation_sets: tuple[ValidationSet, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The same for all sources."""
        return self.sources[0].data.tokenizer

    def order(self, global_batch: int, seed: int) -> Order:
        """Which rows each step takes."""
        if not self.phases:
            return (
                RowsInOrder(global_batch) if self.streams else SampleOrder(len(self.rows), global_batch, seed)
            )
        rows = {source.name: len(source.data.train) for source in self.sources}
        streamed = {source.name for source in self.sources if isinstance(source.data, StreamedData)}
        return MixtureOrder(rows, self.phases, global_batch, seed, in_order=streamed)

    @property
    def streams(self) -> dict[int, StreamRows]:
        """The rows of those sources that are streamed, by their numbers."""
        return {
            number: source.data.train
            for number, source in enumerate(self.sources)
            if isinstance(source.data, StreamedData)
        }


def training_data(
    sources: Sequence[TrainingSource],
    validation: Sequence[TrainingSource] = (),
    phases: Sequence[MixturePhase] = (),
) -> TrainingData:
    """Put sources together.

    Args:
        sources: those to train on, each with its share of validation documents, if it has one.
        validation: those whose rows are all for validation.
        phases: none for a single source.
    """
    single = not phases and not validation
    sets = [
        ValidationSet("" if single else source.name, source.data.validation)
        for source in sources
        if source.data.validation is not None
    ]
    sets += [ValidationSet(source.name, source.data.train) for source in validation]
    rows = [source.data.train for source in sources]
    return TrainingData(
        tuple(sources), tuple(phases), MixedRows(rows) if len(rows) > 1 else rows[0], tuple(sets)
    )

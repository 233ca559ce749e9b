"""A model's shape as `dstrain.model.measuring.measure` found it, and which of its parameters are frozen."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.lora import Bits, is_adapter_parameter
from dstrain.planning.layout import Layout

FORMAT = 15


@dataclass(frozen=True)
class Layer:
    """One entry of [embed, block 0, ..., head].

    At a sequence length S a token's forward pass takes ``forward_flops_per_token`` +
    S x ``forward_flops_per_token_and_position`` FLOPs (the second part is attention's), and its backward pass
    needs bytes that are counted likewise, in 16 bits and in fp32: ``saved`` from the forward pass on, and
    ``working`` beside these for a moment. Logits are not among them. ``given_bytes_per_token``: of what the layer
    before hands to it, which it keeps where it is to run again; 0 for the hidden state alone.
    ``tensors`` has the elements of each parameter by its Hugging Face name; 0 under the further names of a
    weight that this layer ties to itself. ``quantized`` has the bytes of those that are quantized, scales included.
    """

    name: str
    kind: str
    parameters: int
    forward_flops_per_token: int
    tensors: dict[str, int] = field(default_factory=dict)
    forward_flops_per_token_and_position: float = 0.0
    saved_bytes_per_token: tuple[int, int] = (0, 0)
    saved_bytes_per_token_and_position: tuple[float, float] = (0.0, 0.0)
    working_bytes_per_token: tuple[int, int] = (0, 0)
    working_bytes_per_token_and_position: tuple[float, float] = (0.0, 0.0)
    given_bytes_per_token: tuple[int, int] = (0, 0)
    quantized: dict[str, int] = field(default_factory=dict)

    @cached_property
    def frozen_by(self) -> dict[tuple[str, ...], frozenset[str]]:
        """What `frozen_names` has found, by its patterns: a search asks a hundred times and more."""
        return {}

    @cached_property
    def adapter_parameters(self) -> int:
        return sum(number for name, number in self.tensors.items() if is_adapter_parameter(name))

    def forward_flops(self, seq_len: int, attended: float = 1.0) -> float:
        """FLOPs of the forward pass of one sample of ``seq_len`` tokens.

        ``attended``: the fraction of the square of positions that attention computes.
        """
        square = attended * self.forward_flops_per_token_and_position
        return seq_len * (self.forward_flops_per_token + seq_len * square)

    def saved_bytes(self, seq_len: int, precision: str) -> int:
        """What the backward pass of one sample of ``seq_len`` tokens needs of the forward pass."""
        column = precision == "fp32"
        square = self.saved_bytes_per_token_and_position[column]
        return round(seq_len * (self.saved_bytes_per_token[column] + seq_len * square))

    def working_bytes(self, seq_len: int, precision: str) -> int:
        """What its forward or backward pass of one sample takes beside that, at its fullest moment."""
        column = precision == "fp32"
        square = self.working_bytes_per_token_and_position[column]
        return round(seq_len * (self.working_bytes_per_token[column] + seq_len * square))


@dataclass(frozen=True)
class Tied:
    """A weight that several layers use; its parameters are counted in each of ``layers``.

    ``names`` are its Hugging Face names in those layers.
    """

    key: str
    parameters: int
    layers: tuple[int, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs to know of a model.

    ``pipeline_refusal`` says why its layers can't be split into stages, or is None. ``dropout`` is the
    largest probability in its config, ``layerdrop`` the one with which it drops whole layers; what an adapter's
    dropout drops depends on the layout if ``adapter_drops_by_layout``. ``router_loss``
    says whether its experts' routers add to the loss. ``packing_leak`` says why documents can't share a sample,
    or is None, ``flash_packing_leak`` the same with flash attention. ``looks_ahead`` says that tokens see those
    after them, or is None, and ``row_leak`` that samples of one micro-batch depend on each other. ``randomness`` has
    what makes training random beside dropout: keys of the config with their values, or nothing where no key turns it
    off; None where nothing does. ``attention_refusals`` says why it can't have an attention implementation, by name.
    ``bits`` says to what its linear layers are quantized, 4bit or 8bit, or is None.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    layers: tuple[Layer, ...]
    tied: tuple[Tied, ...]
    total_parameters: int
    pipeline_refusal: str | None
    dropout: float = 0.0
    packing_leak: str | None = None
    tokenwise_head: bool = True
    flash_packing_leak: str | None = None
    looks_ahead: str | None = None
    row_leak: str | None = None
    randomness: str | None = None
    layerdrop: float = 0.0
    adapter_drops_by_layout: bool = False
    router_loss: bool = False
    attention_refusals: dict[str, str] = field(default_factory=dict)
    bits: Bits | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ModelShape:
        """From the JSON that the measurement wrote. Raises ValueError for another format."""
        if record.get("format") != FORMAT:
            raise ValueError(f"model shape of format {record.get('format')}, expected {FORMAT}")
        return cls(
            model_type=record["model_type"],
            hidden_size=record["hidden_size"],
            vocab_size=record["vocab_size"],
            max_positions=record["max_positions"],
            layers=tuple(
                Layer(
                    name=layer["name"],
                    kind=layer["kind"],
                    parameters=layer["parameters"],
                    forward_flops_per_token=layer["forward_flops_per_token"],
                    tensors=layer["tensors"],
                    forward_flops_per_token_and_position=layer["forward_flops_per_token_and_position"],
                    saved_bytes_per_token=tuple(layer["saved_bytes_per_token"]),
                    saved_bytes_per_token_and_position=tuple(layer["saved_bytes_per_token_and_position"]),
                    working_bytes_per_token=tuple(layer["working_bytes_per_token"]),
                    working_bytes_per_token_and_position=tuple(layer["working_bytes_per_token_and_position"]),
                    given_bytes_per_token=tuple(layer["given_bytes_per_token"]),
                    quantized=layer["quantized"],
                )
                for layer in record["layers"]
            ),
            tied=tuple(
                Tied(
                    key=tied["key"],
                    parameters=tied["parameters"],
                    layers=tuple(tied["layers"]),
                    names=tuple(tied["names"]),
                )
                for tied in record["tied"]
            ),
            total_parameters=record["total_parameters"],
            pipeline_refusal=record["pipeline_refusal"],
            dropout=record["dropout"],
            packing_leak=record["packing_leak"],
            tokenwise_head=record["tokenwise_head"],
            flash_packing_leak=record["flash_packing_leak"],
            looks_ahead=record["looks_ahead"],
            row_leak=record["row_leak"],
            randomness=record["randomness"],
            layerdrop=record["layerdrop"],
            adapter_drops_by_layout=record["adapter_drops_by_layout"],
            router_loss=record["router_loss"],
            attention_refusals=record["attention_refusals"],
            bits=record["bits"],
        )

    @cached_property
    def has_adapters(self) -> bool:
        """Whether adapters are trained in place of the model's own parameters."""
        return self.adapter_parameters > 0

    @cached_property
    def frozen_by(self) -> dict[tuple[str, ...], frozenset[str]]:
        """What `frozen_names` has found, by its patterns: a search asks a hundred times and more."""
        return {}

    @property
    def adapter_parameters(self) -> int:
        return sum(layer.adapter_parameters for layer in self.layers)

    @classmethod
    def read(cls, path: Path) -> ModelShape:
        return cls.from_record(json.loads(path.read_text(encoding="utf-8")))

    def parameters_of(self, chunks: tuple[range, ...]) -> int:
        """Parameters that a rank holds for these layers; a weight that two of them tie counts once."""
        held = [layer for chunk in chunks for layer in chunk]
        own = sum(self.layers[layer].parameters for layer in held)
        doubled = sum(
            tied.parameters * (count - 1)
            for tied in self.tied
            if (count := sum(layer in held for layer in tied.layers)) > 1
        )
        return own - doubled


def describe_randomness(shape: ModelShape) -> str:
    """What makes its training random beside dropout, in a few words."""
    return shape.randomness or "no single value of its config.json turns that off"


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of this Hugging Face name is frozen by this name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_names(shape: ModelShape, patterns: Sequence[str]) -> frozenset[str]:
    """The names of all frozen parameters. A tied weight has several: frozen by one, it is frozen by all.

    Of a model with adapters nothing else is trained.
    """
    key = tuple(patterns)
    if key not in shape.frozen_by:
        shape.frozen_by[key] = frozenset(_frozen_names(shape, key))
    return shape.frozen_by[key]


def _frozen_names(shape: ModelShape, patterns: Sequence[str]) -> set[str]:
    if not patterns and not shape.has_adapters:
        return set()
    names = (name for layer in shape.layers for name in layer.tensors)
    frozen = {
        name
        for name in names
        if is_frozen(name, patterns) or (shape.has_adapters and not is_adapter_parameter(name))
    }
    for tied in shape.tied:
        if not frozen.isdisjoint(tied.names):
            frozen.update(tied.names)
    return frozen


def check_frozen(resolved: ResolvedConfig, shape: ModelShape, layout: Layout) -> None:
    """Refuse a pattern that freezes nothing, and a stage that would have nothing to train.

    Raises DstrainError.
    """
    names = [name for layer in shape.layers for name in layer.tensors]
    where = str(resolved.origin("adapter" if shape.has_adapters else "freeze"))
    if shape.has_adapters and resolved.config.freeze:
        raise DstrainError(
            "a run with an adapter trains none of the model's own weights: there is nothing else to freeze",
            where=str(resolved.origin("freeze")),
            hint="remove freeze; adapter.exclude leaves modules without an adapter",
        )
    less = "adapter.targets: all-linear" if shape.has_adapters else "freeze less"
    for pattern in resolved.config.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise DstrainError(
                f"no parameter of {shape.model_type} matches {pattern!r}",
                where=where,
                hint=f"names look like {near[0] if near else names[0]}; * matches anything",
            )
    frozen = frozen_names(shape, resolved.config.freeze)
    for stage in range(layout.pipeline):
        held = [
            name for chunk in layout.chunks(stage) for layer in chunk for name in shape.layers[layer].tensors
        ]
        if held and frozen.issuperset(held):
            raise DstrainError(
                f"stage {stage} would have only frozen parameters, and DeepSpeed needs a trainable one on each stage",
                where=where,
                hint=f"fewer --pipeline stages, so that each has a trainable layer, or {less}",
            )
    # No gradient arrives at what comes first from anywhere else. With DualPipeV the same rank has the last layers too.
    first = [name for layer in layout.chunks(0)[0] for name in shape.layers[layer].tensors]
    if layout.pipeline > 1 and first and frozen.issuperset(first):
        raise DstrainError(
            "the first layers of stage 0 would have only frozen parameters, and the schedule"
            f" {layout.schedule} computes their gradients apart from those of its last layers",
            where=where,
            hint=f"--schedule 1f1b, fewer --pipeline stages, or {less}",
        )

"""Estimates activation memory: what forward passes save, temporary memory, and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from dstrain.config.schema import RunConfig
from dstrain.estimate.memory_backward import Pass, left_at, passed_layers
from dstrain.estimate.stage_parameters import trained_of_layers, weight_bytes
from dstrain.losses import COPIES, loss_facts
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import loss_chunk
from dstrain.planning.layout import Layout
from dstrain.planning.model_shape import Layer, ModelShape, frozen_names
from dstrain.planning.schedules.messages import FEWEST_UNDER_WAY

LOSS_PIECE = 1 << 24
"""Logits that the loss function has in fp32 at a time, as a number of elements: ``PIECE`` in dstrain.model.loss."""

MASKS_HELD = 2
"""Micro-batches whose mask a stage holds, between steps too: ``ArgumentsCache.SIZE`` in dstrain.model.layers."""


@dataclass(frozen=True)
class StageActivations:
    """Bytes on a rank of one stage.

    Attributes:
        kept: of all micro-batches in flight.
        waiting: of those that are still in flight when a backward pass has ended, while more are to come.
        outputs: what waits on one micro-batch's way back for the end of its backward pass.
        passes: a micro-batch's backward pass over each chunk.
        working: of the passes of one layer beside these, recomputation included.
        loss: logits, softmax and their gradients; 0 without the head.
        head: what the head keeps of a micro-batch, which is alive while the loss is computed.
        summed: gradients of the head's weight that are summed, chunk by chunk.
        pipeline: buffers to receive into, and what was received and stays.
        received: what was received of the micro-batches in flight.
        masks: what keeps packed documents apart, as the blocks are given it; there all the time.
    """

    kept: int
    waiting: int
    outputs: int
    passes: tuple[Pass, ...]
    working: int
    loss: int
    head: int
    summed: int
    pipeline: int
    received: int
    masks: int

    @property
    def fullest(self) -> int:
        return self.kept + max(self.working, self.head)

    def at_bucket(self, elements: int) -> int:
        """What is there when a bucket of so many gradients is full in a backward pass; else at the pass's end."""
        left = max(left_at(layers, elements) for layers in self.passes)
        return self.waiting + left + (self.outputs if left else 0)


PUT_OFF = {4: 0.8, 2: 0.66}
"""What a block keeps while only its weights' gradients wait (inputs of its linear layers, gradients of their outputs),
over what it keeps for its whole backward pass, by the bytes of an element. Measured on blocks of Llama."""
_COMING = 0.2
"""The gradients that come to a block's linear layers in the first part of its backward pass, over the same."""


def put_off(pipeline: int, stage: int, accumulation: int) -> int:
    """For how many micro-batches the gradients of the weights wait on a stage of zb-h1, at the fullest moment."""
    return min(stage, accumulation - min(pipeline - stage, accumulation))


@cache
def micro_batches_in_flight(pipeline: int, schedule: str, accumulation: int) -> tuple[float, ...]:
    """How many micro-batches each stage keeps activations of, for each of its chunks.

    1f1b: stage i has started pipeline - i of them before it ends the first one. zb-h1: and the
    gradients of the weights of i more of them wait. dualpipev: 2 x pipeline + 1 chunks'
    worth on every rank, which holds two.

    Source: Narayanan et al. 2021, section 2.2; DeepSeek's DualPipe, table of its README.
    """
    if schedule == "dualpipev" and pipeline > 1:
        return tuple(min(pipeline + 0.5, accumulation) for _ in range(pipeline))
    if schedule == "zb-h1":
        share = sum(PUT_OFF.values()) / len(PUT_OFF)
        return tuple(
            min(pipeline - stage, accumulation) + share * put_off(pipeline, stage, accumulation)
            for stage in range(pipeline)
        )
    return tuple(float(min(pipeline - stage, accumulation)) for stage in range(pipeline))


def spans_in_flight(layout: Layout, stage: int, accumulation: int) -> tuple[int, ...]:
    """The same for each chunk of a stage by itself: with dualpipev more of those that were begun first."""
    if layout.schedule == "dualpipev" and layout.pipeline > 1:
        return (min(2 * layout.pipeline - stage, accumulation), min(stage + 1, accumulation))
    return (min(layout.pipeline - stage, accumulation),)


def hidden_bytes(config: RunConfig, shape: ModelShape, micro_batch: int) -> int:
    """Bytes of one micro-batch's hidden state."""
    return micro_batch * config.seq_len * shape.hidden_size * (4 if config.precision == "fp32" else 2)


def has_mask(config: RunConfig, layer: Layer) -> bool:
    """Whether a layer attends through sdpa with a mask: only packed documents need one.

    Flash attention takes none; eager attention, which has the square of scores among its bytes, keeps none.
    A sliding window's own mask is not counted.
    """
    return (
        config.pack
        and config.attention in ("auto", "sdpa")
        and layer.forward_flops_per_token_and_position > 0
        and not any(layer.saved_bytes_per_token_and_position)
    )


def layer_mask(config: RunConfig, layer: Layer, micro_batch: int) -> int:
    """What a layer keeps of the mask beside its saved bytes.

    Each call of torch's scaled_dot_product_attention converts the boolean mask to the precision that is computed
    with, and autograd keeps what comes of it.
    """
    width = 4 if config.precision == "fp32" else 2
    return width * micro_batch * config.seq_len**2 * has_mask(config, layer)


def masks_held(config: RunConfig, layers: Iterable[Layer], micro_batch: int) -> int:
    """The boolean masks that a stage with these layers holds: one for all of them, of each of a few micro-batches."""
    return MASKS_HELD * micro_batch * config.seq_len**2 * any(has_mask(config, layer) for layer in layers)


def layer_kept(config: RunConfig, layer: Layer, micro_batch: int, hidden: int) -> int:
    """What a layer keeps of a micro-batch in flight."""
    if config.activation_checkpointing and layer.kind == "block":
        given = layer.given_bytes_per_token[config.precision == "fp32"]
        return micro_batch * config.seq_len * given or hidden
    saved = micro_batch * layer.saved_bytes(config.seq_len, config.precision)
    return saved + layer_mask(config, layer, micro_batch)


def layer_working(config: RunConfig, layer: Layer, micro_batch: int) -> int:
    """What a layer's passes take beside what it keeps; with recomputation all that it would have kept.

    A quantized weight is unpacked while it is used.
    """
    working = micro_batch * layer.working_bytes(config.seq_len, config.precision)
    if config.activation_checkpointing and layer.kind == "block":
        working += micro_batch * layer.saved_bytes(config.seq_len, config.precision)
        working += layer_mask(config, layer, micro_batch)
    unpacked = max((layer.tensors[name] for name in layer.quantized), default=0)
    return max(0, working) + weight_bytes(config) * unpacked


def loss_rows(config: RunConfig, shape: ModelShape, micro_batch: int) -> int:
    """Tokens whose logits are there at a time."""
    tokens = micro_batch * config.seq_len
    chunk = loss_chunk(micro_batch, config.seq_len, shape.vocab_size, tokenwise=shape.tokenwise_head)
    return min(tokens, chunk or tokens)


def gradient_parts(config: RunConfig) -> int:
    """Bytes of each element of the head's gradient where it is the sum of several chunks'.

    Autograd adds the second to the first in a new tensor, since the first is a view of what a matrix multiplication has
    made, and the others in place. ZeRO-3's own multiplication makes no view.

    Source: ``accumulate`` in torch/csrc/autograd/input_buffer.cpp.
    """
    return (2 if config.zero == 3 else 3) * weight_bytes(config)


def loss_bytes(config: RunConfig, shape: ModelShape, micro_batch: int) -> int:
    """Logits and their gradient in the precision that is computed with, and three pieces of them in fp32.

    The pieces are the softmax, its product with the scale, and what is put into the gradient; see dstrain.model.loss.
    With chunks this is of one chunk at a time. A loss that does not work in pieces lets go of the logits, and has
    `dstrain.losses.COPIES` of all of them in fp32.
    """
    rows = loss_rows(config, shape, micro_batch)
    if not loss_facts(config.loss).in_pieces:
        return shape.vocab_size * COPIES * 4 * rows
    weight = 4 if config.precision == "fp32" else 2
    piece = min(rows, max(1, LOSS_PIECE // shape.vocab_size))
    return shape.vocab_size * (2 * weight * rows + 3 * 4 * piece)


def stage_activations(
    config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, stage: int
) -> StageActivations:
    """Of one stage, for its layers and its place in the schedule."""
    micro_batch = batch.micro_batch
    hidden = hidden_bytes(config, shape, micro_batch)
    frozen = frozen_layers(shape, config.freeze) if layout.chunks(stage)[0].start == 0 else 0
    kept = waiting = outputs = working = head = summed = 0
    passes = []
    flights = spans_in_flight(layout, stage, batch.accumulation)
    for chunk, flying in zip(layout.chunks(stage), flights, strict=True):
        of_one = output = 0
        of_layers, working_of = dict[int, int](), dict[int, int]()
        for index in chunk:
            layer = shape.layers[index]
            if index < frozen:  # nothing before it is trained: no backward pass comes here
                continue
            own = layer_kept(config, layer, micro_batch, hidden)
            if layer.kind == "head":
                head = own + layer_working(config, layer, micro_batch)
                rows, tokens = loss_rows(config, shape, micro_batch), micro_batch * config.seq_len
                if rows < tokens:  # chunk by chunk; their gradients meet in that of the hidden state
                    head = head * rows // tokens + 2 * hidden
                    summed = gradient_parts(config) * trained_of_layers(shape, chunk, config.freeze)[index][1]
                of_layers[index], working_of[index] = 0, head
            else:
                of_one += own
                of_layers[index], working_of[index] = own, layer_working(config, layer, micro_batch)
                working = max(working, working_of[index])
        turns = (
            layout.schedule == "dualpipev"
            and stage == layout.pipeline - 1
            and chunk.start < layout.chunks(stage)[-1].start
        )
        if layout.schedule == "dualpipev" and chunk.stop < len(shape.layers) and not turns:
            output = hidden  # waits for its gradient
        kept += flying * (of_one + output)
        waiting += (flying - 1) * (of_one + output)
        outputs = max(outputs, output)
        passes.append(passed_layers(shape, chunk, config.freeze, of_layers, working_of))
    if layout.schedule == "zb-h1":
        later, coming = _put_off(config, shape, layout, batch, stage)
        kept, waiting, working = kept + later, waiting + later, working + coming
    passing = _passing(config, layout, batch, stage) * hidden
    held = any(chunk.stop == len(shape.layers) for chunk in layout.chunks(stage))
    return StageActivations(
        kept=kept + passing,
        waiting=waiting + passing,
        outputs=outputs,
        passes=tuple(passes),
        working=working,
        loss=loss_bytes(config, shape, micro_batch) if held else 0,
        head=head,
        summed=summed,
        pipeline=_pipeline_buffers(layout, stage) * hidden,
        received=(flights[0] + 1)
        * hidden
        * (0 < stage < layout.pipeline - 1)
        * (layout.schedule == "dualpipev"),
        masks=masks_held(
            config, (shape.layers[i] for chunk in layout.chunks(stage) for i in chunk), micro_batch
        ),
    )


def frozen_layers(shape: ModelShape, patterns: Sequence[str]) -> int:
    """How many layers from the first one on are frozen as a whole."""
    if not patterns and not shape.has_adapters:
        return 0
    frozen = frozen_names(shape, patterns)
    for index, layer in enumerate(shape.layers):
        if not frozen.issuperset(layer.tensors):
            return index
    return len(shape.layers)


RECEIVED_AHEAD = 2
"""Receives that a rank has posted beyond the one it waits for: ``AHEAD`` in dstrain.engine.pipeline_messages."""


def _put_off(
    config: RunConfig, shape: ModelShape, layout: Layout, batch: Batch, stage: int
) -> tuple[int, int]:
    """Bytes that wait for the gradients of the weights, and what comes to a block meanwhile.

    Recomputed blocks of the micro-batch that runs backward wait until the last of them is there.
    """
    width = 4 if config.precision == "fp32" else 2
    blocks = [
        batch.micro_batch * layer.saved_bytes(config.seq_len, config.precision)
        for layer in (shape.layers[index] for chunk in layout.chunks(stage) for index in chunk)
        if layer.kind == "block"
    ]
    largest = max(blocks, default=0)
    bytes_waiting = put_off(layout.pipeline, stage, batch.accumulation) * sum(blocks)
    if config.activation_checkpointing:
        bytes_waiting += sum(blocks) - largest
    return round(PUT_OFF[width] * bytes_waiting), round(_COMING * largest)


def _passing(config: RunConfig, layout: Layout, batch: Batch, stage: int) -> int:
    """How many hidden states, and gradients of them, are on their way to and from a stage in the midst of a step.

    What it has received for a forward pass is part of what its layers keep.
    """
    if layout.pipeline == 1 or layout.schedule == "dualpipev":
        return 0
    m, flying = batch.accumulation, min(layout.pipeline - stage, batch.accumulation)
    found = 0
    if stage > 0:
        found += min(RECEIVED_AHEAD, m - flying)
    if stage < layout.pipeline - 1:
        # Blocks that are computed again are fullest later, when one send has arrived.
        found += min(FEWEST_UNDER_WAY, flying) - config.activation_checkpointing + min(RECEIVED_AHEAD, m)
    return found


def _pipeline_buffers(layout: Layout, stage: int) -> int:
    """How many hidden states a stage holds all the time.

    Source: dualpipev.py, for the two directions of that schedule. The others hold none between steps.
    """
    return 3 if layout.pipeline > 1 and layout.schedule == "dualpipev" else 0

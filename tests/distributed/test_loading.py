"""Pretrained weights in a world of ranks: what each holds and what it costs, and the same training in every layout."""

from __future__ import annotations

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed.compare import assert_equal
from tests.support.distributed.training import Case, Outcome, make_case_plan, train_in_layout
from tests.support.distributed.workers import run
from tests.support.sampling import full

CUT = (0, 4, 9, 14, 18)
"""Of the big model, in four stages of 270 to 280 MB."""


def big_config() -> Any:
    """Of 551 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )


def write_big(rank: int, folder: str) -> int:
    """A random bf16 checkpoint in shards of one layer each; how many parameters it has."""
    from safetensors.torch import save_file

    from dstrain.model.pipeline_model import PipelineModel

    config = big_config()
    config.save_pretrained(folder)
    index: dict[str, str] = {}
    total = 0
    shapes = PipelineModel(config, seed=0)
    # Bits of numbers below 2.0; each tensor starts elsewhere in them.
    random = (torch.randint(0, 1 << 14, (1 << 22,), dtype=torch.int16)).view(torch.bfloat16)
    for number in range(shapes.num_layers):
        tensors = {
            f"{path}.{name}": random.roll(number)
            .repeat(-(-value.numel() // random.numel()))[: value.numel()]
            .view(value.shape)
            .clone()
            for path, module in shapes._structure.layer_modules(number).items()
            for name, value in module.named_parameters()
        }
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, Path(folder) / file)
        index |= dict.fromkeys(tensors, file)
        total += sum(value.numel() for value in tensors.values())
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def peak() -> int:
    """The most host memory that this process has ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load_stage(rank: int, folder: str) -> tuple[int, int, int]:
    """Peak before and after this rank has loaded its stage, and the stage's bytes."""
    from dstrain.model.pipeline_model import PipelineModel
    from dstrain.model.weights.pretrained import PretrainedWeights

    before = peak()
    model = PipelineModel(
        big_config(), seed=0, dtype=torch.bfloat16, weights=PretrainedWeights(folder), attention="sdpa"
    )
    layers = [model.build(index) for index in range(CUT[rank], CUT[rank + 1])]
    return before, peak(), sum(value.nbytes for layer in layers for value in layer.parameters())


@pytest.fixture(scope="module")
def big() -> Iterator[tuple[str, int]]:
    """The folder of the big checkpoint, and its parameters. Not in pytest's folder, which would keep a gigabyte."""
    with tempfile.TemporaryDirectory() as folder:
        [total] = run(1, write_big, folder)
        assert total > 500_000_000
        yield folder, total


def test_a_rank_s_memory_is_its_stage(big: tuple[str, int]) -> None:
    """33 MB of it are code and tables that the interpreter touches for the first time."""
    folder, total = big
    ranks = run(4, load_stage, folder)
    assert sum(stage for _, _, stage in ranks) == 2 * total
    for rank, (before, after, stage) in enumerate(ranks):
        print(f"rank {rank}: {before / 1e6:.0f} MB before, {after / 1e6:.0f} after, stage {stage / 1e6:.0f}")
        assert after - before <= 1.15 * stage, f"rank {rank}"


def shard_out(rank: int, folder: str, pipelines: bool) -> tuple[int, int, int, int]:
    """Peak before, after each process has its share of the whole model; the share's bytes and the largest layer's."""
    from dstrain.engine.build import start_communication
    from dstrain.engine.pipeline_module import SingleStageModel
    from dstrain.engine.zero3 import zero3_init
    from dstrain.model.pipeline_model import PipelineModel
    from dstrain.model.unsplit_model import UnsplitModel
    from dstrain.model.weights.pretrained import PretrainedWeights

    start_communication()
    case = Case(zero=3, data_parallel=4, precision="bf16")
    share_out = zero3_init(make_case_plan(case).deepspeed)
    options = {"seed": 0, "dtype": torch.bfloat16, "weights": PretrainedWeights(folder)}
    before = peak()
    if pipelines:
        pipeline_model = PipelineModel(big_config(), **options)
        pipeline_model.after_build = share_out
        module: Any = SingleStageModel(pipeline_model, activation_checkpointing=False)
    else:
        module = UnsplitModel(big_config(), after_build=share_out, **options)
    held = sum(value.ds_tensor.nbytes for value in module.parameters())
    return before, peak(), held, 32_000 * 1536 * 2


@pytest.mark.parametrize("pipelines", [True, False], ids=["in-layers", "in-one-piece"])
def test_with_zero_3_no_rank_holds_the_whole_model(pipelines: bool, big: tuple[str, int]) -> None:
    """Each process holds its share, and one layer at a time."""
    folder, total = big
    for before, after, share, layer in run(4, shard_out, folder, pipelines):
        print(
            f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} after, share {share / 1e6:.0f}, of {2 * total / 1e6:.0f}"
        )
        assert share == pytest.approx(2 * total / 4, rel=0.01)
        assert after - before <= 1.15 * share + 2 * layer < 2 * total


def write_seeded(rank: int, folder: str, case: Case) -> None:
    """The weights that the seed gives, as Hugging Face saves them."""
    from tests.support.distributed.yardsticks import _hugging_face_model

    _hugging_face_model(case).save_pretrained(folder, max_shard_size="20KB")


def train_pretrained(rank: int, case: Case, folder: str) -> Outcome:
    """As ``train_in_layout``, but every weight comes from the folder."""
    from dstrain.model import pipeline_model
    from dstrain.model.weights.pretrained import PretrainedWeights

    original = pipeline_model.PipelineModel
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def from_folder(config: Any, **options: Any) -> Any:
        options |= {"seed": 99, "weights": PretrainedWeights(folder), "dtype": types[case.precision]}
        return original(config, **options)

    pipeline_model.PipelineModel = from_folder  # type: ignore[assignment,misc]
    return train_in_layout(rank, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(zero=2, pipeline=4, precision="bf16", steps=4),
        Case(zero=3, pipeline=2, data_parallel=2, steps=4),
        *full(
            Case(zero=1, pipeline=2, data_parallel=2, steps=4),
            Case(zero=3, data_parallel=2, precision="bf16", steps=4),
        ),
    ],
    ids=str,
)
def test_training_from_a_folder_is_training_from_the_same_weights(case: Case, tmp_path: Path) -> None:
    """To the bit; in 16 bits the weights are rounded once, when they are read."""
    run(1, write_seeded, str(tmp_path), case)
    drawn = run(case.world_size, train_in_layout, case)
    loaded = run(case.world_size, train_pretrained, case, str(tmp_path))
    for a, b in zip(drawn, loaded, strict=True):
        assert (a.losses, a.norms, a.validation) == (b.losses, b.norms, b.validation)
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def train_in_one_piece(rank: int, case: Case, folder: str) -> Outcome:
    """Through the model that families get which can't be split; from the folder, block by block."""
    from dstrain.engine.zero3 import zero3_init
    from dstrain.model import pipeline_model
    from dstrain.model.unsplit_model import UnsplitModel
    from dstrain.model.weights.pretrained import PretrainedWeights

    def whole(config: Any, **options: Any) -> Any:
        share_out = zero3_init(make_case_plan(case).deepspeed)
        return UnsplitModel(config, seed=99, weights=PretrainedWeights(folder), after_build=share_out)

    pipeline_model.PipelineModel = whole  # type: ignore[assignment,misc]
    return train_in_layout(rank, case)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_model_in_one_piece_trains_as_the_plain_loop(zero: int, tmp_path: Path) -> None:
    case = Case(zero=zero, data_parallel=2)
    run(1, write_seeded, str(tmp_path), case)
    assert_equal(case, run(2, train_in_one_piece, case, str(tmp_path)))

"""From trained ranks to a folder and back through from_pretrained: the same bits, for families that convert."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dstrain.errors import DstrainError
from tests.support.distributed import training
from tests.support.distributed.training import Case
from tests.support.distributed.workers import run

SHORT = Case(steps=2, optimizer="sgd")
# As a family is trained that can't be cut into layers: its parameters have no layer's number in front.
IN_ONE_PIECE = "llama in one piece"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def family_config(family: str, case: Case) -> Any:
    """A small model of the family, over the vocabulary of the training."""
    import transformers

    sizes = {
        "vocab_size": training.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": case.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**sizes, **experts, num_experts=4)
    if family == "deepseek_v3":
        latent = {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
        return transformers.DeepseekV3Config(**sizes, **experts, **latent, **routed)
    return transformers.LlamaConfig(**sizes)


def train_family(rank: int, family: str, case: Case, folder: str) -> dict[str, torch.Tensor]:
    """Train and save; this rank's live weights. A router's correction gets values, as a pretrained one has."""
    from dstrain.model import pipeline_model
    from dstrain.model.unsplit_model import UnsplitModel

    training.model_config = lambda case: family_config(family, case)
    build = training.build_case_engine
    if family == IN_ONE_PIECE:
        pipeline_model.PipelineModel = UnsplitModel

    def with_corrections(case: Case) -> Any:
        engine, plan = build(case)
        for name, buffer in engine.engine.module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.arange(buffer.numel()) / 64)
        return engine, plan

    training.build_case_engine = with_corrections
    return training.train_in_layout(rank, case, folder).weights


@pytest.mark.parametrize(
    ("family", "case", "dtype"),
    [
        ("qwen3_moe", replace(SHORT, zero=2, pipeline=2, data_parallel=2, tied=True), "fp32"),
        ("qwen3_moe", replace(SHORT, zero=3, pipeline=2, precision="bf16", tied=False), "bf16"),
        ("deepseek_v3", replace(SHORT, zero=1, pipeline=2, precision="bf16", tied=False), "fp32"),
        ("deepseek_v3", replace(SHORT, zero=3, data_parallel=2, tied=True), "fp32"),
        ("llama", replace(SHORT, zero=1, pipeline=2, schedule="dualpipev", precision="fp16"), "bf16"),
        (IN_ONE_PIECE, replace(SHORT, zero=0), "fp32"),
        (IN_ONE_PIECE, replace(SHORT, zero=3, data_parallel=2, precision="bf16"), "fp32"),
    ],
    ids=str,
)
def test_from_pretrained_gives_the_trained_weights(
    family: str, case: Case, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstrain.engine.checkpoint_state import MASTER, SavedState
    from dstrain.exporting import writing
    from dstrain.exporting.checking import check_files, check_loaded, load_exported
    from dstrain.exporting.writing import ExportedTensors

    monkeypatch.setattr(writing, "LARGEST_FILE", 40_000)  # several files
    ranks = run(case.world_size, train_family, family, case, str(tmp_path / "saved"))
    live = {name: value for weights in ranks for name, value in weights.items()}
    config = family_config(family, case)
    state = SavedState(tmp_path / "saved")
    tensors = ExportedTensors(state, config, DTYPES[dtype])
    out = tmp_path / "out"
    out.mkdir()
    files = writing.write_weights(tensors, out)
    assert len(files) > 1
    config.architectures = [tensors.architecture]
    config.save_pretrained(out)
    check_files(out, files, tensors)

    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == set(files) == {path.name for path in out.glob("*.safetensors")}
    assert ("lm_head.weight" in index) == (not case.tied), "a tied weight is written once"
    if "llama" not in family:
        assert any(".experts.3.gate_proj.weight" in name for name in index), "experts lie on disk one by one"

    loaded = load_exported(out, DTYPES[dtype], "auto")
    check_loaded(loaded, tensors)
    found = loaded.state_dict()
    assert live.keys() == dict(loaded.named_parameters(remove_duplicate=False)).keys()
    for name, value in live.items():
        if dtype in ("fp32", case.precision):
            # What a rank computes with is the fp32 weight rounded to its precision.
            assert torch.equal(found[name].to(DTYPES[case.precision]).float(), value), name
        if dtype != case.precision:
            master = state.parameters[name].states[MASTER].read()
            assert torch.equal(found[name], master.to(DTYPES[dtype])), name
    corrections = [name for name in found if name.endswith("e_score_correction_bias")]
    assert len(corrections) == (case.layers - 1 if family == "deepseek_v3" else 0)
    for name in corrections:
        assert torch.equal(found[name], torch.arange(4) / 64), name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, exported folder) of a small llama in one file."""
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting.writing import ExportedTensors, write_weights

    place = tmp_path_factory.mktemp("exported")
    case = replace(SHORT, zero=1)
    run(1, train_family, "llama", case, str(place / "saved"))
    (place / "out").mkdir()
    tensors = ExportedTensors(SavedState(place / "saved"), family_config("llama", case), torch.float32)
    write_weights(tensors, place / "out")
    family_config("llama", case).save_pretrained(place / "out")
    return place / "saved", place / "out"


def test_a_changed_bit_is_found(exported: tuple[Path, Path]) -> None:
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting.checking import check_files
    from dstrain.exporting.writing import ExportedTensors

    saved, out = exported
    tensors = ExportedTensors(SavedState(saved), family_config("llama", SHORT), torch.float32)
    path = out / "model.safetensors"
    check_files(out, [path.name], tensors)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == len(tensors.files)
    with pytest.raises(DstrainError, match="differs from the checkpoint") as caught:
        check_files(out, [path.name], tensors)
    assert caught.value.exit_code == 1


def test_a_checkpoint_of_another_model_is_refused(exported: tuple[Path, Path]) -> None:
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting.writing import ExportedTensors

    state = SavedState(exported[0])
    with pytest.raises(DstrainError, match=r"model\.layers\.4\..* and in the checkpoint it is missing"):
        ExportedTensors(state, family_config("llama", replace(SHORT, layers=5)), torch.float32)


def test_a_weight_beyond_fp16_is_refused(
    exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstrain.engine.checkpoint_files import SavedTensor
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting.writing import ExportedTensors

    tensors = ExportedTensors(SavedState(exported[0]), family_config("llama", SHORT), torch.float16)
    assert tensors.value("model.norm.weight").dtype == torch.float16
    read = SavedTensor.read
    monkeypatch.setattr(SavedTensor, "read", lambda self: read(self) * 1e6)
    with pytest.raises(DstrainError, match="the largest fp16 value is 65504"):
        tensors.value("model.norm.weight")


def test_an_adapters_weight_beyond_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstrain.engine.checkpoint_files import SavedTensor
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting.adapter_folder import ExportedAdapter

    run(1, training.train_in_layout, replace(SHORT, zero=1, adapter="lora"), str(tmp_path))
    adapter = ExportedAdapter(SavedState(tmp_path), torch.float16)
    name = next(name for name in adapter.files if name.endswith(".lora_A.weight"))
    assert adapter.value(name).dtype == torch.float16
    read = SavedTensor.read
    monkeypatch.setattr(SavedTensor, "read", lambda self: read(self) * 1e6)
    with pytest.raises(DstrainError, match=r"lora_A\.weight contains .* the largest fp16 value is 65504"):
        adapter.value(name)


def test_a_full_disk_is_said_before_and_while_writing(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstrain.engine.checkpoint_state import SavedState
    from dstrain.exporting import writing
    from dstrain.exporting.writing import ExportedTensors

    with pytest.raises(DstrainError, match=r"needs 1,000,000,000\.0 GB"):
        writing.refuse_full_disk(tmp_path, 10**18)
    writing.refuse_full_disk(tmp_path, 0)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    tensors = ExportedTensors(SavedState(exported[0]), family_config("llama", SHORT), torch.float32)
    with pytest.raises(DstrainError, match="No space left on device"):
        writing.write_weights(tensors, tmp_path)

"""Packed documents: which families keep them apart, by themselves or mended, and that the check finds the others."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils

from dstrain.errors import DstrainError
from dstrain.model.capability import independence, trial_model
from dstrain.model.capability.independence import judge_packing, packing_leaks
from dstrain.model.capability.small_model import small_family
from dstrain.model.document_lengths import document_lengths
from dstrain.model.document_masks import Documents, flash_arguments
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import tiny

LENGTHS = 9, 7, 6
IDS = torch.randint(3, 99, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).repeat(2, 1)

BY_ITSELF = [
    "llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3",
    "granite", "phi3", "cohere2", "olmo2", "glm4", "llama4_text", "smollm3", "gpt_neox",
]  # fmt: skip
MENDED = [
    "afmoe", "bert", "bert-generation", "biogpt", "bloom", "camembert", "data2vec-text", "electra", "ernie",
    "falcon", "gpt_oss", "megatron-bert", "mpt", "opt", "rembert", "roberta", "roc_bert", "xglm",
    "xlm-roberta", "xmod",
]  # fmt: skip
LEAKING = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2",
    "deepseek_v4", "blt",
]  # fmt: skip
OWN_POSITIONS = "roformer", "trocr"
LOOKING_AHEAD = "big_bird", "cpmant", "xlm", "xlnet"
NO_FLASH = "bloom", "mpt", "xglm", "llama4_text", "megatron-bert", "rembert"
"""Families without flash attention in transformers, among those above."""
NO_LENGTHS = "nemotron", "stablelm", "gptj", "gpt_neo"
"""Families that do not hand on to flash attention where documents begin."""


def family(name: str) -> PretrainedConfig:
    return small_family(CONFIG_MAPPING[name])


@contextlib.contextmanager
def without_the_mend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("dstrain.model.document_masks.with_positions", lambda create, position_ids: create)
        yield


class TestJudgement:
    @pytest.mark.parametrize("name", BY_ITSELF)
    def test_families_that_need_no_mend(self, name, monkeypatch):
        assert judge_packing(family(name)).leak is None
        with without_the_mend(monkeypatch):
            assert judge_packing(family(name)).leak is None

    @pytest.mark.parametrize("name", MENDED)
    def test_families_that_leak_without_the_mend(self, name, monkeypatch):
        assert judge_packing(family(name)).leak is None
        with without_the_mend(monkeypatch):
            leak = judge_packing(family(name)).leak
        assert leak and "see the ones before it" in leak

    @pytest.mark.parametrize("name", LEAKING)
    def test_families_that_leak(self, name):
        found = judge_packing(family(name))
        assert found.leak and "see the ones before it" in found.leak
        assert found.looks_ahead is None  # so one document in a row with padding behind it is right

    @pytest.mark.parametrize("name", OWN_POSITIONS)
    def test_families_whose_positions_do_not_restart(self, name):
        leak = judge_packing(family(name)).leak
        assert leak and "positions do not restart" in leak

    @pytest.mark.parametrize("name", LOOKING_AHEAD)
    def test_families_that_look_ahead(self, name):
        found = judge_packing(family(name)).looks_ahead
        assert found and found.startswith(f"{name} lets a token see the ones after it")

    def test_an_encoder_looks_ahead_and_as_a_decoder_does_not(self):
        config = family("bert")
        assert judge_packing(config).looks_ahead is None
        config.is_decoder = False
        assert judge_packing(config).looks_ahead

    @pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "opt", *NO_FLASH, *NO_LENGTHS])
    def test_flash_attention(self, name):
        found = judge_packing(family(name))
        assert found.leak is None
        if name in NO_FLASH:
            assert found.flash_leak == f"{name} has no flash attention in transformers"
        elif name in NO_LENGTHS:
            assert found.flash_leak and "is not told where documents begin" in found.flash_leak
        else:
            assert found.flash_leak is None

    def test_what_cannot_be_tried_is_no_clean_bill(self, monkeypatch):
        def breaks(*_: Any) -> None:
            raise DstrainError("broken")

        monkeypatch.setattr(UnsplitModel, "forward", breaks)
        assert "could not be tried" in (packing_leaks(tiny("llama")) or "")

    def test_logits_that_are_no_numbers_are_no_clean_bill(self, monkeypatch):
        monkeypatch.setattr(independence, "_distance", lambda one, other: float("nan"))
        assert packing_leaks(tiny("llama"))

    def test_the_size_of_the_model_does_not_matter(self):
        config = tiny("llama", vocab_size=1_000_000, pad_token_id=999_999, num_hidden_layers=80)
        config.hidden_size, config.intermediate_size = 8192, 28672
        assert packing_leaks(config) is None

    def test_where_no_small_model_can_be_made_two_blocks_are_tried(self, monkeypatch):
        def refuses(config: PretrainedConfig) -> None:
            raise DstrainError("no")

        monkeypatch.setattr(trial_model, "small_config", refuses)
        assert packing_leaks(tiny("llama")) is None
        monkeypatch.setattr(trial_model, "LARGEST", 1000)
        assert packing_leaks(tiny("llama")) == "packed rows of a llama model could not be tried: no"


class TestStages:
    """The same through layers, cut into two stages that share nothing but what they hand on."""

    @pytest.mark.parametrize(
        "name",
        [
            "llama",
            "gemma3_text",
            "qwen2-sliding",
            "falcon",
            "falcon-alibi",
            "bloom",
            "opt",
            "gpt_oss",
            "afmoe",
            "mpt",
        ],
    )
    def test_packed_documents_equal_separate_ones(self, name):
        run = two_stages(tiny(name) if "-" in name else family(name))
        packed = run(IDS, POSITIONS)
        pieces = zip(IDS.split(LENGTHS, dim=1), POSITIONS.split(LENGTHS, dim=1), strict=True)
        alone = torch.cat([run(ids, positions) for ids, positions in pieces], dim=1)
        assert (packed - alone).abs().max() < 1e-5 * packed.abs().max()

    @pytest.mark.parametrize("name", ["falcon", "opt"])
    def test_without_the_mend_they_leak(self, name, monkeypatch):
        run = two_stages(family(name))
        other = IDS.clone()
        other[:, : LENGTHS[0]] = 5
        behind = slice(LENGTHS[0], None)
        assert torch.equal(run(IDS, POSITIONS)[:, behind], run(other, POSITIONS)[:, behind])
        with without_the_mend(monkeypatch):
            again = two_stages(family(name))
            assert not torch.equal(again(IDS, POSITIONS)[:, behind], again(other, POSITIONS)[:, behind])

    def test_each_row_has_documents_of_its_own(self):
        run = two_stages(family("falcon"))
        positions = torch.stack([torch.arange(22), POSITIONS[0]])
        rows = [run(IDS[row : row + 1], positions[row : row + 1]) for row in range(2)]
        torch.testing.assert_close(run(IDS, positions), torch.cat(rows), rtol=0, atol=1e-6)

    def test_the_family_is_left_as_it_was(self):
        model = UnsplitModel(family("falcon"), seed=0)
        module = sys.modules[type(model._model).__module__]
        before = module.create_causal_mask
        inside = []
        with Documents(model._model).apart(POSITIONS):
            inside.append(module.create_causal_mask)
        with pytest.raises(RuntimeError), Documents(model._model).apart(POSITIONS):
            raise RuntimeError
        assert inside[0] is not before and module.create_causal_mask is before


class TestFlash:
    """transformers' own flash attention path, with the kernel replaced by plain torch."""

    def test_lengths(self):
        positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3], [2, 3, 0, 0]])
        found = flash_arguments(document_lengths(positions))
        assert found["cu_seq_lens_q"].tolist() == [0, 2, 4, 8, 10, 11, 12]
        assert found["cu_seq_lens_q"].dtype == torch.int32
        assert found["cu_seq_lens_k"] is found["cu_seq_lens_q"]
        assert (found["max_length_q"], found["max_length_k"]) == (4, 4)

    @pytest.mark.parametrize(
        "name", ["llama", "gemma2", "qwen3_moe", "gemma3_text", "gpt_neox", "deepseek_v3"]
    )
    def test_blocks_get_the_documents_of_all_rows(self, name, kernel):
        flash = two_stages(family(name), attention="flash_attention_2")(IDS, POSITIONS)
        assert len(kernel) == family(name).num_hidden_layers
        for lengths, longest in kernel:
            assert lengths == [0, 9, 16, 22, 31, 38, 44] and longest == 9
        expected = two_stages(family(name))(IDS, POSITIONS)
        torch.testing.assert_close(flash, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    def test_a_model_in_one_piece(self, kernel):
        flash = UnsplitModel(family("llama"), seed=0, attention="flash_attention_2")((IDS, POSITIONS))
        expected = UnsplitModel(family("llama"), seed=0)((IDS, POSITIONS))
        assert {tuple(lengths) for lengths, _ in kernel} == {(0, 9, 16, 22, 31, 38, 44)}
        torch.testing.assert_close(flash, expected, rtol=0, atol=1e-6)


def two_stages(config: PretrainedConfig, attention: str = "auto") -> Any:
    """A function (ids, positions) -> logits, through two instances that each build half of the layers."""
    stages = [PipelineModel(config, seed=0, attention=attention) for _ in range(2)]
    cut = stages[0].num_layers // 2
    layers = [stages[index >= cut].build(index).eval() for index in range(stages[0].num_layers)]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                if parameter.dim() > 1:  # the initial values are so small that little is seen of a document
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)

    @torch.no_grad()
    def run(ids: Tensor, positions: Tensor) -> Tensor:
        value: Any = (ids, positions)
        for layer in layers:
            value = layer(tuple(part.clone() for part in value))
        return value

    return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """flash_attn's functions in plain torch; what they are told of documents, for each call with real tensors."""
    told: list[tuple[list[int], int]] = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, max_seqlen_q: int, **options: Any
    ) -> Tensor:
        if not q.is_meta:
            told.append((cu_seqlens_q.tolist(), max_seqlen_q))
        window = options.get("window_size", (None,))[0]
        assert options["causal"]
        output, _ = independence.attention_by_document(
            torch.nn.Module(),
            *(states.transpose(0, 1)[None] for states in (q, k, v)),
            attention_mask=None,
            scaling=options["softmax_scale"],
            softcap=options.get("softcap"),
            sliding_window=None if window is None else window + 1,
            cu_seq_lens_q=cu_seqlens_q,
        )
        return output[0]

    def plain(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the blocks were not told where documents begin")

    names = "dropout_p window_size deterministic softcap s_aux block_table cache_seqlens max_seqlen_q max_seqlen_k"
    options = partial(
        flash_utils._process_flash_attention_kwargs, supports_mapping=dict.fromkeys(names.split(), True)
    )
    functions = (plain, varlen, None, None, None), (options, None)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    check = PreTrainedModel._check_and_adjust_attn_implementation

    def admit(model: PreTrainedModel, asked: str | None, *options: Any, **more: Any) -> str:
        return asked if asked == "flash_attention_2" else check(model, asked, *options, **more)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", admit)
    return told

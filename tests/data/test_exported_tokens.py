"""What an export says of special tokens: config, generation config and tokenizer agree with what was trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig

from dstrain.data.tokenizing.tokenizers import load_tokenizer
from dstrain.exporting.convert import _agreeing, _write_descriptions
from tests.support.plans import plan


@pytest.mark.parametrize(
    ("now", "wanted", "keep", "result"),
    [
        (None, 3, True, 3),
        (2, 3, True, 3),
        ([2, 3], 3, False, [2, 3]),
        ([1, 2], 3, True, 3),
        (2, None, True, 2),
        (2, None, False, None),
        (0, 0, False, 0),
        (None, None, False, None),
    ],
)
def test_an_id_agrees_with_the_tokenizer(now, wanted, keep, result):
    assert _agreeing(now, wanted, keep=keep) == result


class Tensors:
    """Of a model that was exported."""

    architecture, dtype = "LlamaForCausalLM", torch.float32

    def __init__(self, padding_moves_positions: bool = False) -> None:
        self.padding_moves_positions = padding_moves_positions


@pytest.fixture
def tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<pad>", "a", "b"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    beside = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "special_tokens_map_file": "/gone"}
    file.write_text(json.dumps(json.loads(file.read_text()) | beside))
    return folder


def exported(tmp_path, tokenizer_folder, model_folder, generation=None, others=None, **tensors):
    """The folder that is written for a model whose config has other ids."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "config.json"
    config = LlamaConfig.from_dict(
        {"bos_token_id": 11, "eos_token_id": [12, 13], "pad_token_id": 14, **(others or {})}
    )
    if generation is not None:
        (tmp_path / "model" / "generation_config.json").write_text(generation)
    made = plan()
    made = replace(
        made,
        model=replace(made.model, file=str(file), folder=str(model_folder)),
        data=replace(made.data, tokenizer=str(tokenizer_folder)),
    )
    out = tmp_path / "out"
    out.mkdir()
    _write_descriptions(out, made, config, Tensors(**tensors), load_tokenizer(str(tokenizer_folder)))
    return out


@pytest.mark.parametrize(
    "generation",
    [None, '{"temperature": 0.5, "do_sample": true, "eos_token_id": [12], "pad_token_id": 14}', "no JSON"],
)
def test_everything_agrees(generation, tmp_path, tokenizer_folder):
    out = exported(tmp_path, tokenizer_folder, tokenizer_folder, generation)
    config = AutoConfig.from_pretrained(out)
    told = GenerationConfig.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = [0, 1, 2]
    for of in (config, told, tokenizer):
        assert [of.bos_token_id, of.eos_token_id, of.pad_token_id] == wanted, of
    assert tokenizer("a")["input_ids"] == [0, 3]
    if generation and "temperature" in generation:
        assert told.temperature == 0.5, "what else it says stays"
    text = "".join(path.read_text() for path in out.glob("*.json"))
    assert "auto_map" not in text and "/gone" not in text


BESIDE = {
    "auto_map": {"AutoConfig": "gone.Own"},
    "custom_pipelines": {"own": {"impl": "gone.Own"}},
    "custom_generate": "gone/generate.py",
    "trust_remote_code": True,
    "quantization_config": {"quant_method": "gone"},
    "compression_config": {"gone": 1},
    "peft_config": {"gone": 1},
    "assistant_model": "/gone/draft",
    "transformers_weights": "gone.safetensors",
    "adapter_file": "gone.bin",
    "bad_words_file": "gone.txt",
    "_name_or_path": "/gone/model",
    "name_or_path": "/gone/model",
    "base_model_name_or_path": "/gone/base",
    "processor_class": "GoneProcessor",
    "feature_extractor_type": "GoneExtractor",
    "image_processor_type": "GoneProcessor",
}


def test_nothing_speaks_of_files_that_are_not_there(tmp_path, tokenizer_folder):
    """In no file of the export, and the user's own notes stay."""
    file = tokenizer_folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | BESIDE))
    others = BESIDE | {"tokenizer_class": "GoneTokenizer", "a_note": "ours"}
    out = exported(
        tmp_path, tokenizer_folder, tokenizer_folder, json.dumps(BESIDE | {"a_note": "ours"}), others
    )
    for path in out.glob("*.json"):
        assert "gone" not in path.read_text().lower(), path
        assert "trust_remote_code" not in path.read_text(), path
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["a_note"] == "ours"
    assert type(AutoTokenizer.from_pretrained(out)).__name__
    assert AutoConfig.from_pretrained(out).vocab_size == LlamaConfig().vocab_size


@pytest.mark.parametrize("own", [True, False])
def test_tokens_of_another_tokenizer_are_not_forced(own, tmp_path, tokenizer_folder):
    forced = {"forced_bos_token_id": 3, "suppress_tokens": [4], "bad_words_ids": [[3]]}
    model = tokenizer_folder if own else tmp_path / "model"
    out = exported(tmp_path, tokenizer_folder, model, json.dumps(forced | {"temperature": 0.5}))
    told = json.loads((out / "generation_config.json").read_text())
    assert told["temperature"] == 0.5 and (forced.items() <= told.items()) == own
    assert own or not forced.keys() & told.keys()


def test_where_positions_are_counted_from_the_padding_token_its_id_stays(tmp_path, tokenizer_folder):
    out = exported(tmp_path, tokenizer_folder, tokenizer_folder, padding_moves_positions=True)
    assert AutoConfig.from_pretrained(out).pad_token_id == 14
    assert GenerationConfig.from_pretrained(out).pad_token_id == 2

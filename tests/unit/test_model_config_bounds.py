"""Numbers in a config.json that no model has, in each family's own words."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.model_lookup import find_model
from dstrain.api.planning import load_config
from dstrain.config.files import ds_configs
from dstrain.errors import DstrainError
from dstrain.model_config_bounds import refuse_sizes


def config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300} | changes


@pytest.mark.parametrize("file", sorted((ds_configs() / "models").glob("*.json")), ids=lambda file: file.stem)
def test_the_built_in_shapes_are_within(file: Path) -> None:
    refuse_sizes(json.loads(file.read_text()), where="config.json")


@pytest.mark.parametrize(
    "values",
    [
        config(num_hidden_layers=10**8),
        config(n_layer=10**8),
        config(num_layers=5_000),
        config(hidden_size=10**8),
        config(n_embd=10**8),
        config(d_model=10**8),
        config(intermediate_size=10**10),
        config(vocab_size=10**12),
        config(num_attention_heads=10**8),
        config(num_local_experts=10**6),
        config(n_routed_experts=8_192, num_hidden_layers=1_000),
        config(hidden_size=-(10**12)),
        config(head_dim=10**4000),
        config(text_config={"num_hidden_layers": 10**8}),
        config(parts=[[{"depth": 10**8}]]),
        config(anything=10**30),
        config(layer_types=["a"] * 300_000),
    ],
    ids=range(17),
)
def test_no_model_is_so_large(values: dict[str, Any]) -> None:
    with pytest.raises(DstrainError, match=r"no model has more than|more than 200,000 values") as refused:
        refuse_sizes(values, where="config.json")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "values",
    [
        *(
            {name: -1}
            for name in ("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "hidden_size")
        ),
        {"text_config": {"num_key_value_heads": -2}},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"factor": float("nan")}},
    ],
    ids=str,
)
def test_no_model_has_less_than_none(values: dict[str, Any]) -> None:
    with pytest.raises(DstrainError, match=r"no model has less than none|is NaN") as refused:
        refuse_sizes(config(**values), where="config.json")
    assert refused.value.hint and refused.value.where == "config.json"


@pytest.mark.parametrize(
    "values",
    [
        config(max_position_embeddings=10_485_760, rope_theta=10**9, bos_token_id=-1),
        config(pad_token_id=-1, vision_feature_layer=-2, sliding_window=-1),
        config(num_hidden_layers=61, n_routed_experts=384, num_experts_per_tok=8),
        config(use_cache=True, sliding_window=2**31 - 1, time_step_limit=[0.0, float("inf")]),
    ],
)
def test_what_models_have(values: dict[str, Any]) -> None:
    refuse_sizes(values, where="config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(config(num_hidden_layers=10**8)), "num_hidden_layers is 100,000,000"),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 10_000 + "}", "malformed JSON"),
        ('{"model_type": ' + "[" * 100_000 + "}", "malformed JSON"),
        ('{"model_type": "llama", "a": ' + '{"a": ' * 900 + "1" + "}" * 900 + "}", ""),
        (" " * 2_000_000, "2 MB, and the limit is 1"),
    ],
)
def test_a_plan_says_so_at_once(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    start = time.monotonic()
    try:
        find_model(load_config(model=str(tmp_path)))
        message = ""
    except DstrainError as error:
        message = error.message
    assert said in message and time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' + "9" * 10_000 + "}", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        (json.dumps(config(n_layer=10**8)), "n_layer is 100,000,000"),
        (" " * 11_000_000, "11 MB, and the limit is 10"),
    ],
)
def test_the_config_of_a_folder_that_is_loaded(text: str, said: str, tmp_path: Path) -> None:
    from dstrain.model.architecture import load_config as load

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DstrainError, match=said):
        load(tmp_path)


def test_a_tokenizer_of_a_gigabyte(tmp_path: Path) -> None:
    from dstrain.data.tokenizing.tokenizer_files import tokenizer_folder

    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DstrainError, match="1,074 MB, and the limit is 256"):
        tokenizer_folder(str(tmp_path))

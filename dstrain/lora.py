"""A run's adapter: its options, in PEFT's words, and how PEFT names its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

_Positive = Annotated[int, Field(gt=0, le=10**12)]
_Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[list[str], Field(min_length=1)]
Bits = Literal["4bit", "8bit"]
"""What the model that an adapter is for can be quantized to."""
_EMPTY = "has an empty name"


class Adapter(BaseModel):
    """``adapter: {type: lora, r: 16}``: what is trained in place of the model's own weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    type: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="lora; rslora: scaled by alpha / sqrt(r) instead of alpha / r; dora: magnitude and direction apart",
    )
    r: _Positive = Field(8, description="rank of the two matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(8, description="what they add is scaled by alpha / r")
    dropout: _Fraction = Field(0.0, description="dropout in front of them")
    targets: str | Names = Field(
        "all-linear",
        description="modules to adapt, by the last parts of their names; or one regular expression for whole names; or"
        " all-linear: every linear layer but the head, and the experts",
    )
    exclude: str | list[str] = Field([], description="modules to leave out, likewise")
    target_parameters: list[str] = Field(
        [], description="parameters to adapt that belong to no linear layer, such as mlp.experts.gate_up_proj"
    )
    modules_to_save: list[str] = Field(
        [], description="modules to train as a whole, and to save with the adapter"
    )
    rank_pattern: dict[str, _Positive] = Field({}, description="other ranks: {NAME OR EXPRESSION: r}")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other alphas: {NAME OR EXPRESSION: alpha}"
    )
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default",
        description="initial values: default: Kaiming-uniform A and B = 0; gaussian: normal A and B = 0; orthogonal",
    )
    base: Bits | None = Field(
        None,
        description="quantize the model's own weights with bitsandbytes: 4bit (NF4, double quantization), or 8bit",
    )

    start: str | None = Field(
        None,
        alias="from",
        description="folder of an adapter to start from, which PEFT or `dstrain export` wrote; its options are taken",
    )

    @model_serializer(mode="wrap")
    def _by_key(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        values["from"] = values.pop("start")
        return values

    @field_validator("r", "alpha", mode="before")
    @classmethod
    def _is_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("must be a number")
        return value

    @field_validator("targets", "exclude", "target_parameters", "modules_to_save")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if any(not name.strip() for name in names):
            raise ValueError(_EMPTY)
        if isinstance(value, str):
            _refuse_no_expression(value)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _name_something(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in value:
            if not name.strip():
                raise ValueError(_EMPTY)
            _refuse_no_expression(name)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Adapter:
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("init: orthogonal needs an even r")
        if self.start is not None and not self.start.strip():
            raise ValueError("from: must name a folder")
        if self.init == "orthogonal" and self.base is not None:
            raise ValueError(
                "init: orthogonal is not made by PEFT beside quantized weights: leave out init, or base"
            )
        if self.target_parameters and self.type == "dora":
            raise ValueError("dora adapts linear layers alone: leave out target_parameters, or take lora")
        if self.target_parameters and self.dropout:
            raise ValueError("target_parameters has no dropout: set dropout: 0")
        return self


def _refuse_no_expression(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None


def check_adapter(value: Any) -> Any:
    """The long form of ``adapter``; None for ``none``. Raises ValueError."""
    if value == "none" or (isinstance(value, dict) and value.get("type") == "none"):
        return None
    if isinstance(value, str):
        return {"type": value}
    if value is not None and not isinstance(value, dict | Adapter):
        raise ValueError("must be lora, rslora, dora, none, or a mapping: {type: lora, r: 8, ...}")
    return value


ADAPTER = "default"
"""The name of a run's adapter among those that PEFT could hold side by side; saved files do without it."""

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter's."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The file with its weights."""

_TRAINED = re.compile(rf"\.(lora_\w+|modules_to_save)\.{ADAPTER}(\.|$)")
_WRAPPED = ("base_layer", "original_module")


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter: it is trained, and the model's own parameters are not."""
    return _TRAINED.search(name) is not None


def base_name(name: str) -> str:
    """The Hugging Face name of a parameter, which an adapter around its module does not change.

    Parameters of an adapter keep theirs: of two experts' matrices in one module, the second one's wrapper is told from
    the first one's by it.
    """
    if is_adapter_parameter(name):
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def saved_name(name: str) -> str:
    """The name of an adapter's parameter in ``adapter_model.safetensors``.

    Source: peft.get_peft_model_state_dict, and ``PeftModel``, which holds the model as ``base_model.model``.
    """
    for part in (f".modules_to_save.{ADAPTER}.", f".{ADAPTER}."):
        name = name.replace(part, ".")
    name = name.removesuffix(f".{ADAPTER}")
    if ".lora_magnitude_vector." in name:
        name = name.removesuffix(".weight")
    return f"base_model.model.{name}"

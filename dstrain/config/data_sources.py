"""The config's ``data`` and ``validation`` as lists of sources, and the ``data_phases`` of their weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dstrain.config.value_types import DataFormat, Fraction, PositiveInt, as_json
from dstrain.plugins import is_code

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Weight = Annotated[float, Field(gt=0, le=1e9)]

_Source = TypeVar("_Source", bound="ValidationSource")


class ValidationSource(BaseModel):
    """One entry of ``validation``: what a validation loss of its own is taken of.

    Unset values are None: those of the keys ``data_format`` and ``data_fields`` then hold.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    path: str = Field(description="what `data` takes as a single source")
    name: str | None = Field(
        None, description="in the plan and in metrics; default: the last part of the path"
    )
    format: DataFormat | None = Field(None, description="of its records; default: data_format")
    fields: dict[str, str] | None = Field(None, description="names of its fields; default: data_fields")
    limit: PositiveInt | None = Field(None, description="number of documents to read, from the first")
    config: str | None = Field(None, description="configuration of a data set that has several")
    split: str | None = Field(None, description="split of a data set; default: train")
    revision: str | None = Field(None, description="branch, tag or commit of a data set on the hub")
    options: dict[str, Any] = Field({}, description="keyword arguments of a dataset of your own")

    @field_validator("path")
    @classmethod
    def _says_where(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError(
                "may have letters, digits and . _ - only, 64 at most, and begins with a letter or digit"
            )
        return value

    @field_validator("options")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        return as_json(value)

    @classmethod
    def of(cls: type[_Source], path: str) -> _Source:
        """That of a path alone."""
        return cls.model_construct(path=path)

    @property
    def called(self) -> str:
        """Its name, or what is made of its path where it has none."""
        return self.name or _name_of(self.path)


class DataSource(ValidationSource):
    """One entry of ``data``."""

    weight: Weight | None = Field(
        None,
        description="its share of the tokens in samples, padding aside; default: each source by its size",
    )
    validation: Fraction | str | None = Field(
        None,
        description="fraction of its documents to hold back for a validation set of its own, or a path to take it from;"
        " default: validation",
    )


class Phase(BaseModel):
    """One entry of ``data_phases``: the weights up to some step."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(
        description="weight of each source, by name; 0 or none: it is left out"
    )
    until: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="fraction of the run (below 1), or number of steps, at which it ends; the last has none",
    )

    @field_validator("until", mode="before")
    @classmethod
    def _steps_or_fraction(cls, value: Any) -> Any:
        fraction = isinstance(value, float) and 0 < value < 1
        steps = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not (fraction or steps or value is None):
            raise ValueError("must be a fraction of the run between 0 and 1, or a whole number of steps")
        return value


def check_sources(value: Any, key: str = "data") -> Any:
    """The entries of ``data`` or ``validation`` as models, where it is a list.

    Raises:
        ValueError: an entry is not as it should be, or two have one name.
    """
    if not isinstance(value, list):
        return value
    kind: type[ValidationSource] = DataSource if key == "data" else ValidationSource
    if not value:
        raise ValueError("the list is empty: name at least one source")
    entries: list[ValidationSource] = [
        _checked(kind, _with_path(item), key, at) for at, item in enumerate(value)
    ]
    twice = [name for name, count in Counter(entry.called for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(f"two sources are called {twice[0]!r}: give each a name of its own")
    if isinstance(entries[0], DataSource):
        _check_weights([entry for entry in entries if isinstance(entry, DataSource)])
    return entries


def check_phases(value: Any) -> Any:
    """The entries of ``data_phases`` as models.

    Raises:
        ValueError: an entry is not as it should be, or they are out of order.
    """
    if not isinstance(value, list):
        return value
    phases = [_checked(Phase, item, "data_phases", at) for at, item in enumerate(value)]
    ends = [phase.until for phase in phases]
    if phases and (None in ends[:-1] or ends[-1] is not None):
        raise ValueError("every phase but the last must say until when it goes on, and the last must not")
    given = [end for end in ends if end is not None]
    if any(one >= other for one, other in pairwise(given) if (one < 1) == (other < 1)):
        raise ValueError("each phase must end after the one before it")
    for at, phase in enumerate(phases):
        if not any(phase.weights.values()):
            raise ValueError(f"data_phases[{at}]: all weights are 0, so there is nothing to train on")
    return phases


def sources_of(data: str | Sequence[DataSource]) -> tuple[DataSource, ...]:
    """The training sources of a config."""
    return (DataSource.of(data),) if isinstance(data, str) else tuple(data)


def paths_read(config: Mapping[str, Any]) -> list[str]:
    """All that a config reads as data, from its JSON, which may be another version's. Raises KeyError without any."""
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            look(value.get("path"))
            look(value.get("validation"))
        elif isinstance(value, list):
            for entry in value:
                look(entry)

    look(config["data"])
    look(config.get("validation"))
    return found


def with_paths(value: Any, change: Callable[[str], str]) -> Any:
    """The value of ``data`` or ``validation`` with other paths."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [with_paths(entry, change) for entry in value]
    if isinstance(value, Mapping):
        return {
            key: with_paths(inner, change) if key in ("path", "validation") else inner
            for key, inner in value.items()
        }
    return value


def or_path(schema: dict[str, Any]) -> None:
    """For editors: an entry of a list of sources may be a path alone."""
    for choice in schema.get("anyOf", ()):
        if choice.get("type") == "array":
            choice["items"] = {"anyOf": [{"type": "string"}, choice["items"]]}


_Model = TypeVar("_Model", bound=BaseModel)


def _checked(kind: type[_Model], item: Any, key: str, at: int) -> _Model:
    if isinstance(item, kind):
        return item
    place = f"{key}[{at}]"
    if not isinstance(item, dict):
        raise ValueError(f"{place}: must be a mapping such as {{{', '.join(_required(kind))}: ...}}")
    try:
        return kind.model_validate(item)
    except ValidationError as errors:
        error = errors.errors()[0]
    where = ".".join(str(part) for part in error["loc"] if str(part) in {*kind.model_fields, *item})
    if error["type"] == "extra_forbidden":
        raise ValueError(f"{place}: unknown key {where!r}; the keys are: {', '.join(kind.model_fields)}")
    if error["type"] == "missing":
        raise ValueError(f"{place}: {where} is missing; the keys are: {', '.join(kind.model_fields)}")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    raise ValueError(f"{place}: {where} = {item.get(where.split('.')[0])!r}: {message}")


def _required(kind: type[BaseModel]) -> list[str]:
    return [name for name, field in kind.model_fields.items() if field.is_required()]


def _with_path(item: Any) -> Any:
    return {"path": item} if isinstance(item, str) else item


def _check_weights(entries: Sequence[DataSource]) -> None:
    without = [entry.called for entry in entries if entry.weight is None]
    if without and len(without) < len(entries):
        raise ValueError(
            f"{without[0]} has no weight, and others have: give every source one, or none of them"
        )


def _name_of(path: str) -> str:
    """A name from a path: its last part without suffixes, and without what names may not have."""
    if is_code(path):
        last = path.partition(":")[2]
    else:
        last = Path(path.rstrip("/")).name.split(".")[0] or Path(path).name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64]
    return name or "data"


def weights_by_phase(
    sources: Sequence[DataSource], phases: Sequence[Phase]
) -> tuple[tuple[float | None, Mapping[str, float | None]], ...]:
    """For each phase when it ends, and the weight of each source (None: by its size)."""
    if not phases:
        return ((None, {source.called: source.weight for source in sources}),)
    return tuple(
        (phase.until, {source.called: phase.weights.get(source.called, 0.0) for source in sources})
        for phase in phases
    )


def steps_of_phases(
    phases: Sequence[tuple[float | None, Mapping[str, float | None]]], steps: int
) -> tuple[int, ...]:
    """The last step of each phase of `weights_by_phase`: fractions are of all ``steps``."""
    return tuple(
        steps if until is None else round(until * steps) if until < 1 else int(until) for until, _ in phases
    )

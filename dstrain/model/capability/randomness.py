"""Tests by trying whether a training forward draws random numbers, whatever they are called."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.lora import Adapter
from dstrain.model.adapters import Adapters
from dstrain.model.capability.small_model import RANDOM
from dstrain.model.capability.trial_model import small_trial, trial_model
from dstrain.model.document_lengths import document_lengths, note_lengths
from dstrain.model.skeleton import untouched_rng
from dstrain.model.unsplit_model import UnsplitModel

ROWS, LENGTH = 2, 48
"""As long as the other trials' rows: some families (big_bird) compute otherwise for good once they met shorter ones."""

Path = tuple[str, ...]
"""Where a value stands in a configuration: its key, or that of a part of it and its key there."""


def is_random(model: UnsplitModel, seeds: Sequence[int] = ()) -> bool:
    """Whether the model, in the mode that it is in, computes something else after other draws of random numbers.

    Args:
        seeds: of the `ROWS` rows, where they are known.

    Raises:
        DstrainError: the family's code does not run.
    """
    ids = torch.randint(
        3, model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    note_lengths(positions, document_lengths(positions, seeds))
    results = []
    for seed in range(2):
        with _seeded(seed), torch.no_grad():
            try:
                results.append(model((ids, positions)))
            except Exception as error:  # whatever the family's code runs into
                text = " ".join(str(error).split())[:200]
                raise DstrainError(f"it does not run ({type(error).__name__}: {text})") from error
    return not torch.equal(*results)


def randomness_beside_dropout(config: PretrainedConfig) -> str | None:
    """What makes the training of this model random beside the dropout that its config names; None: nothing does.

    Returns:
        The keys of its config that turn it off, with their values; "" where no single key does.
    """
    try:
        small = _without(small_trial(config), "drop")
        if not _trains_at_random(small):
            return None
    except DstrainError:  # what does not run on a small copy is no news of this check
        return None
    return ", ".join(
        f"{'.'.join(path)} {value:g}" for path, value in _numbers(small) if _is_cause(small, path)
    )


def adapter_drops_by_layout(config: PretrainedConfig, adapter: Adapter) -> bool:
    """Whether what an adapter's dropout drops depends on the layout.

    It does where a module is given tokens, and it can't be told of which rows they are: as with experts that are run
    one by one. It is taken to do so where no small copy of the model can be tried.
    """
    if not adapter.dropout:
        return False
    # Names and patterns may mean layers that a small copy has not; `all-linear` is what most of them are a part of.
    plain = adapter.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}})
    for tried in (plain, plain.model_copy(update={"targets": "all-linear"})):
        with suppress(DstrainError):
            small = calm(small_trial(config))
            model = trial_model(small, adapters=Adapters(small, tried)).train()
            return is_random(model, seeds=range(ROWS))
    return True


def largest_dropout(config: PretrainedConfig) -> float:
    """Families name it otherwise: attention_dropout, resid_pdrop, hidden_dropout_prob, ..."""
    return max((value for path, value in _numbers(config) if "drop" in path[-1]), default=0.0)


def calm(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without dropout, and without noise of the names that are known."""
    return _without(config, "drop", *RANDOM)


def _without(config: PretrainedConfig, *names: str) -> PretrainedConfig:
    for path, _ in _numbers(config):
        if any(name in path[-1] for name in names):
            config = _changed(config, path, 0.0)
    return config


def _trains_at_random(config: PretrainedConfig) -> bool:
    return is_random(trial_model(config).train())


def _is_cause(config: PretrainedConfig, path: Path) -> bool:
    """Whether nothing is random once this value is 0."""
    try:
        return not _trains_at_random(_changed(config, path, 0.0))
    except DstrainError:  # a value that must not be 0
        return False


def _numbers(config: PretrainedConfig) -> list[tuple[Path, float]]:
    """The fractions in a configuration and in its parts that are not 0."""

    def walk(values: dict[str, Any], above: Path) -> Iterator[tuple[Path, float]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, (*above, str(name)))
            elif isinstance(value, float) and value:
                yield (*above, str(name)), value

    return list(walk(config.to_dict(), ()))


def _changed(config: PretrainedConfig, path: Path, value: float) -> PretrainedConfig:
    config = copy.deepcopy(config)
    inner: Any = config
    for name in path[:-1]:
        inner = inner[name] if isinstance(inner, dict) else getattr(inner, name)
    if isinstance(inner, dict):
        inner[path[-1]] = value
    else:
        setattr(inner, path[-1], value)
    return config


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All generators that a family's code may draw from, as they are after ``seed``; afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    with untouched_rng():
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

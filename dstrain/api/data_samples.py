"""What a model gets of the data of a config: samples in pieces, and statistics; and its tokens, made ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dstrain.api.events import SILENT, Events
from dstrain.api.model_lookup import find_model, find_tokenizer
from dstrain.api.prepare_data import PreparedSource, look_at_data, prepare_sources
from dstrain.config.loader import ResolvedConfig
from dstrain.planning.checks import refuse


def data_samples(
    config: ResolvedConfig,
    samples: Sequence[int] = (0, 1, 2),
    *,
    each_token: bool = False,
    events: Events = SILENT,
) -> dict[str, Any]:
    """Training samples as the model gets them, and statistics of the data.

    Args:
        config: from `load_config`.
        samples: their numbers, from 0. Those that there are not are left out.
        each_token: each piece has its tokens as ``ids``, and the ``texts`` of them.
        events: told of the progress.

    Returns:
        ``samples``: for each its ``number``, ``source``, ``documents``, ``labels``, ``padding`` and ``pieces``, each
        with its ``document``, ``trained``, ``tokens``, ``text`` and the ``position`` of its first token.
        ``statistics``: documents, tokens and rows, percentiles of the ``lengths`` of documents and their ``histogram``
        as [from, to, documents], and the ``labels`` of all rows. Of a stream there are estimates alone.

    Raises:
        DstrainError: the data can't be used.
    """
    refuse(config)
    model = find_model(config, events)
    return look_at_data(config, find_tokenizer(config, model, events), samples, events, each_token=each_token)


def prepare_ahead(
    config: ResolvedConfig, *, workers: int | None = None, events: Events = SILENT
) -> list[PreparedSource]:
    """Tokenize the data of a config into the cache that its run will use; no device is needed.

    What is there already stays. A call that is interrupted goes on where it was when it is made again.

    Args:
        config: from `load_config`.
        workers: processes that tokenize; 0: one that does it alone; None: as many as are worth their start.
        events: told of the progress.

    Raises:
        DstrainError: the data can't be used.
    """
    refuse(config)
    model = find_model(config, events)
    return prepare_sources(config, find_tokenizer(config, model, events), events, workers=workers)

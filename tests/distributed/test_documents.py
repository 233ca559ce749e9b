"""Each stage knows the documents of the micro-batch that it computes, and does not ask its device for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.test_injuries import micro_batches
from tests.support.distributed.training import Case, build_case_engine
from tests.support.distributed.workers import run

SHORT = Case(layers=2, accumulation=8)
CASES = [
    replace(SHORT, zero=1, pipeline=2, checkpointing=True),
    replace(SHORT, zero=1, pipeline=4),
    replace(SHORT, zero=1, pipeline=2, schedule="dualpipev", checkpointing=True),
    replace(SHORT, zero=2, data_parallel=2, checkpointing=True),
    replace(SHORT, zero=3, data_parallel=2),
]


def train(rank: int, case: Case) -> dict[str, Any]:
    """Losses with and without what the host knows, and how often masks were made of what was known, or was not."""
    from dstrain.model import document_masks
    from dstrain.model.document_lengths import document_lengths

    engine, plan = build_case_engine(case)
    batches = micro_batches(case, plan.layout.replica(rank), 1)
    known = [replace(one, documents=document_lengths(one.position_ids)) for one in batches]
    found: list[bool] = []
    ordinary = document_masks.known_lengths

    def watched(position_ids: Any) -> Any:
        lengths = ordinary(position_ids)
        if not position_ids.is_meta:
            found.append(lengths is not None)
            assert lengths is None or lengths.edges.equal(document_lengths(position_ids).edges)
        return lengths

    document_masks.known_lengths = watched
    losses = [engine.eval_loss(batches)]
    asked, found[:] = found[:], []
    losses += [engine.eval_loss(known), engine.train_batch(known, case.lr).loss]
    return {
        "losses": losses,
        "asked": asked,
        "known": found,
        "packed": [one.documents.packed for one in known],
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mask_is_made_of_what_the_host_knows(case: Case) -> None:
    ranks = run(case.world_size, train, case)
    for told in ranks:
        asked, known, trained = told["losses"]
        assert asked == known and trained == pytest.approx(known, rel=1e-5)
        assert not any(told["asked"]) and all(told["known"]) and any(told["packed"])
    assert any(told["known"] for told in ranks)

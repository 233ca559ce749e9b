"""How far two trainings are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import combinations

from tests.support.distributed.training import BEGIN_WITH_ZERO, Case, Outcome
from tests.support.distributed.workers import run
from tests.support.distributed.yardsticks import train_in_plain_loop

FP32_BOUND = 1e-5
_GROUPINGS = ((8, 1), (4, 2), (32, 3), (2, 4), (16, 5), (8, 6), (4, 7), (2, 8))
"""Micro-batches and seeds of the shuffle, in which one process trains the same samples otherwise."""
FEW, MANY = 4, len(_GROUPINGS)


@dataclass(frozen=True)
class Difference:
    """Largest relative differences: of a step's loss, of its gradient norm, of a weight tensor, of the validation loss.

    A weight tensor's difference is relative to its own largest element.
    """

    loss: float
    norm: float
    weights: float
    validation: float

    def within(self, bound: Difference) -> bool:
        return all(a <= b for a, b in zip(astuple(self), astuple(bound), strict=True))


def difference(ranks: list[Outcome], reference: Outcome) -> Difference:
    """Between all ranks of a layout and a yardstick. Every weight of the model must be on some rank."""
    seen = {name for rank in ranks for name in rank.weights}
    assert seen == set(reference.weights), seen ^ set(reference.weights)
    weights = 0.0
    for rank in ranks:
        for name, value in rank.weights.items():
            wanted = reference.weights[name]
            weights = max(weights, float((value - wanted).abs().max() / wanted.abs().max()))
    return Difference(
        loss=max(_relative(rank.losses, reference.losses) for rank in ranks),
        norm=max(_relative(rank.norms, reference.norms) for rank in ranks),
        weights=weights,
        validation=max(_relative([rank.validation], [reference.validation]) for rank in ranks),
    )


def _relative(found: list[float], wanted: list[float]) -> float:
    """Steps that fp16's loss scale skipped have an infinite norm on both sides."""
    pairs = list(zip(found, wanted, strict=True))
    assert all((a == float("inf")) == (b == float("inf")) for a, b in pairs), pairs
    return max((abs(a - b) / abs(b) for a, b in pairs if b != float("inf")), default=0.0)


@cache
def reference(case: Case) -> Outcome:
    """The plain loop of a case in one process. It must learn, and clipping must bite where it is on."""
    [outcome] = run(1, train_in_plain_loop, case)
    assert outcome.losses[-1] < 0.95 * outcome.losses[0], "the yardstick itself does not learn"
    assert not case.clip or min(outcome.norms) > case.clip, "clipping does not bite"
    return outcome


@cache
def bound(case: Case, groupings: int = FEW) -> Difference:
    """How far a layout may be from the plain loop.

    fp32: 1e-5; but for norm and weights of adapters that are zero at first, and only as large as their steps, what 16
    bits have. bf16 and fp16: a layout sums in an order of its own, and so does the plain loop when its samples are
    grouped and shuffled otherwise. Twice the largest distance between any two of such single-process runs is allowed:
    the plain loop itself, and those of so many ``groupings``. The validation loss is one number a run, too few to know
    its spread by: it is a mean token loss like a step's, and may be as far off.
    """
    strict = Difference(FP32_BOUND, FP32_BOUND, FP32_BOUND, FP32_BOUND)
    if case.precision == "fp32" and case.adapter not in BEGIN_WITH_ZERO:
        return strict
    runs = [reference(case)]
    for micro_batch, shuffle in _GROUPINGS[:groupings]:
        runs += run(1, train_in_plain_loop, case, micro_batch, shuffle)
    spreads = [astuple(difference([a], b)) for a, b in combinations(runs, 2)]
    loss, norm, weights, validation = (2 * max(column) for column in zip(*spreads, strict=True))
    if case.precision == "fp32":
        return replace(strict, norm=max(FP32_BOUND, norm), weights=max(FP32_BOUND, weights))
    return Difference(loss, norm, weights, max(loss, validation))


def assert_equal(case: Case, ranks: list[Outcome]) -> None:
    """The layout's training is the plain loop's."""
    plain = case.in_one_process()
    assert_within(case, difference(ranks, reference(plain)), plain)


def assert_within(case: Case, found: Difference, plain: Case) -> None:
    """The distance that was found from the plain loop is one that `bound` allows."""
    # The first loss scale decides which steps are skipped, and whether one overflows depends on how samples
    # are grouped: the spread is that of runs that skip none.
    spread_of = replace(plain, loss_scale_power=Case().loss_scale_power)
    allowed = bound(spread_of)
    if not found.within(allowed):  # a few runs may have come out closer together than most do
        allowed = bound(spread_of, MANY)
    assert found.within(allowed), f"{case}: {found} is not within {allowed}"

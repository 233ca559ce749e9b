"""How a run and its repetition compare, and why they differ where they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from dstrain.report.reproduction import Repetition, compare_bits
from dstrain.runs.record.differences import Difference, differences
from dstrain.runs.run_folder import RunFolder

_SHOWN = 12  # differences in full; there may be hundreds of packages


def show_repetition(
    run: RunFolder,
    again: RunFolder,
    first: Mapping[str, Any],
    now: Mapping[str, Any],
    console: Console,
) -> tuple[Repetition, list[Difference]]:
    """Compare the two, and say what differs.

    Args:
        first, now: the records of the launches that began the two.
    """
    found = differences(first, now)
    repetition = compare_bits(run, again)
    for difference in found[:_SHOWN]:
        console.print(f"differs  {difference}", soft_wrap=True, markup=False, highlight=False)
    if len(found) > _SHOWN:
        console.print(
            f"         and {len(found) - _SHOWN} more: {again.reproduction}", soft_wrap=True, markup=False
        )
    if repetition.deviation is None:
        console.print(_equal(run, again, repetition), soft_wrap=True, markup=False)
    return repetition, found


def _equal(run: RunFolder, again: RunFolder, repetition: Repetition) -> str:
    if repetition.of_run == repetition.of_again:
        return f"bit-equal: all {repetition.steps} steps of {run.name}"
    return (
        f"bit-equal: the {repetition.steps} steps that both have; {run.name} ends with step {repetition.of_run}, and"
        f" {again.name} with step {repetition.of_again}"
    )


def cause(
    step: int, launches: Sequence[Mapping[str, Any]], first: Mapping[str, Any], found: Sequence[Difference]
) -> str:
    """Why the two differ from this step on, as far as it was recorded.

    Args:
        launches: all of the run that was repeated.
        found: what is another now than in its ``first`` one.
    """
    since = launches[launches.index(first) :]
    trained = [launch for launch in since if launch["first_step"] <= max(step, 1)][-1]
    if "config" in trained:
        meanwhile = differences(first, trained)
        if meanwhile:
            since_then = f"; what is another than then: {_in_short(found)}" if found else ""
            return (
                f"the run itself changed at step {trained['first_step']}: {_in_short(meanwhile)}{since_then}"
            )
    if found:
        return f"what is another than then: {_in_short(found)}"
    unknown = "nothing that was recorded is another: a kernel that does not add in the same order each time"
    if first["config"]["deterministic"]:
        return unknown
    return f"{unknown}; runs with --deterministic can be repeated to the bit"


def _in_short(found: Sequence[Difference]) -> str:
    return "; ".join(str(difference) for difference in found[:3])

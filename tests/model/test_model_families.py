"""Every family that transformers knows: equal to Hugging Face's own model in 2 and in 3 stages, or refused.

``make test`` tries all that are refused or that need a choice, those of the other tests of this folder, and each eighth
of the rest; ``make test-heavy`` tries the others, and compares the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.model.capability.parity import CLOSE
from tests.support.model_families import FAMILIES
from tools.models_page import CHOICES, NOTES, Finding, families, page

ROOT = Path(__file__).resolve().parents[2]
FLOOR = 168
"""Families that are equal to the bit: never fewer than this."""

LOOK_AHEAD = {"cpmant", "prophetnet", "reformer", "xlm", "xlnet"}
"""Families whose tokens see the ones after them."""

SUMS_IN_ANOTHER_ORDER: dict[str, str] = {}
"""Families that come close instead of being equal, each with the reason."""


_CHOSEN = {*NOTES, *CHOICES, *LOOK_AHEAD, *(kind for kind, _ in FAMILIES.values())}
SAMPLE = {*_CHOSEN, *[name for name in families() if name not in _CHOSEN][::8]} & set(families())
REST = set(families()) - SAMPLE


class Findings(dict[str, Finding]):
    """By family. The sample is tried when one of it is asked for, and so is the rest."""

    def __missing__(self, family: str) -> Finding:
        self.update(swept(SAMPLE if family in SAMPLE else REST))
        return self[family]


def swept(some: set[str]) -> dict[str, Finding]:
    """In a process of its own, which forks before torch has started threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.models_page", "--json", *sorted(some)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Finding(**values) for values in json.loads(done.stdout)]
    return {finding.family: finding for finding in found}


@pytest.fixture(scope="module")
def findings() -> Findings:
    return Findings()


@pytest.fixture(scope="module")
def written() -> str:
    return (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def every_family() -> list[object]:
    return [pytest.param(name, marks=pytest.mark.heavy if name in REST else []) for name in families()]


@pytest.mark.parametrize("family", every_family())
def test_stages_equal_the_family_itself_or_it_is_refused(
    family: str, findings: Findings, written: str
) -> None:
    found = findings[family]
    assert found.wrong is None
    if found.difference is None:
        assert found.refused or found.not_small
        assert found.whole is None or found.not_small or found.text in LOOK_AHEAD, found.whole
    else:
        assert found.whole is None or found.choice
        assert found.difference <= (CLOSE if found.text in SUMS_IN_ANOTHER_ORDER else 0.0)
        assert not found.refused or found.choice
    [row] = page([found]).splitlines()[-1:]
    assert row in written.splitlines(), "docs/models.md is out of date: run `make docs`"


def test_reasons_and_choices_belong_to_refused_families(findings: Findings) -> None:
    sample = [findings[family] for family in SAMPLE]
    assert set(NOTES) <= {found.text for found in sample if found.refused or found.not_small}
    assert {found.text for found in sample if found.choice} == set(CHOICES)


@pytest.mark.heavy
def test_all_of_them(findings: Findings, written: str) -> None:
    """Enough are equal to the bit, the others are those of the sample, and the page says what was found."""
    all_of_them = [findings[family] for family in families()]
    assert sum(found.difference == 0 for found in all_of_them) >= FLOOR
    known = {findings[family].text for family in SAMPLE}
    rest = [found for found in all_of_them if found.family in REST and found.text not in known]
    assert not [found for found in rest if found.refused or found.choice]
    assert written == page(all_of_them), "docs/models.md is out of date: run `make docs`"

"""Every family that transformers knows: equal to Hugging Face's own model in 2 and in 3 stages, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.model.capability.parity import CLOSE
from tools.models_page import CHOICES, NOTES, Finding, families, page

ROOT = Path(__file__).resolve().parents[2]
FLOOR = 168
"""Families that are equal to the bit: never fewer than this."""

LOOK_AHEAD = {"cpmant", "prophetnet", "reformer", "xlm", "xlnet"}
"""Families whose tokens see the ones after them."""

SUMS_IN_ANOTHER_ORDER: dict[str, str] = {}
"""Families that come close instead of being equal, each with the reason."""


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    """In a process of its own, which forks before torch has started threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.models_page", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Finding(**values) for values in json.loads(done.stdout)]
    return {finding.family: finding for finding in found}


@pytest.mark.parametrize("family", families())
def test_stages_equal_the_family_itself_or_it_is_refused(family, findings):
    found = findings[family]
    assert found.wrong is None
    if found.difference is None:
        assert found.refused or found.not_small
        assert found.whole is None or found.not_small or found.text in LOOK_AHEAD, found.whole
    else:
        assert found.whole is None or found.choice
        assert found.difference <= (CLOSE if found.text in SUMS_IN_ANOTHER_ORDER else 0.0)
        assert not found.refused or found.choice


def test_enough_families_are_equal_to_the_bit(findings):
    assert sum(found.difference == 0 for found in findings.values()) >= FLOOR


def test_the_page_says_what_was_found(findings):
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == page(list(findings.values())), "docs/models.md is out of date: run `make docs`"


def test_reasons_and_choices_belong_to_refused_families(findings):
    refused = {found.text for found in findings.values() if found.refused or found.not_small}
    assert set(NOTES) <= refused
    assert {found.text for found in findings.values() if found.choice} == set(CHOICES)

"""What tests of the data share."""

from __future__ import annotations

import pytest

from dstrain.data import token_cache


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a corpus is tokenized."""
    seen = []
    real = token_cache.write_tokens
    monkeypatch.setattr(token_cache, "write_tokens", lambda *args: seen.append(1) or real(*args))
    return seen

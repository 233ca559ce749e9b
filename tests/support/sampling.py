"""A covering sample of a matrix runs in `make test`, what takes longer in `make test-heavy`, the whole in `verify-all`.

Both functions take cases and give parameters that are marked; a tuple is a case of several arguments.
"""

from __future__ import annotations

from typing import Any

import pytest


def heavy(*cases: Any) -> list[Any]:
    """For `make test-heavy`: those that compile DeepSpeed's operators, say."""
    return [_marked(case, pytest.mark.heavy) for case in cases]


def full(*cases: Any) -> list[Any]:
    """For `make verify-all`: those beyond the sample."""
    return [_marked(case, pytest.mark.full) for case in cases]


def _marked(case: Any, mark: pytest.MarkDecorator) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=mark)

"""Every op × backend × case × dtype against its spec in float64, forward and backward (the numerics policy)."""

from __future__ import annotations

import pytest

from clipfast.check import disagreements
from tests.kernels.rows import Row, collected

ROWS = [pytest.param(row, id=str(row), marks=[pytest.mark.slow] if row.slow else []) for row in collected()[0]]


@pytest.mark.parametrize("row", ROWS)
def test_matches_spec(row: Row) -> None:
    # The interpreter runs one program after another, and a second call would do the same.
    assert not disagreements(row.op, row.backend, row.arguments, twice=not row.interpreted)

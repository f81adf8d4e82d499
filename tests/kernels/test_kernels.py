"""Every op × backend × case × dtype against its spec in float64, forward and backward (the numerics policy)."""

from __future__ import annotations

import pytest
import torch

from clipfast import kernels
from clipfast.check import DTYPES, arguments, disagreements
from clipfast.kernels import dispatch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [
    pytest.param(op, backend, case, dtype, device, id=f"{op}-{backend}-{case}-{dtype}-{device}")
    for op, home in kernels.OPS.items()
    for device in DEVICES
    for backend in dispatch.BACKENDS
    for case in home.spec.CASES
    for dtype in DTYPES
]


@pytest.mark.parametrize(("op", "backend", "case", "dtype", "device"), ROWS)
def test_matches_spec(op: str, backend: str, case: str, dtype: str, device: str) -> None:
    if isinstance(reason := kernels.OPS[op].backend(backend), str):
        pytest.skip(reason)
    try:
        wrong = disagreements(op, backend, arguments(op, case, DTYPES[dtype], device))
    except dispatch.NoBackend as error:
        pytest.skip(str(error))
    assert not wrong

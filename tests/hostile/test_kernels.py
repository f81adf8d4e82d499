"""Calls of the ops that no model makes are refused or right, and end no process. Long: python -m tests.hostile.sanitize."""

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.check import run
from clipfast.kernels import dispatch
from tests.hostile.sanitize import odd_calls


def test_a_stride_of_zero_and_no_output_channels() -> None:
    """Both once divided by zero, which ends the process."""
    x = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    for backend in ("cpu", "torch"):
        with dispatch.use(backend):
            with pytest.raises(ValueError, match="expected a stride of at least 1, got 0"):
                kernels.convolution(x, torch.randn(8, 8, 3, 3), 0)
            with pytest.raises((RuntimeError, dispatch.NoBackend), match="not empty|at least 1"):  # the first is F.conv2d's own
                kernels.convolution(x, torch.randn(0, 8, 3, 3), 1)


def test_odd_calls_are_refused_or_right() -> None:
    """Of odd layouts: the numbers of the same call on contiguous tensors, to the bit or to rounding."""
    kinds, compared = (ValueError, TypeError, RuntimeError, IndexError), 0
    for op, given in odd_calls(150):
        plain = {name: v.detach().contiguous() if isinstance(v, Tensor) else v for name, v in given.items()}
        asks = kernels.OPS[op].differentiable
        plain = {n: v.requires_grad_(asks and v.is_floating_point()) if isinstance(v, Tensor) else v for n, v in plain.items()}
        answers = []
        for arguments in (given, plain):
            try:
                answers.append(run(getattr(kernels, op), arguments, []))
            except kinds as error:
                answers.append(type(error))
        got, expected = answers
        if isinstance(got, dict) and isinstance(expected, dict):
            compared += 1
            # Of infinities what is NaN hangs on the order of products and sums: there only numbers are compared.
            endless = any(v.isinf().any() for v in given.values() if isinstance(v, Tensor))
            for name, value in got.items():
                if endless:
                    finite = expected[name].isfinite()
                    value, expected[name] = value[finite], expected[name][finite]
                wide = 2e-2 if value.dtype in (torch.float16, torch.bfloat16) else 1e-3
                torch.testing.assert_close(value, expected[name], equal_nan=True, rtol=wide, atol=wide)
        else:
            assert got == expected, (op, answers)
    assert compared > 50

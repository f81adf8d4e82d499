"""Products of 8-bit integers: the very integers, the bound of rounding, numbers that have none, a row on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels.int8_linear import quantised, spec


def backends() -> list[str]:
    return [b for b in ("cpu", "torch") if not isinstance(kernels.OPS["int8_linear"].backend(b), str)]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def whole(*size: int, seed: int = 0) -> Tensor:
    """Integers of -127 to 127, with one of either end in each row."""
    x = torch.randint(-127, 128, size, generator=torch.Generator().manual_seed(seed)).float()
    x[:, 0] = 127
    return x


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("C", [1, 3, 4, 37, 64, 1031])
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 50])
def test_sums_are_the_integers(backend: str, rows: int, C: int) -> None:
    x, w = whole(rows, C), whole(45, C, seed=1)
    expected = x.double() @ w.double().T
    weight, scale = quantised(w)
    assert torch.equal(scale, torch.ones(45)) and torch.equal(spec.integers(weight, 45, C).float(), w)
    with kernels.use(backend):
        got = kernels.int8_linear(x, weight, scale)
    assert torch.equal(got, expected.float())


@pytest.mark.parametrize("backend", backends())
def test_the_greatest_sums_do_not_wrap(backend: str) -> None:
    C = 1 << 16
    weight, scale = quantised(torch.full((32, C), 127.0))
    with kernels.use(backend):
        for sign in (1, -1):
            got = kernels.int8_linear(torch.full((1, C), 127.0 * sign), weight, scale)
            assert torch.equal(got, torch.full((1, 32), float(sign * 127 * 127 * C)))
    with pytest.raises(ValueError, match="at most 65,536 input channels"):
        quantised(torch.zeros(1, C + 1))


@pytest.mark.parametrize("backend", backends())
def test_error_is_that_of_rounding(backend: str) -> None:
    """Half a step of either operand for each product: |Δx| ≤ step_x / 2, |Δw| ≤ step_w / 2."""
    x, w = normal(23, 300) * torch.logspace(-20, 20, 23)[:, None], normal(70, 300, seed=1)
    weight, scale = quantised(w)
    with kernels.use(backend):
        got = kernels.int8_linear(x, weight, scale).double()
    step = x.abs().amax(1, keepdim=True).double() / 254
    bound = step * w.abs().sum(1).double() + x.abs().sum(1, keepdim=True).double() * scale / 2 + 300 * step * scale / 2
    error = (got - x.double() @ w.double().T).abs()
    assert (error <= bound * (1 + 1e-6)).all() and (error > bound / 1000).any()


@pytest.mark.parametrize("quick_gelu", [None, True, False])
@pytest.mark.parametrize("backend", backends())
def test_numbers_that_have_no_integer(backend: str, quick_gelu: bool | None) -> None:
    """NaN and infinity make their row NaN and no other; zeros and what is below fp32's reach leave the bias."""
    x, bias = normal(9, 70), normal(40, seed=2)
    weight, scale = quantised(normal(40, 70, seed=1))
    with kernels.use(backend):
        plain = kernels.int8_linear(x, weight, scale, bias, quick_gelu)
        x[1, 3], x[3, 69], x[4, 0], x[5, 1], x[6], x[7] = torch.nan, torch.inf, -torch.inf, -torch.nan, 0, 1e-40
        got = kernels.int8_linear(x, weight, scale, bias, quick_gelu)
        empty = kernels.int8_linear(x * 0, weight, scale, bias, quick_gelu)
    assert got[[1, 3, 4, 5]].isnan().all()
    assert torch.equal(got[[0, 2, 8]], plain[[0, 2, 8]]) and not plain.isnan().any()
    assert torch.equal(got[6], empty[6]) and torch.equal(got[7], empty[6])
    if quick_gelu is None:
        assert torch.equal(got[6], bias)


@pytest.mark.parametrize("backend", backends())
def test_a_row_stands_alone(backend: str) -> None:
    x, bias = normal(700, 512), normal(96, seed=2)  # two blocks of rows
    weight, scale = quantised(normal(96, 512, seed=1))
    with kernels.use(backend):
        together = kernels.int8_linear(x, weight, scale, bias, True)
        for first, last in ((0, 1), (5, 12), (255, 300), (699, 700)):
            assert torch.equal(kernels.int8_linear(x[first:last], weight, scale, bias, True), together[first:last])


def test_large_numbers_through_the_activation() -> None:
    x = torch.tensor([[1e4], [-1e4], [1e30], [-1e30]])
    weight, scale = quantised(torch.ones(1, 1))
    for backend in backends():
        with kernels.use(backend):
            for quick_gelu in (True, False):
                got = kernels.int8_linear(x, weight, scale, None, quick_gelu)
                torch.testing.assert_close(got, x.relu())


def test_what_does_not_fit_is_refused() -> None:
    weight, scale = quantised(normal(40, 70))
    x = normal(3, 70)
    with pytest.raises(ValueError, match=r"expected an int8 weight \(2, 18, 32, 4\) for 69 -> 40 channels, got torch.int8"):
        kernels.int8_linear(x[:, :69].repeat(1, 1), weight[:, :17], scale)
    with pytest.raises(ValueError, match=r"expected a bias of shape \(40,\), got \(39,\)"):
        kernels.int8_linear(x, weight, scale, normal(39))
    with pytest.raises(ValueError, match="expected a floating weight"):
        quantised(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="8-bit weights only infer"):
        kernels.int8_linear(x.requires_grad_(), weight, scale)
    with torch.no_grad():
        assert kernels.int8_linear(x, weight, scale).shape == (3, 40)

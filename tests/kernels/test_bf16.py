"""Products of bf16 inside fp32: ``linear`` of a bf16 weight on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch, processor
from clipfast.kernels.linear import onednn, spec
from tests.kernels.test_processor import python

LOW = torch.bfloat16
WITH = pytest.param("as it is", marks=pytest.mark.skipif(not processor.BF16, reason="this processor does not multiply bf16"))


def operands(case: str) -> dict[str, Tensor]:
    given = spec.inputs(torch.Generator().manual_seed(0), **spec.CASES[case])
    return {name: t.to(LOW if name == "weight" else torch.float32) for name, t in given.items()}


def results(function: Any, given: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> list[Tensor]:
    """Output and gradients, in fp64."""
    leaves = {name: t.to(dtypes.get(name, t.dtype)).requires_grad_() for name, t in given.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)))]


@pytest.mark.parametrize("machine", [WITH, "without"])
@pytest.mark.parametrize("case", list(spec.CASES))
def test_the_error_is_no_more_than_that_of_bf16(case: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if machine == "without":
        monkeypatch.setattr(processor, "BF16", "")
    given = operands(case)
    got = results(kernels.linear, given, {})
    truth = results(F.linear, given, dict.fromkeys(given, torch.float64))
    eager = results(F.linear, given, dict.fromkeys(given, LOW))
    for name, a, b, c in zip(("y", *given), got, truth, eager, strict=True):
        ulp = torch.finfo(LOW).eps * b.norm()
        assert (a - b).norm() <= 2 * (c - b).norm() + ulp, name


def test_what_comes_out_has_the_type_of_what_goes_in() -> None:
    given = operands("C64")
    x, weight = given["x"].requires_grad_(), given["weight"].requires_grad_()
    y = kernels.linear(x, weight, given["bias"])
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32, LOW)  # type: ignore[union-attr]
    with torch.autocast("cpu", LOW):
        assert kernels.linear(x, weight, given["bias"]).dtype == LOW
    with dispatch.use("reference"):
        assert torch.allclose(kernels.linear(x, weight, given["bias"]), y, rtol=2**-7, atol=2**-5)


@pytest.mark.skipif(not processor.BF16, reason="this processor does not multiply bf16")
def test_a_packed_weight_gives_the_same() -> None:
    given = operands("packed tokens")
    packed = onednn.packed(given["weight"])
    assert packed.dtype == LOW and packed.is_mkldnn
    with torch.no_grad():
        plain = kernels.linear(**given)
        assert torch.allclose(kernels.linear(given["x"], packed, given["bias"]), plain, rtol=2**-7, atol=2**-5)
        assert kernels.linear(given["x"][:0], packed, given["bias"]).shape == (0, 128)


def test_a_lesser_set_has_no_bf16() -> None:
    done = python("from clipfast.kernels import processor; print(repr(processor.BF16))", CLIPFAST_CPU="none")
    assert done.stdout == "''\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "held", "amx", "narrow", "expected"),
    [
        ("avx512", None, True, True, "amx"), ("avx512", "avx512", True, True, "avx512_bf16"),
        ("avx512", None, False, True, "avx512_bf16"), ("avx512", None, False, False, ""), ("avx2", "avx2", True, True, ""),
        ("neon", None, False, False, ""),
    ],
)  # fmt: skip
def test_what_the_processor_has(
    name: str, held: str | None, amx: bool, narrow: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: narrow)
    assert processor._bf16(name, held) == expected

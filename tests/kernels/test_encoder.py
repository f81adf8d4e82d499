"""The encoder of 8-bit weights, whose roundings no bound of fp32 holds: beside the ops that it is made of, and a row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels.encoder import encoded, spec
from clipfast.kernels.int8_linear import quantised

pytestmark = pytest.mark.skipif(isinstance(kernels.OPS["encoder"].backend("cpu"), str), reason="no compiled kernels")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def parameters(C: int, layers: int) -> tuple[list[Tensor], list[Tensor]]:
    held: list[Tensor] = []
    scales: list[Tensor] = []
    for n in range(layers):
        for i, (out, of) in enumerate(((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))):
            held += [1 + normal(C, seed=n) / 9, normal(C, seed=n + 1) / 9] if i % 2 == 0 else []
            weight, scale = quantised(normal(out, of, seed=10 * n + i) * of**-0.5)
            held, scales = [*held, weight, normal(out, seed=n) / 9], [*scales, scale]
    return held, scales


def by_ops(x: Tensor, held: list[Tensor], scales: list[Tensor], heads: int, ends: Tensor, read: Tensor, quick: bool) -> Tensor:
    """The same by the ops for one product, one norm, one attention."""
    s = x
    for n in range(len(held) // 12):
        p, by = held[12 * n : 12 * n + 12], scales[4 * n : 4 * n + 4]
        with kernels.use("cpu"):
            y = kernels.int8_linear(kernels.layer_norm(s, p[0], p[1]), p[2], by[0], p[3])
            y = kernels.attention(y, heads, causal=True, cu_seqlens=ends)
            s, y = (s[read.long()], y[read.long()]) if n == len(held) // 12 - 1 else (s, y)
            s = s + kernels.int8_linear(y, p[4], by[1], p[5])
            h = kernels.int8_linear(kernels.layer_norm(s, p[6], p[7]), p[8], by[2], p[9], quick)
            s = s + kernels.int8_linear(h, p[10], by[3], p[11])
    return s


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("lengths", "C", "layers"), [((12,), 64, 3), ((3, 0, 7, 40, 77), 96, 2), ((1,), 48, 1)])
def test_8_bit_weights(lengths: tuple[int, ...], C: int, layers: int, quick: bool) -> None:
    held, scales = parameters(C, layers)
    x, ends = normal(sum(lengths), C), torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    read = (ends[1:] - 1)[ends.diff() > 0]
    given: dict[str, Any] = dict(causal=True, quick_gelu=quick, cu_seqlens=ends)
    got, expected = encoded(x, held, scales, C // 16, read=read, **given), by_ops(x, held, scales, C // 16, ends, read, quick)
    # A number that lies between two integers may be rounded to either: a step of 1/127 in one of C or 4C terms.
    assert (got - expected).norm() < 2e-3 * expected.norm() and (got - expected).abs().median() < 1e-5
    assert torch.equal(encoded(x, held, scales, C // 16, read=read, **given), got)
    plain = encoded(x, held, scales, C // 16, **given)
    assert torch.equal(plain[read.long()], got)
    alone = x[int(ends[-2]) :]
    given["cu_seqlens"] = torch.tensor([0, len(alone)], dtype=torch.int32)
    assert torch.equal(encoded(alone, held, scales, C // 16, **given), plain[int(ends[-2]) :])


def test_a_row_that_is_no_number_stays_alone() -> None:
    held, scales = parameters(32, 2)
    x = normal(3, 5, 32)
    x[1, 2, 3] = torch.nan
    for weights in ((held, scales), (in_fp32(held), [])):
        got = encoded(x, *weights, 2, causal=False, quick_gelu=True)
        assert got[1].isnan().all() and not got[[0, 2]].isnan().any()


def in_fp32(held: list[Tensor]) -> list[Tensor]:
    sizes = {2: (96, 32), 4: (32, 32), 8: (128, 32), 10: (32, 128)}
    return [spec.strips(normal(*sizes[i % 12]) / 9) if i % 12 in sizes else p for i, p in enumerate(held)]


def test_many_threads_walk_together() -> None:
    """More threads than cores, which take turns: each stage waits for the one before it."""
    held, scales = parameters(64, 3)
    x, before = normal(1, 70, 64), torch.get_num_threads()
    given: dict[str, Any] = dict(causal=False, quick_gelu=True)
    expected = encoded(x, held, scales, 4, **given)
    try:
        torch.set_num_threads(7)
        for _ in range(30):
            assert torch.equal(encoded(x, held, scales, 4, **given), expected)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    held, scales = parameters(32, 1)
    x, given = normal(2, 5, 32), dict(causal=False, quick_gelu=True)
    with pytest.raises(ValueError, match=r"expected x of shape \[B, L, C\] without cu_seqlens, got \(5, 32\)"):
        encoded(x[0], held, scales, 2, **given)
    with pytest.raises(ValueError, match="expected 12 parameters and 4 or no scales a block, got 12 and 3"):
        encoded(x, held, scales[:3], 2, **given)
    with pytest.raises(ValueError, match="expected heads to divide the width 32, got 3"):
        encoded(x, held, scales, 3, **given)
    with pytest.raises(ValueError, match=r"expected qkv_weight as strips of \[93, 31\] with a bias, got \(3, 8, 32, 4\)"):
        encoded(x[..., :31], held, scales, 31, **given)
    with pytest.raises(RuntimeError, match="packed and 8-bit weights only infer; train the fp32 model"):
        encoded(x.clone().requires_grad_(), held, scales, 2, **given)
    for read in (torch.tensor([10], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected rows below 10 to be read, got"):
            encoded(x, held, scales, 2, read=read, **given)
    with pytest.raises(RuntimeError, match="expected cu_seqlens to rise from 0 to 5"):
        encoded(x[0], held, scales, 2, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), **given)

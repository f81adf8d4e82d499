"""Layer norm in CUDA C++, with what torch calls of it, run on the host thread by thread (cuda_emulator.h), against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.check import DTYPES, disagreements
from clipfast.kernels.layer_norm import _supports_cuda, spec
from tests.kernels.test_attention_emulated import _on_gpu
from tests.kernels.test_cuda_emulated import compiled

OP = kernels.OPS["layer_norm"]


def backend_of(op: str, folder: Path, supports: Callable[..., str | None]) -> SimpleNamespace:
    """An op's CUDA C++ as a backend for tensors of the CPU: its operators in the emulator."""
    harness = f'#define CLIPFAST_EMULATED\n#define CLIPFAST_TORCH\n#include "kernels/{op}/cuda.cu"\n'
    intact = compiled(harness, folder, with_torch=True).intact
    intact.restype = ctypes.c_bool

    def whole(operator: Callable) -> Callable:
        def call(*args: Any) -> Any:
            result = operator(*args)
            assert intact(), "a write outside a buffer"
            return result

        return call

    parts = {part: getattr(torch.ops.clipfast, f"{name}_cuda").default for part, name in kernels.OPS[op].parts.items()}
    return SimpleNamespace(supports=supports, **{part: whole(operator) for part, operator in parts.items()})


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    backend = backend_of("layer_norm", tmp_path_factory.mktemp("emulated"), lambda x, *rest: _supports_cuda(_on_gpu(x), *rest))
    found = OP.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OP, "backend", lambda name: backend if name == "cuda" else found(name))
        yield


# Of a row by one warp, two and four, the widest of each and one just wider; rows in number beside the teams of a grid.
CASES = {name: case for name, case in spec.CASES.items() if case["shape"][-1] % 8 == 0}
CASES |= {
    "C8": dict(shape=(3, 8), residual=True),
    "C776": dict(shape=(5, 776), residual=True),
    "C1032": dict(shape=(5, 1032), residual=True),
    "C1536": dict(shape=(3, 1536)),
    "C2048": dict(shape=(3, 2048), residual=True),
    "C2056": dict(shape=(9, 2056)),
    "C4096": dict(shape=(2, 4096), residual=True),
    "more rows than teams": dict(shape=(151, 64), residual=True),
    "one row, residual": dict(shape=(64,), residual=True),
    "C1032, more rows than teams": dict(shape=(70, 1032)),
}


def inputs(
    dtype: torch.dtype, gains: torch.dtype | None = None, bias: torch.dtype | None = None, **case: Any
) -> dict[str, Any]:
    """Arguments of ``layer_norm``, all with gradients; weight and bias in types of their own."""
    given = spec.inputs(torch.Generator().manual_seed(0), **case)
    types = {"weight": gains or dtype, "bias": bias or gains or dtype}
    return {name: x.to(types.get(name, dtype)).requires_grad_() for name, x in given.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if i % 3 == turn else [pytest.mark.slow])
        for i, name in enumerate(CASES)
        for turn, dtype in enumerate(("bf16", "fp32", "fp16"))
    ],
)
def test_matches_spec(name: str, dtype: str) -> None:
    assert not disagreements("layer_norm", "cuda", inputs(DTYPES[dtype], **CASES[name]))


@pytest.mark.parametrize(
    ("dtype", "gains", "bias"), [("bf16", "fp32", "fp32"), ("fp16", "fp16", "fp32"), ("fp32", "fp32", "bf16")]
)
def test_gains_of_other_types(dtype: str, gains: str, bias: str) -> None:
    given = inputs(DTYPES[dtype], DTYPES[gains], DTYPES[bias], shape=(5, 72), residual=True)
    assert not disagreements("layer_norm", "cuda", given)


def shifted(x: Tensor) -> Tensor:
    """The same, contiguous, one element behind a multiple of 16 bytes."""
    view = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x.detach())
    assert view.is_contiguous() and view.data_ptr() % 16
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_views_that_do_not_start_at_16_bytes(dtype: str) -> None:
    """All that forward and backward read, each at an odd place."""
    given = {name: shifted(x) for name, x in inputs(DTYPES[dtype], shape=(3, 5, 64), residual=True).items()}
    assert not disagreements("layer_norm", "cuda", given)
    x, residual, weight = (given[name].detach() for name in ("x", "residual", "weight"))
    backend = OP.backend("cuda")
    _, s, mean, rstd = backend.forward(x, residual, weight, given["bias"].detach(), 1e-5)
    args = x, residual, s, weight, mean, rstd
    for got, right in zip(backend.backward(*map(shifted, args)), spec.backward(*args), strict=True):
        assert (got - right).norm() <= 2 * torch.finfo(got.dtype).eps * right.norm()


@pytest.mark.parametrize("C", [64, 1032])
def test_nan_stays_in_its_row(C: int) -> None:
    given = inputs(torch.bfloat16, shape=(6, C), residual=True)
    with torch.no_grad():
        given["residual"][3, 5] = torch.nan
    with kernels.use("cuda"):
        y, s = kernels.layer_norm(**given)
        dx, dresidual = torch.autograd.grad([y, s], [given["x"], given["residual"]], [torch.ones_like(y)] * 2)
    others = torch.arange(6) != 3
    assert y[3].isnan().all() and dx[3].isnan().all() and s[3].isnan().sum() == 1
    assert not any(t[others].isnan().any() for t in (y, s, dx, dresidual))


def test_what_it_supports() -> None:
    def reason(x: Tensor) -> str | None:
        return _supports_cuda(_on_gpu(x), None, torch.empty(x.shape[-1]), torch.empty(x.shape[-1]), 1e-5)

    assert reason(torch.empty(2, 4096)) is None and reason(torch.empty(8, dtype=torch.float16)) is None
    assert reason(torch.empty(2, 4104)) == "expected a multiple of 8 channels, at most 4096, got 4104"
    assert reason(torch.empty(2, 12)) == "expected a multiple of 8 channels, at most 4096, got 12"
    assert reason(torch.empty(2, 8).double()) == "expected float32, float16 or bfloat16, got torch.float64"
    assert _supports_cuda(torch.empty(2, 8)) == "expected CUDA tensors, got cpu"

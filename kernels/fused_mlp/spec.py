"""An MLP, with what its backward pass keeps: mlp's definition and sizes, the two Linears being the op's own."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.mlp import spec as pass_of_torch
from clipfast.kernels.mlp.spec import BENCH_GPU, floors, inputs, reference

__all__ = ["BENCH", "BENCH_GPU", "CASES", "backward", "floors", "forward", "inputs", "reference", "supports"]

CASES: dict[str, dict[str, Any]] = {
    "exact": dict(rows=3, C=64, quick_gelu=False),
    "quick": dict(rows=3, C=64),
    "one row": dict(rows=1, C=72),
    "prime": dict(rows=131, C=37),
    "transposed": dict(rows=10, C=64, transposed=True),
    "no rows": dict(rows=0, C=64),
    "large values": dict(rows=5, C=64, spread=40.0),
}
BENCH: dict[str, dict[str, Any]] = {}  # a CPU has no kernel for it


def supports(*args: Any) -> None:
    return None


def forward(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool, keep: bool,
    activation: ModuleType = pass_of_torch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``activation``: a backend of mlp's pass between the Linears."""
    h = F.linear(x, fc_weight)
    y = activation.forward(h, fc_bias, quick_gelu)
    nothing = h.new_empty(0)
    return F.linear(y, proj_weight, proj_bias), *((y, h) if keep else (nothing, nothing.clone()))


def backward(
    dz: Tensor, proj_weight: Tensor, h: Tensor, fc_bias: Tensor, quick_gelu: bool, activation: ModuleType = pass_of_torch
) -> tuple[Tensor, Tensor]:
    return activation.backward(dz @ proj_weight, h, fc_bias, quick_gelu)

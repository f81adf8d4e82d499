"""A Linear of 8-bit weights for inference: activations are rounded as they come, a row at a time, and sums are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.int8_linear.spec import PANEL, quantised
from clipfast.kernels.op import Op

__all__ = ["int8_linear", "quantised"]


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, quick_gelu: bool | None = None) -> Tensor:
    """x·Wᵀ + b by 8-bit integers, and QuickGELU or GELU of that where asked for.

    Each row of x is divided by its greatest magnitude / 127 and rounded; the integers' products are summed in 32 bits. A row
    gives the same bits whatever stands beside it, and NaN throughout where it holds NaN or infinity.

    Args:
        x: [..., C_in], any strides; asks for no gradient.
        weight, scale: int8 in panels and [C_out], as ``quantised`` gives them.
        bias: [C_out] or None.
        quick_gelu: True: x·σ(1.702x); False: the exact GELU x·Φ(x); None: neither.

    Returns:
        [..., C_out] in the dtype of ``x``.
    """
    out, C = scale.shape[0], x.shape[-1]
    n, k = PANEL
    expected = (-(-out // n), -(-C // k), n, k)
    if weight.shape != expected or weight.dtype != torch.int8:
        raise ValueError(
            f"int8_linear: expected an int8 weight {expected} for {C} -> {out} channels, got {weight.dtype} "
            f"{tuple(weight.shape)}; see quantised"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"int8_linear: expected a bias of shape {(out,)}, got {tuple(bias.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("int8_linear: expected no gradient to be asked for: 8-bit weights only infer; train the fp32 model")
    return OP(x, weight, scale, bias, quick_gelu)


def _supports_cpu(*args: object) -> str | None:
    tensors = [t for t in args[:1] + args[2:4] if isinstance(t, Tensor)]
    if not all([t.dtype == torch.float32 and t.is_cpu for t in tensors]):
        return f"expected float32 on the CPU, got {', '.join(sorted({f'{t.dtype} on {t.device}' for t in tensors}))}"
    return None


def _fake(x, weight, scale, bias, quick_gelu):
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


OP = Op(
    __name__,
    forward=("(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool? quick_gelu) -> Tensor", _fake),
    compiled={"cpu": _supports_cpu},
    differentiable=False,
)

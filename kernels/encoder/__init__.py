"""Residual attention blocks for inference in one call, from weights that are laid out for it."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.encoder.spec import PARAMETERS, PRODUCTS, STRIP, rows_of, strips
from clipfast.kernels.op import Op

__all__ = ["encoded", "encoder", "rows_of", "strips"]


def encoder(
    x: Tensor, heads: int, causal: bool, quick_gelu: bool, ln_1_weight: Tensor, ln_1_bias: Tensor, qkv_weight: Tensor,
    qkv_bias: Tensor, out_weight: Tensor, out_bias: Tensor, ln_2_weight: Tensor, ln_2_bias: Tensor, fc_weight: Tensor,
    fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, *, cu_seqlens: Tensor | None = None, read: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Blocks whose parameters are stacked: a first dimension of their number, then as ``encoded`` takes them."""
    stacked = (ln_1_weight, ln_1_bias, qkv_weight, qkv_bias, out_weight, out_bias, ln_2_weight, ln_2_bias, fc_weight, fc_bias,
               proj_weight, proj_bias)  # fmt: skip
    parameters = [p for block in zip(*stacked, strict=True) for p in block]
    return encoded(x, parameters, [], heads, causal=causal, quick_gelu=quick_gelu, cu_seqlens=cu_seqlens, read=read, eps=eps)


def encoded(
    x: Tensor, parameters: list[Tensor], scales: list[Tensor], heads: int, *, causal: bool, quick_gelu: bool,
    cu_seqlens: Tensor | None = None, read: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Token states through residual attention blocks (pre-norm; the MLP's activation is QuickGELU or the exact GELU).

    Args:
        x: [B, L, C], or packed [T, C]; asks for no gradient.
        parameters: for each block the weight and bias of ``ln_1``, qkv, out, ``ln_2``, fc and proj. Weights of products are
            ``strips`` of [3C, C], [C, C], [F, C] and [C, F], or int8 as ``int8_linear.quantised`` gives them.
        scales: of int8 weights, four for each block; else none.
        heads: H, a divisor of C.
        causal, cu_seqlens: see ``attention``.
        read: int32 [R], rows of x [B·L, C] or [T, C] that are read out of the last block, which works for them alone.
        eps: of the norms.

    Returns:
        As x; or [R, C].
    """
    if x.dim() != (3 if cu_seqlens is None else 2):
        expected = "[B, L, C] without cu_seqlens" if cu_seqlens is None else "[T, C] with cu_seqlens"
        raise ValueError(f"encoder: expected x of shape {expected}, got {tuple(x.shape)}")
    C, (blocks, left) = x.shape[-1], divmod(len(parameters), len(PARAMETERS))
    if left or len(scales) not in (0, PRODUCTS * blocks):
        raise ValueError(f"encoder: expected 12 parameters and 4 or no scales a block, got {len(parameters)} and {len(scales)}")
    if heads < 1 or C % heads:
        raise ValueError(f"encoder: expected heads to divide the width {C}, got {heads}")
    for i in range(0, len(parameters), len(PARAMETERS)):
        _check(parameters[i : i + len(PARAMETERS)], C, bool(scales))
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        raise RuntimeError(
            "encoder: expected no gradient to be asked for: packed and 8-bit weights only infer; train the fp32 model"
        )
    return OP(x, parameters, scales, cu_seqlens, read, heads, causal, quick_gelu, eps)


def _check(block: list[Tensor], C: int, int8: bool) -> None:
    hidden = block[9].shape[0]
    for at, out, of in ((2, 3 * C, C), (4, C, C), (8, hidden, C), (10, C, hidden)):
        n = -(-out // STRIP)
        if block[at].shape != ((n, -(-of // 4), STRIP, 4) if int8 else (n, of, STRIP)) or block[at + 1].shape[0] != out:
            raise ValueError(
                f"encoder: expected {PARAMETERS[at]} as strips of [{out}, {of}] with a bias, got {tuple(block[at].shape)} and "
                f"{tuple(block[at + 1].shape)}"
            )


def _supports_cpu(x: Tensor, parameters: list[Tensor], scales: list[Tensor], *rest: object) -> str | None:
    if not x.is_cpu or x.dtype != torch.float32:
        return f"expected float32 on the CPU, got {x.dtype} on {x.device}"
    weights = torch.int8 if scales else torch.float32
    if any([p.dtype != (weights if p.dim() > 2 else torch.float32) for p in parameters]):
        return f"expected parameters of float32, got {', '.join(sorted({str(p.dtype) for p in parameters}))}"
    K = x.shape[-1] // int(rest[2])  # type: ignore[call-overload]
    return f"expected heads of a multiple of 16 columns, got {K}" if K % 16 else None


def _fake(x, parameters, scales, cu_seqlens, read, heads, causal, quick_gelu, eps):
    shape = x.shape if read is None else (read.shape[0], x.shape[-1])
    return x.new_empty(shape)


OP = Op(
    __name__,
    forward=(
        "(Tensor x, Tensor[] parameters, Tensor[] scales, Tensor? cu_seqlens, Tensor? read, int heads, bool causal, "
        "bool quick_gelu, float eps) -> Tensor",
        _fake,
    ),
    compiled={"cpu": _supports_cpu},
    differentiable=False,
)

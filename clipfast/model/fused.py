"""The fused residual attention block, for whoever's modules hold the weights.

The residual stream s travels beside the update that the block before owes to it: addition and layer norm are one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipfast.kernels import attention, int8_linear, layer_norm, linear, mlp, pooling
from clipfast.model.frozen import Int8Linear, PackedLinear
from clipfast.model.rule import know, watched


class Linear(NamedTuple):
    weight: Tensor  # [out, in], or int8 in strips
    bias: Tensor | None
    scale: Tensor | None = None  # [out] of an int8 weight

    @classmethod
    def of(cls, module: Any) -> Linear:
        if type(module) is Int8Linear:  # read past nn.Module's look-up, which for a text of 12 tokens is 3 % of the time
            held = module._buffers
            return cls(held["weight"], module._parameters["bias"], held["scale"])  # type: ignore[arg-type]
        return cls(module.rows() if type(module) is PackedLinear else module.weight, module.bias)

    def __call__(self, x: Tensor, quick_gelu: bool | None = None) -> Tensor:
        """x [..., in] -> [..., out]; ``quick_gelu``: the activation of an int8 one."""
        if self.scale is None:
            return linear(x, self.weight, self.bias)
        return int8_linear(x, self.weight, self.scale, self.bias, quick_gelu)


class Norm(NamedTuple):
    weight: Tensor  # [C]
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight, module.bias, module.eps)


class Layout(NamedTuple):
    """How the tokens of a batch lie: packed one behind the other, or dense with ``cu_seqlens`` None."""

    read: Any = None  # the index of the token that is read out of each sequence
    causal: bool = False
    cu_seqlens: Tensor | None = None  # int32 [B + 1]: where each sequence starts, and T
    max_length: int | None = None

    def rows(self, x: Tensor) -> Tensor:
        """int32 [B]: which rows of x [B, L, C], or [T, C], are read."""
        if self.cu_seqlens is not None:
            return self.read
        return torch.arange(x.shape[0] * x.shape[1], dtype=torch.int32, device=x.device).view(x.shape[:2])[self.read]


class Stream(NamedTuple):
    """Token states on their way through fused blocks."""

    s: Tensor  # [B, L, C], or packed [T, C]
    update: Tensor | None  # as s: what the block before still owes to s
    layout: Layout
    read: bool = False  # whether the next block works for the token that is read alone; afterwards that it did

    def settled(self) -> Tensor:
        return self.s if self.update is None else self.s + self.update


class Parts(NamedTuple):
    """The tensors of a residual attention block, pre-norm."""

    heads: int
    ln_1: Norm
    qkv: tuple[Linear, ...]  # one of [3C, C], or those of queries, keys and values apart
    out: Linear
    ln_2: Norm
    fc: Linear
    activation: bool | Callable[[Tensor], Tensor]  # True: QuickGELU, False: exact GELU, or what maps each number
    proj: Linear
    scales: tuple[Tensor, Tensor] | None = None  # [C] each: layer scale of either branch
    products: torch.dtype | None = None  # of the matrix products; None: as the weights are

    def lowered(self, read: bool) -> Parts:
        """With weights in the dtype of the products. Of a block that is read, pooling multiplies with the queries', keys' and
        values', and stays as it is."""
        if self.products is None:
            return self
        qkv = self.qkv if read else tuple(self._low(part) for part in self.qkv)
        return self._replace(qkv=qkv, out=self._low(self.out), fc=self._low(self.fc), proj=self._low(self.proj))

    def _low(self, part: Linear) -> Linear:
        return part._replace(weight=part.weight.to(self.products))


def fused_block(stream: Stream, parts: Parts) -> Stream:
    """One block: [..., C] -> the same; of a stream to be read -> [B, C], at the token that is read alone."""
    s, update, layout, read = stream
    parts = parts.lowered(read)
    x, s = (normed(s, parts.ln_1), s) if update is None else normed(s, parts.ln_1, update)
    y = _pool(x, parts, layout) if read else _attend(x, parts, layout)
    y = parts.out(y)
    x, s = normed(s[layout.read] if read else s, parts.ln_2, y if parts.scales is None else y * parts.scales[0])
    fc, proj, act = parts.fc, parts.proj, parts.activation
    if isinstance(act, bool) and fc.scale is not None:
        y = proj(fc(x, act))
    elif isinstance(act, bool) and fc.bias is not None:
        y = mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, act)  # type: ignore[arg-type]
    else:
        act = act if callable(act) else QuickGELU() if act else nn.GELU()
        y = proj(act(fc(x)))
    return Stream(s, y if parts.scales is None else y * parts.scales[1], layout, read)


def normed(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Any:
    """The layer norm of x, or (that of x + residual, x + residual)."""
    return layer_norm(x, norm.weight, norm.bias, residual, norm.eps)


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] @ weight [C, D]."""
    return x @ weight if watched() or type(weight) not in (Tensor, nn.Parameter) else linear(x, weight.T)


def _attend(x: Tensor, parts: Parts, layout: Layout) -> Tensor:
    """x [..., C] -> [..., C]: every token attends."""
    qkv = joined_linear(x, parts.qkv)
    return attention(qkv, parts.heads, causal=layout.causal, cu_seqlens=layout.cu_seqlens, max_length=layout.max_length)


def joined_linear(x: Tensor, parts: tuple[Linear, ...]) -> Tensor:
    """x [..., C] through several projections, side by side: one product of joined weights, or joined results, whichever is the
    smaller copy."""
    if len(parts) == 1:
        return parts[0](x)
    if x.numel() < parts[0].weight.numel() or any(part.bias is None for part in parts):
        return torch.cat([part(x) for part in parts], -1)
    return linear(x, torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))  # type: ignore[misc]


def _pool(x: Tensor, parts: Parts, layout: Layout) -> Tensor:
    """x [..., C] -> [B, C]: only the token that is read attends, to the whole sequence."""
    if (
        parts.qkv[0].scale is not None
    ):  # all keys in 8 bits: an eighth of the time of one query's products in fp32, for one text
        return _attend(x, parts, layout)[layout.read]
    if len(parts.qkv) == 1:
        weights = parts.qkv[0].weight.chunk(3)
        biases = parts.qkv[0].bias.chunk(3) if parts.qkv[0].bias is not None else (None,) * 3
    else:
        weights = tuple(p.weight for p in parts.qkv)
        biases = tuple(p.bias for p in parts.qkv)  # type: ignore[misc]
    zero = [x.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return pooling(
        x, x[layout.read], weights[0], zero[0], weights[1], weights[2], zero[2], parts.heads,
        cu_seqlens=layout.cu_seqlens, max_length=layout.max_length,
    )  # fmt: skip


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


know(QuickGELU)

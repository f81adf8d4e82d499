"""Weights laid out for inference on a CPU, in fp32 or as 8-bit integers: what stands in the place of torch's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.kernels import int8_linear
from clipfast.kernels.encoder import encoded, rows_of, strips
from clipfast.kernels.int8_linear import quantised
from clipfast.model.rule import know


class Int8Linear(nn.Module):
    """A Linear of 8-bit weights, and what it is called with rounded to 8 bits."""

    weight: Tensor  # int8, in panels
    scale: Tensor  # [C_out]
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [C_out, C_in], which is not kept; bias: [C_out], which is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows, scale = quantised(weight)
        self.register_buffer("weight", rows)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(nn.Module):
    """A Linear whose weight lies as ``encoded`` reads it; called by itself it turns it back first."""

    weight: Tensor  # in strips
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [C_out, C_in], which is not kept; bias: [C_out], which is."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", strips(weight.detach()))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def rows(self) -> Tensor:
        """[C_out, C_in]."""
        return rows_of(self.weight, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Attention(nn.Module):
    """Self-attention of 8-bit projections."""

    linear: type = Int8Linear

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attn.in_proj_weight is not None
        self.num_heads = attn.num_heads
        self.in_proj = self.linear(attn.in_proj_weight, attn.in_proj_bias)
        self.out_proj = self.linear(attn.out_proj.weight, attn.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query [L, B, C], which is key and value too -> (the same, no weights)."""
        if need_weights or query is not key or query is not value:
            raise ValueError("weights for inference: expected self-attention without its weights; ask the fp32 model for them")
        q, k, v = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 1, 3, 0, 4)  # [B, H, L, K] each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(y.permute(2, 0, 1, 3).flatten(2)), None


class PackedAttention(Int8Attention):
    """Self-attention of packed projections."""

    linear = PackedLinear


class Int8Embedding(nn.Module):
    """Rows of 8-bit integers, with a scale each."""

    rows: Tensor  # int8 [V, C]
    scale: Tensor  # [V, 1]

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        weight = embedding.weight.detach()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("scale", (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-36))
        self.register_buffer("rows", (weight / self.scale).round().to(torch.int8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids] * self.scale[ids]


know(Int8Linear, PackedLinear, Int8Attention, PackedAttention, Int8Embedding)
LINEARS = {Int8Attention: Int8Linear, PackedAttention: PackedLinear}  # of a frozen block: its attention, its Linears


def weights_of(block: Any) -> list[Tensor]:
    """What ``freeze`` takes from a residual attention block."""
    return [block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]


def freeze(block: Any, attention: type[Int8Attention]) -> None:
    """The attention and the Linears of a residual attention block as those of that kind, in place."""
    block.attn = attention(block.attn)
    for name in ("c_fc", "c_proj"):
        layer = getattr(block.mlp, name)
        setattr(block.mlp, name, attention.linear(layer.weight, layer.bias))


class Frozen:
    """Blocks as ``encoded`` takes them, several in one call: frozen in one way, of one size, each Linear with a bias."""

    def __init__(self, blocks: Sequence[Any], quick_gelu: type) -> None:
        self.parameters: list[Any] = []
        self.scales: list[Tensor] = []
        kinds = {self._add(block, quick_gelu) for block in blocks}
        self.kind = kinds.pop()
        self.fits = not kinds and None not in self.kind and all([p is not None for p in self.parameters])

    def _add(self, block: Any, quick_gelu: type) -> tuple[Any, ...]:
        """What all blocks share: heads, eps, activation; None in it is what ``encoded`` has not. It reads past nn.Module's
        look-up, which would take a tenth of the time of a text of 12 tokens."""
        own = block.__dict__["_modules"]
        attn, ln_1, ln_2, layers = own["attn"], own["ln_1"], own["ln_2"], own["mlp"].__dict__["_modules"]
        inner, gelu = attn.__dict__["_modules"], layers["gelu"]
        for norm, linears in ((ln_1, (inner["in_proj"], inner["out_proj"])), (ln_2, (layers["c_fc"], layers["c_proj"]))):
            held = norm.__dict__["_parameters"]
            self.parameters += (held["weight"], held["bias"])
            for linear in linears:
                buffers = linear.__dict__["_buffers"]
                self.parameters += (buffers["weight"], linear.__dict__["_parameters"]["bias"])
                if "scale" in buffers:
                    self.scales.append(buffers["scale"])
        quick = type(gelu) is quick_gelu or (None if type(gelu) is not nn.GELU or gelu.approximate != "none" else False)
        scaled = own.get("ls_1") is not None or own.get("ls_2") is not None
        return attn.num_heads, ln_1.eps if ln_1.eps == ln_2.eps else None, None if scaled else quick, type(attn)

    def __call__(self, x: Tensor, causal: bool, cu_seqlens: Tensor | None, read: Tensor | None) -> Tensor:
        """x [B, L, C] or [T, C] -> the same, or [R, C] at the rows that are read."""
        heads, eps, quick_gelu, _ = self.kind
        return encoded(
            x,
            self.parameters,
            self.scales,
            heads,
            causal=causal,
            quick_gelu=quick_gelu,
            cu_seqlens=cu_seqlens,
            read=read,
            eps=eps,
        )

"""A model whose weights are 8-bit integers, for inference on a CPU: what stands in the place of torch's modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.kernels import int8_linear
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


class Int8Attention(nn.Module):
    """Self-attention of 8-bit projections."""

    def __init__(self, attn: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attn.in_proj_weight is not None
        self.num_heads = attn.num_heads
        self.in_proj = Int8Linear(attn.in_proj_weight, attn.in_proj_bias)
        self.out_proj = Int8Linear(attn.out_proj.weight, attn.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query [L, B, C], which is key and value too -> (the same, no weights)."""
        if need_weights or query is not key or query is not value:
            raise ValueError("int8 weights: expected self-attention without its weights; ask the fp32 model for them")
        q, k, v = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 1, 3, 0, 4)  # [B, H, L, K] each
        y = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(y.permute(2, 0, 1, 3).flatten(2)), None


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


know(Int8Linear, Int8Attention, Int8Embedding)


def weights_of(block: Any) -> list[Tensor]:
    """What ``quantise`` takes from a residual attention block."""
    return [block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]


def quantise(block: Any) -> None:
    """The Linears of a residual attention block as 8-bit ones, in place."""
    block.attn = Int8Attention(block.attn)
    for name in ("c_fc", "c_proj"):
        layer = getattr(block.mlp, name)
        setattr(block.mlp, name, Int8Linear(layer.weight, layer.bias))

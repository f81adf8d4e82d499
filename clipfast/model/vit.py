"""The image tower as a vision transformer (paper, section 2.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipfast.inputs.image import Preprocess
from clipfast.kernels import linear
from clipfast.model import scripted
from clipfast.model.fused import Layout, Stream, projected
from clipfast.model.pixels import Pixels
from clipfast.model.rule import untouched, whole
from clipfast.model.transformer import LayerNorm, Transformer

POOLS = ("token", "average")


class VisionTransformer(Pixels, nn.Module):
    """ViT with one more layer norm before the transformer (paper, section 2.4).

    Args:
        input_resolution, patch_size: pixels a side.
        width, layers, heads: of the transformer.
        output_dim: D.
        channels: of the images.
        ln_pre: whether there is a layer norm before the transformer.
        pool: what is normalised and projected: the class token, or the average of the patches.
        options: the blocks', see ``ResidualAttentionBlock``.
    """

    def __init__(
        self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int, *,
        channels: int = 3, ln_pre: bool = True, pool: str = "token", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"expected a pool of {', '.join(POOLS)}, got {pool!r}")
        self.input_resolution, self.output_dim, self.pool = input_resolution, output_dim, pool
        self.preprocess = Preprocess(input_resolution)
        self.patch_dropout = 0.0  # share of the patches that are left out in training (Li et al. 2023)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size, bias=False)
        scale, eps = width**-0.5, options.get("eps", 1e-5)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        tokens = (input_resolution // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre: nn.Module = LayerNorm(width, eps) if ln_pre else nn.Identity()
        self.transformer = Transformer(width, layers, heads, **options)
        self.ln_post: nn.Module = LayerNorm(width, eps)
        self.proj: nn.Parameter | None = nn.Parameter(scale * torch.randn(width, output_dim))

    layout = Layout(read=(slice(None), 0))

    def embed(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] -> [B, L, C]: class token and patches, with positions, normalised."""
        conv = self.conv1
        x = patches(conv, x) if tiles(conv) and x.shape[1] == conv.weight.shape[1] else conv(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        return drop_patches(x, self.patch_dropout) if self.training and self.patch_dropout else x

    def project(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., output_dim]."""
        x = self.ln_post(x)
        return x if self.proj is None else projected(x, self.proj)

    def fits(self, channels: int, height: int, width: int) -> bool:
        """Whether images of that size have the channels and as many patches as there are positions; a convolution that was
        replaced or changed says so itself."""
        conv = self.conv1
        if not tiles(conv):
            return True
        p, q = conv.kernel_size
        return channels == conv.weight.shape[1] and (height // p) * (width // q) + 1 == self.positional_embedding.shape[-2]

    def pooled(self, x: Tensor) -> Tensor:
        """States after the last block [B, L, C] -> [B, C]."""
        return x[:, 0, :] if self.pool == "token" else x[:, 1:].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.pool == "token" and whole(self.transformer, Transformer) and untouched(self.transformer.resblocks):
            return self.project(self.transformer(Stream(x, None, self.layout)))
        return self.project(self.pooled(self.transformer(x.transpose(0, 1)).transpose(0, 1)))

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.VisionTransformer(self)

    # ---- open_clip's calls

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.input_resolution, self.input_resolution)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """No gradients but for the last groups: embeddings, each block, the last block with ``ln_post``, ``proj`` (LiT)."""
        blocks = [*self.transformer.resblocks]
        first = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        groups = [first, *([block] for block in blocks[:-1]), [blocks[-1], self.ln_post], [self.proj]]
        self.requires_grad_(False)
        for part in sum(groups[-unlocked_groups:], []) if unlocked_groups else []:
            if part is not None:
                part.requires_grad_(True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names that open_clip's optimiser does not decay beside those of one dimension."""
        return {"positional_embedding", "class_embedding"}


def tiles(conv: Any) -> bool:
    """Whether a convolution is untouched and its patches neither overlap nor leave gaps."""
    return (
        type(conv) is nn.Conv2d and untouched(conv) and conv.kernel_size == conv.stride and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1) and conv.groups == 1
    )  # fmt: skip


def patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """x [B, channels, H, W] through a convolution of ``tiles`` -> [B, patches, C].

    It is one product, which takes 0.5 to 0.7 of the convolution's time at B/32 on a CPU.
    """
    (p, q), (H, W) = conv.kernel_size, x.shape[2:]
    x = x[..., : H // p * p, : W // q * q].unflatten(3, (W // q, q)).unflatten(2, (H // p, p))
    return linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), conv.weight.flatten(1), conv.bias)


def drop_patches(s: Tensor, share: float) -> Tensor:
    """s [B, L, C], class token first: each image keeps a random 1 - share of its patches, and its class token."""
    B, L, C = s.shape
    kept = torch.rand(B, L - 1, device=s.device).argsort(1)[:, : max(1, round((L - 1) * (1 - share)))] + 1
    index = torch.cat([kept.new_zeros(B, 1), kept], 1)  # their order is free: positions are in them already
    return s.gather(1, index[..., None].expand(-1, -1, C))

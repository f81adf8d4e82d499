"""What ``torch.jit.script`` sees of the towers: the same weights in modules of torch's own operators, which it can compile."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.Module):
    def __init__(self, ln: Any) -> None:
        super().__init__()
        self.shape, self.weight, self.bias, self.eps = list(ln.normalized_shape), ln.weight, ln.bias, ln.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            return F.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps).to(x.dtype)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attn, self.ln_1, self.mlp, self.ln_2 = block.attn, block.ln_1, block.mlp, block.ln_2
        self.ls_1, self.ls_2 = block.ls_1 or nn.Identity(), block.ls_2 or nn.Identity()
        self.mask: Tensor | None
        self.register_buffer("mask", block.attn_mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [L, B, C] -> the same."""
        mask, y, L = self.mask, self.ln_1(x), x.shape[0]
        if mask is not None:
            mask = mask[..., :L, :L].to(dtype=x.dtype, device=x.device)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.resblocks = transformer.resblocks

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        if tower.patch_dropout:
            raise ValueError(f"torch.jit.script: expected a tower with patch_dropout = 0, got {tower.patch_dropout}; set it so")
        self.conv1, self.ln_pre, self.transformer, self.ln_post = tower.conv1, tower.ln_pre, tower.transformer, tower.ln_post
        self.class_embedding, self.positional_embedding = tower.class_embedding, tower.positional_embedding
        self.proj, self.averages = tower.proj, tower.pool == "average"

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)).transpose(0, 1))
        x = self.ln_post(x[1:].mean(0) if self.averages else x[0])
        return x if self.proj is None else x @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = block.conv1, block.bn1, block.relu1
        self.conv2, self.bn2, self.relu2 = block.conv2, block.bn2, block.relu2
        self.avgpool, self.conv3, self.bn3, self.relu3 = block.avgpool, block.conv3, block.bn3, block.relu3
        self.downsample = block.downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.relu3(self.bn3(self.conv3(self.avgpool(y))) + self.downsample(x))


class AttentionPool2d(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.num_heads, self.positional_embedding = pool.num_heads, pool.positional_embedding
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None].to(x.dtype)
        q, k, v = self.q_proj(x[:1]), self.k_proj(x), self.v_proj(x)
        q, k, v = [y.unflatten(2, [self.num_heads, -1]).permute(1, 2, 0, 3) for y in (q, k, v)]
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = tower.conv1, tower.bn1, tower.relu1
        self.conv2, self.bn2, self.relu2 = tower.conv2, tower.bn2, tower.relu2
        self.conv3, self.bn3, self.relu3, self.avgpool = tower.conv3, tower.bn3, tower.relu3, tower.avgpool
        self.layer1, self.layer2, self.layer3, self.layer4 = tower.layer1, tower.layer2, tower.layer3, tower.layer4
        self.attnpool = tower.attnpool

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        x = self.avgpool(self.relu3(self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(x)))))))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    """``encode_image``, ``encode_text`` and the logits of ``forward``; texts are [B, L] of token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual, self.transformer, self.ln_final = model.visual, model.transformer, model.ln_final
        self.token_embedding, self.positional_embedding = model.token_embedding, model.positional_embedding
        self.text_projection, self.logit_scale, self.logit_bias = model.text_projection, model.logit_scale, model.logit_bias
        self.end_token: int = -2 if model.end_token is None else model.end_token  # -2: the largest id

    @torch.jit.export
    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image.to(self.positional_embedding.dtype))
        return F.normalize(features, dim=-1) if normalize else features

    @torch.jit.export
    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        x = self.ln_final(self.transformer(x.transpose(0, 1))).transpose(0, 1)
        if self.end_token == -2:
            at = text.argmax(-1)
        elif self.end_token == -1:
            at = torch.full_like(text[:, 0], text.shape[1] - 1).long()
        else:
            at = (text == self.end_token).int().argmax(-1)
        x = x[torch.arange(text.shape[0], device=x.device), at]
        features = x if self.text_projection is None else x @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        images, texts = self.encode_image(image, True), self.encode_text(text, True)
        logits = self.logit_scale.exp() * images @ texts.t()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.t()

"""What ``torch.jit.script`` sees of the towers: the same weights in modules of torch's own operators, which it can compile."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def twin(module: nn.Module) -> nn.Module:
    """A module for TorchScript to take, which replaces submodules in place: its containers are copies, its weights are not."""
    prepared: Any = getattr(module, "__prepare_scriptable__", None)
    if prepared is not None:
        return prepared()
    other = copy.copy(module)
    other._modules = {name: None if child is None else twin(child) for name, child in module._modules.items()}
    return other


class _Twin(nn.Module):
    def __init__(self, original: Any, *names: str) -> None:
        """names: of modules, weights and numbers that are the original's."""
        super().__init__()
        for name in names:
            value = getattr(original, name)
            setattr(self, name, twin(value) if isinstance(value, nn.Module) else value)

    if TYPE_CHECKING:  # what ``names`` named

        def __getattr__(self, name: str) -> Any: ...


class LayerNorm(_Twin):
    def __init__(self, ln: Any) -> None:
        super().__init__(ln, "weight", "bias", "eps")
        self.shape = list(ln.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            return F.layer_norm(x.float(), self.shape, self.weight, self.bias, self.eps).to(x.dtype)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class Block(_Twin):
    def __init__(self, block: Any) -> None:
        super().__init__(block, "attn", "ln_1", "mlp", "ln_2")
        self.ls_1, self.ls_2 = (nn.Identity() if scale is None else twin(scale) for scale in (block.ls_1, block.ls_2))
        self.mask: Tensor | None
        self.register_buffer("mask", block.attn_mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [L, B, C] -> the same."""
        mask, y, L = self.mask, self.ln_1(x), x.shape[0]
        if mask is not None:
            mask = mask[..., -L:, -L:].to(dtype=x.dtype, device=x.device)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False, attn_mask=mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(_Twin):
    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer, "resblocks")

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(_Twin):
    def __init__(self, tower: Any) -> None:
        super().__init__(tower, "conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post", "proj")
        self.averages = tower.pool == "average"
        if tower.patch_dropout:
            raise ValueError(f"torch.jit.script: expected a tower with patch_dropout = 0, got {tower.patch_dropout}; set it so")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)).transpose(0, 1))
        x = self.ln_post(x[1:].mean(0) if self.averages else x[0])
        return x if self.proj is None else x @ self.proj


_UNITS = tuple(f"{part}{number}" for number in (1, 2, 3) for part in ("conv", "bn", "relu"))


class Bottleneck(_Twin):
    def __init__(self, block: Any) -> None:
        super().__init__(block, *_UNITS, "avgpool")
        self.downsample = nn.Identity() if block.downsample is None else twin(block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.relu3(self.bn3(self.conv3(self.avgpool(y))) + self.downsample(x))


class AttentionPool2d(_Twin):
    def __init__(self, pool: Any) -> None:
        super().__init__(pool, "num_heads", "positional_embedding", "q_proj", "k_proj", "v_proj", "c_proj")

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None].to(x.dtype)
        q, k, v = self.q_proj(x[:1]), self.k_proj(x), self.v_proj(x)
        q, k, v = [y.unflatten(2, [self.num_heads, -1]).permute(1, 2, 0, 3) for y in (q, k, v)]
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(_Twin):
    def __init__(self, tower: Any) -> None:
        super().__init__(tower, *_UNITS, "avgpool", "layer1", "layer2", "layer3", "layer4", "attnpool")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
        x = self.avgpool(self.relu3(self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(x)))))))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(_Twin):
    """``encode_image``, ``encode_text`` and the logits of ``forward``; texts are [B, L] of token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__(
            model, "visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
            "logit_scale", "logit_bias",
        )  # fmt: skip
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

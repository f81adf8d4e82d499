"""What every token was after each block, as open_clip gives it: the whole towers, without their short cuts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clipfast.model.resnet import ModifiedResNet
from clipfast.model.vit import VisionTransformer


def taken(blocks: int, indices: int | list[int] | None) -> list[int]:
    """Which of so many blocks: all, the last so many, or those named (negative ones from the end)."""
    if indices is None:
        return list(range(blocks))
    named = list(range(blocks - indices, blocks)) if isinstance(indices, int) else list(indices)
    if (isinstance(indices, int) and not 0 < indices <= blocks) or any(not -blocks <= i < blocks for i in named):
        raise ValueError(f"forward_intermediates: expected indices among {blocks} blocks, got {indices}")
    return sorted({i % blocks for i in named})


def image_intermediates(
    visual: VisionTransformer | ModifiedResNet, x: Tensor, indices: int | list[int] | None, normalize: bool, only: bool,
    form: str, extra: bool,
) -> dict[str, Any]:  # fmt: skip
    """See ``CLIP.forward_intermediates``; x [B, 3, H, W]."""
    if form not in ("NCHW", "NLC") or (form == "NLC" and isinstance(visual, ModifiedResNet)):
        raise ValueError(f"forward_intermediates: expected image_output_fmt NCHW (or, of a ViT, NLC), got {form!r}")
    if isinstance(visual, ModifiedResNet):
        states = [visual.stem(x)]
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            states.append(stage(states[-1]))
        out: dict[str, Any] = {"image_intermediates": [states[i] for i in taken(len(states), indices)]}
        return out if only else out | {"image_features": visual.attnpool(states[-1])}
    B, _, height, width = x.shape
    states = []
    visual.transformer.run(visual.embed(x).transpose(0, 1), kept=states)
    kept = [states[i] for i in taken(len(states), indices)]
    kept = [visual.ln_post(state) for state in kept] if normalize else kept
    tokens, prefix = [state[:, 1:] for state in kept], [state[:, :1] for state in kept]
    if form == "NCHW":
        p, q = visual.conv1.kernel_size
        tokens = [t.reshape(B, height // p, width // q, -1).permute(0, 3, 1, 2).contiguous() for t in tokens]
    out = {"image_intermediates": tokens} | ({"image_intermediates_prefix": prefix} if extra else {})
    return out if only else out | {"image_features": visual.project(visual.pooled(states[-1]))}


def text_intermediates(
    model: Any, text: Tensor, indices: int | list[int] | None, normalize: bool, only: bool
) -> dict[str, Any]:
    """See ``CLIP.forward_intermediates``; text [B, L]."""
    states: list[Tensor] = []
    model.transformer.run(model.embed_text(text).transpose(0, 1), kept=states)
    kept = [states[i] for i in taken(len(states), indices)]
    out: dict[str, Any] = {"text_intermediates": [model.ln_final(state) for state in kept] if normalize else kept}
    if only:
        return out
    at = (model.ends(text).new_tensor(range(len(text))), model.ends(text))
    return out | {"text_features": model._project(model.ln_final(states[-1])[at])}

"""The rivals, built on our sizes and weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

try:
    import torchvision  # noqa: F401
except RuntimeError:  # PyPI's build beside a CPU build of torch: two operators are missing, which CLIP never calls
    _TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# From the repository's root transformers would take our folder kernels/ for the PyPI package of that name.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

import open_clip  # noqa: E402


def open_clip_model(sizes: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """open_clip's CLIP of these sizes (clipfast.CLIP's arguments) with these weights."""
    vision = dict(
        image_size=sizes["image_resolution"], layers=sizes["vision_layers"], width=sizes["vision_width"],
        patch_size=sizes["vision_patch_size"],
    )  # fmt: skip
    text = dict(
        context_length=sizes["context_length"], vocab_size=sizes["vocab_size"], width=sizes["transformer_width"],
        heads=sizes["transformer_heads"], layers=sizes["transformer_layers"],
    )  # fmt: skip
    model = open_clip.model.CLIP(sizes["embed_dim"], vision, text, quick_gelu=sizes.get("quick_gelu", True))
    model.load_state_dict(state, strict=False)
    missing = set(state) ^ {k for k in model.state_dict() if k != "attn_mask"}
    if missing:
        raise ValueError(f"open_clip's model of these sizes has other keys: {sorted(missing)}")
    return model

"""Our attention as one of transformers' attention implementations: ``attn_implementation="clipfast"``.

It may be named once ``clipfast.interop.transformers`` is imported, or anything has been accelerated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from clipfast.kernels import attention

NAME = "clipfast"
# Arguments that change nothing where they are None, False or 0, and what else may come along with any value.
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "use_cache"}


def register() -> None:
    """Register the implementation, with sdpa's masks: None where all may attend to all, or a causal mask hides nothing more."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query, key, value [B, H, L, K] -> ([B, L, H, K], None): by our kernel where all or all before attend, else by sdpa."""
    H, L, K = query.shape[1:]
    asked = {name for name, given in kwargs.items() if given is not None and given is not False} - _HARMLESS
    fused = attention_mask is None and not dropout and not asked and query.shape == key.shape == value.shape
    if not fused or scaling not in (None, K**-0.5) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    qkv = torch.cat([t.transpose(1, 2).flatten(2) for t in (query, key, value)], -1)
    return attention(qkv, H, causal=bool(causal)).unflatten(-1, (H, K)), None

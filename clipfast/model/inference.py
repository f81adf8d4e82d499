"""Copies of a model for inference: batch norms folded, weights laid out for single requests, in bf16 or in 8 bits."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

from clipfast.kernels import OPS
from clipfast.kernels.dispatch import forced
from clipfast.kernels.linear import onednn
from clipfast.model.frozen import Int8Attention, Int8Embedding, PackedAttention, freeze, weights_of
from clipfast.model.products import slow_in_bf16
from clipfast.model.resnet import ModifiedResNet
from clipfast.model.rule import untouched

if TYPE_CHECKING:
    from clipfast.model.clip import CLIP


def prepared(model: CLIP, packed: bool, int8: bool, bf16: bool) -> CLIP:
    """See ``CLIP.for_inference``."""
    if packed + int8 + bf16 > 1:
        raise ValueError("for_inference: expected one of packed, int8 and bf16, got several; each packs its weights")
    reason = _not_packed(model) if packed else _not_in_bf16(model) if bf16 else None
    if reason:
        warnings.warn(f"for_inference: weights are not {'packed' if packed else 'in bf16'}: {reason}", stacklevel=3)
        packed = bf16 = False
    made = (_frozen(model, int8) if packed or int8 else copy.deepcopy(model)).eval().requires_grad_(False)
    if isinstance(made.visual, ModifiedResNet):
        made.visual.fold_batch_norms()
    for transformer in made._transformers() if bf16 else ():
        transformer.pack_in_bf16()
    return made


def _not_packed(model: CLIP) -> str | None:
    if model.bag:
        return "a bag of words has no blocks"
    if _kept(model) != "torch.float32 on cpu":
        return f"expected float32 on the CPU, got {_kept(model)}"
    if (backend := forced()) not in (None, "cpu"):
        return f"{backend} is forced, which does not read them"
    found = OPS["encoder"].backend("cpu")
    return found if isinstance(found, str) else None


def _not_in_bf16(model: CLIP) -> str | None:
    if model.bag:
        return "a bag of words has no blocks"
    return onednn.lacks_packed(model.transformer.resblocks[0].mlp.c_fc.weight) or slow_in_bf16(model)


def _kept(model: CLIP) -> str:
    return f"{model.frozen or model.dtype} on {model.positional_embedding.device}"


def _frozen(model: CLIP, int8: bool) -> CLIP:
    """A copy with weights that are laid out, or rounded; these are not copied before."""
    if _kept(model) != "torch.float32 on cpu":
        raise ValueError(f"for_inference(int8=True): expected a float32 model on the CPU, got {_kept(model)}")
    untaken = [w for t in model._transformers() for block in t.freezable(int8) for w in weights_of(block)]
    rounds = int8 and untouched(model.token_embedding)
    untaken += [model.token_embedding.weight] if rounds else []
    made = copy.deepcopy(model, {id(w): w for w in untaken})
    for transformer in made._transformers():
        for block in transformer.freezable(int8):
            freeze(block, Int8Attention if int8 else PackedAttention)
    if rounds:
        made.token_embedding = Int8Embedding(model.token_embedding)  # type: ignore[assignment]
    made.frozen = "int8" if int8 else "packed"
    return made

"""transformers: the encoder blocks of CLIP and its kin, and what stands before and behind them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import output_capturing

from clipfast.interop import attention_interface
from clipfast.interop.accelerate import bare, original
from clipfast.kernels import linear, pooling
from clipfast.model.fused import Layout, Linear, Norm, Parts, Stream, fused_block
from clipfast.model.rule import know, untouched
from clipfast.model.vit import patches, tiles

# Activations that map each number for itself.
_ACTIVATIONS = {
    activations.QuickGELUActivation, activations.GELUActivation, activations.GELUTanh, activations.NewGELUActivation,
    activations.SiLUActivation, nn.GELU, nn.ReLU, nn.SiLU,
}  # fmt: skip
know(*_ACTIVATIONS)
# What a call may carry beside its tensors without asking for what is not computed.
HARMLESS = {"is_causal", "output_attentions", "output_hidden_states", "return_dict", "use_cache"}


class Family(NamedTuple):
    """The classes of a package of transformers.models that hold a block's weights, and how they differ."""

    attention: type
    mlp: type
    encoder: type
    text_embeddings: type | None
    says_causal: bool  # whether attention hears of a causal mask from its caller, instead of from its own attribute
    two_means_highest: bool  # whether the end token 2 means the highest id of a text


FAMILIES: dict[type, Family] = {}  # of each layer's class


def lacks(layer: Any) -> str | None:
    """Why a layer's weights may not be read, or None."""
    family = FAMILIES.get(type(layer))
    if family is None:
        return f"{type(layer).__name__} is not a class that is known"
    inner = layer.__dict__["_modules"]
    attn, mlp = inner["self_attn"], inner["mlp"]
    if not _free(attn, family.attention, "attentions") or not bare(mlp, family.mlp):
        return "its self_attn or mlp is replaced, wrapped or hooked"
    own, fc = attn.__dict__["_modules"], mlp.__dict__["_modules"]
    linears = own["q_proj"], own["k_proj"], own["v_proj"], own["out_proj"], fc["fc1"], fc["fc2"]
    norms = inner["layer_norm1"], inner["layer_norm2"]
    if not untouched(*linears, *norms, fc["activation_fn"]):
        return "a linear, a norm or the activation in it is replaced, wrapped or hooked"
    if any(type(m) is not nn.Linear for m in linears) or any(type(m) is not nn.LayerNorm or m.bias is None for m in norms):
        return "a linear or a norm in it is of another class"
    if type(fc["activation_fn"]) not in _ACTIVATIONS or attn.scale != attn.head_dim**-0.5:
        return "its activation or its scale is another"
    return "attention dropout, while it trains" if attn.dropout and attn.training else None


def parts(layer: Any) -> Parts:
    attn, mlp = layer.self_attn, layer.mlp
    act = mlp.activation_fn
    if type(act) is activations.QuickGELUActivation:
        act = True
    elif type(act) is activations.GELUActivation and act.act is nn.functional.gelu:
        act = False
    return Parts(
        attn.num_heads, Norm.of(layer.layer_norm1), (Linear.of(attn.q_proj), Linear.of(attn.k_proj), Linear.of(attn.v_proj)),
        Linear.of(attn.out_proj), Norm.of(layer.layer_norm2), Linear.of(mlp.fc1), act, Linear.of(mlp.fc2),
    )  # fmt: skip


def read_parts(found: Parts) -> Parts:
    """The parts of a last block, of which one token is read. There the keys' bias, which cancels in the softmax, is not used;
    for an optimiser, and for DDP, it still has a gradient: zeros."""
    q, k, v = found.qkv
    if k.bias is None or v.bias is None or not (torch.is_grad_enabled() and k.bias.requires_grad):
        return found
    return found._replace(qkv=(q, k, Linear(v.weight, v.bias + 0 * k.bias)))


def _free(module: nn.Module, kind: type, key: str) -> bool:
    """``bare``, not counting the hooks by which transformers records ``key``, unless it does so now."""
    if bare(module, kind):
        return True
    if torch.compiler.is_compiling() or key in (output_capturing._active_collector.get() or ()):
        return False
    return bare(module, kind, but=output_capturing.__name__)


def is_causal(layer: Any, attention_mask: Tensor | None, arguments: dict[str, Any]) -> bool | None:
    """Whether a layer's attention is causal; None where it is neither that nor of all to all, or its weights are asked for."""
    attn = layer.self_attn
    implementation = attn.config._attn_implementation
    if attention_mask is not None or arguments.get("output_attentions") or arguments.keys() - HARMLESS:
        return None
    if implementation == "eager":  # which is told of causality by a mask alone
        return False
    if implementation not in ("sdpa", attention_interface.NAME):
        return None
    told = arguments.get("is_causal") if FAMILIES[type(layer)].says_causal else None
    return attn.is_causal if told is None else bool(told)


def layer(module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """A layer's forward: hidden_states [B, L, C] -> [B, L, C]."""
    if type(hidden_states) is Tensor and not lacks(module):
        causal = is_causal(module, attention_mask, kwargs)
        if causal is not None:
            return fused_block(Stream(hidden_states, None, Layout(causal=causal)), parts(module)).settled()
    return original(module, hidden_states, attention_mask, **kwargs)


def encoder(module: Any, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """An encoder's forward: all states. A layer that nobody looks into is fused, any other is called."""
    x: Any = inputs_embeds
    for one in module.layers:
        x = step(one, x, attention_mask, kwargs)
    states: Any = x.settled() if type(x) is Stream else x
    return BaseModelOutput(last_hidden_state=states)


def step(one: Any, x: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """x, states [B, L, C] or a stream, through one layer."""
    causal = is_causal(one, attention_mask, kwargs) if fusable(one) and type(x) in (Tensor, Stream) else None
    if causal is None:
        return one(x.settled() if type(x) is Stream else x, attention_mask, **kwargs)
    layout = Layout(causal=causal)
    return fused_block(Stream(x, None, layout) if type(x) is Tensor else x._replace(layout=layout), parts(one))


def fusable(one: Any) -> bool:
    """Whether a layer may be gone past."""
    checkpointed = one.training and getattr(one, "gradient_checkpointing", False)
    return not checkpointed and lacks(one) is None and _free(one, type(one), "hidden_states")


def image_embeddings(module: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of an image tower's embeddings: pixels [B, channels, R, R] -> [B, L, C]."""
    conv, side = module.patch_embedding, module.image_size
    first = getattr(module, "class_embedding", None)
    plain = tiles(conv) and conv.kernel_size == (module.patch_size, module.patch_size)
    if not plain or pixel_values.shape[1:] != (conv.in_channels, side, side) or type(first) not in (nn.Parameter, type(None)):
        return original(module, pixel_values, *args, **kwargs)
    x = patches(conv, pixel_values.to(conv.weight.dtype))
    if first is not None:
        x = torch.cat([first.expand(len(x), 1, -1), x], 1)
    return x + module.position_embedding(module.position_ids)


def pooling_head(module: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The forward of SigLIP's head: one learned query attends to all states, [B, L, C] -> [B, C]; its keys and values are not
    formed."""
    attn = module.attention
    plain = type(attn) is nn.MultiheadAttention and untouched(attn, attn.out_proj) and type(module.probe) is nn.Parameter
    plain = plain and attn.in_proj_weight is not None and attn.bias_k is None and not attn.add_zero_attn
    if not plain or attention_mask is not None or (attn.dropout and attn.training) or type(hidden_state) is not Tensor:
        more = () if attention_mask is None else (attention_mask,)
        return original(module, hidden_state, *more)
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    query = module.probe[0].expand(len(hidden_state), -1)
    y = pooling(hidden_state, query, weights[0], biases[0], weights[1], weights[2], biases[2], attn.num_heads)
    residual = linear(y, attn.out_proj.weight, attn.out_proj.bias)[:, None]
    return (residual + module.mlp(module.layernorm(residual)))[:, 0]

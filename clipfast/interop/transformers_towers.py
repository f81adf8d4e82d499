"""transformers: towers of which the pooled features are read.

The tower as a whole is what is swapped: text goes without its padding, and the last block works for the one token that is read.
The states of all tokens, which the outputs hold as well, are computed when somebody reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clipfast.interop.accelerate import bare, original
from clipfast.interop.deferred import Later, deferred
from clipfast.interop.transformers_blocks import FAMILIES, HARMLESS, fusable, is_causal, lacks, parts, read_parts, step
from clipfast.model.fused import Layout, Parts, Stream, fused_block
from clipfast.model.packed import pack
from clipfast.model.rule import untouched

OUTPUTS: dict[type, type] = {}  # of each class with a projection: what it returns
_Pooled = deferred(BaseModelOutputWithPooling)


def _pooled_only(module: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call asks a tower for nothing but the features, and the states of the last block at most."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or arguments.keys() - HARMLESS:
        return False
    if not arguments.get("return_dict", module.config.return_dict):
        return False
    recorded = ("output_attentions", "output_hidden_states")
    return not any(arguments.get(name) or getattr(module.config, name, False) for name in recorded)


def _tensors(blocks: list[Parts]) -> list[Tensor]:
    groups = [(*p.ln_1[:2], *(t for q in p.qkv for t in q), *p.out, *p.ln_2[:2], *p.fc, *p.proj) for p in blocks]
    return [t for group in groups for t in group if t is not None]


class _Last(NamedTuple):
    """An encoder's work where one state of each sequence is read."""

    state: Tensor  # [B, C]: that state
    states: Callable[[], Tensor]  # all of them [B, L, C]
    tensors: list[Tensor]  # the parameters that ``states`` reads


def _last(module: Any, x: Tensor, place: int, arguments: dict[str, Any]) -> _Last | None:
    """x [B, L, C] through a tower's blocks, the last one for the token at ``place`` alone; None where that cannot be."""
    layers = list(module.encoder.layers)
    family = FAMILIES.get(type(layers[-1])) if layers else None
    if family is None or not bare(module.encoder, family.encoder) or not fusable(layers[-1]):
        return None
    causal = is_causal(layers[-1], None, arguments)
    if causal is None or type(x) is not Tensor:
        return None
    through: Any = x
    for one in layers[:-1]:
        through = step(one, through, None, arguments)
    s, update = (through.s, through.update) if type(through) is Stream else (through, None)
    last = parts(layers[-1])
    whole = Stream(s, update, Layout(causal=causal))
    state = fused_block(Stream(s, update, Layout((slice(None), place), causal), True), read_parts(last)).settled()
    return _Last(state, lambda: fused_block(whole, last).settled(), _tensors([last]))


def pooled_image(module: Any, pixel_values: Any = None, interpolate_pos_encoding: bool = False, **kwargs: Any) -> Any:
    """The forward of an image tower with a class token, of which the pooled features are read."""
    found = None
    if type(pixel_values) is Tensor and not pixel_values.is_meta and _pooled_only(module, kwargs):
        x = module.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        found = _last(module, module.pre_layrnorm(x), 0, kwargs)
    if found is None:
        return original(module, pixel_values, interpolate_pos_encoding, **kwargs)
    later = Later(found.states, found.tensors)
    return _Pooled(last_hidden_state=later, pooler_output=module.post_layernorm(found.state))


def pooled_last(module: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
    """The forward of SigLIP's text tower, which is read at the last token."""
    found, norm = None, module.final_layer_norm
    whole = type(input_ids) is Tensor and not input_ids.is_meta and type(norm) is nn.LayerNorm and untouched(norm)
    whole = whole and (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
    if whole and _pooled_only(module, kwargs):
        x = module.embeddings(input_ids=input_ids.view(-1, input_ids.shape[-1]), position_ids=position_ids)
        found = _last(module, x, -1, kwargs)
    if found is None:
        return original(module, input_ids, attention_mask, position_ids, **kwargs)
    later = Later(lambda: norm(found.states()), [*found.tensors, norm.weight, norm.bias])
    return _Pooled(last_hidden_state=later, pooler_output=module.head(norm(found.state)))


def pooled_text(module: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
    """The forward of a causal text tower that is read at the end token: its texts go without what follows that token."""
    lengths = None
    whole = type(input_ids) is Tensor and input_ids.numel() and not input_ids.is_meta and position_ids is None
    if whole and _pooled_only(module, kwargs) and lacks_packed(module) is None:
        lengths = _lengths(module, input_ids.view(-1, input_ids.shape[-1]), attention_mask)
    if lengths is None:
        return original(module, input_ids, attention_mask, position_ids, **kwargs)
    ids = input_ids.reshape(-1, input_ids.shape[-1]).clone()  # as they are read later, whatever becomes of the argument
    tokens, positions = module.embeddings.token_embedding, module.embeddings.position_embedding
    text = pack(ids, lengths, positions.num_embeddings, tokens.num_embeddings)
    layout = Layout(text.cu_seqlens[1:] - 1, True, text.cu_seqlens, text.max_length)
    stream = Stream(tokens(text.ids) + positions(text.position), None, layout)
    blocks = [parts(one) for one in module.encoder.layers]
    for one in blocks[:-1]:
        stream = fused_block(stream, one)
    stream = fused_block(stream._replace(read=True), read_parts(blocks[-1]))
    mask = attention_mask if attention_mask is None else attention_mask.clone()
    later = Later(
        lambda: original(module, ids, mask, return_dict=True).last_hidden_state,
        _text_tensors(module, blocks), lambda: _text_tensors(module, [parts(one) for one in module.encoder.layers]),
    )  # fmt: skip
    return _Pooled(last_hidden_state=later, pooler_output=module.final_layer_norm(stream.settled()))


def lacks_packed(module: Any) -> str | None:
    """Why a text tower cannot run without padding, or None."""
    layers, inner = list(module.encoder.layers), module.embeddings
    family = FAMILIES.get(type(layers[0])) if layers else None
    if family is None or not bare(module.encoder, family.encoder):
        return "its encoder is replaced or hooked"
    for one in layers:
        if not fusable(one):
            return lacks(one) or "a layer is hooked, or is to be computed again in backward"
    if family.text_embeddings is None or not bare(inner, family.text_embeddings):
        return "its embeddings are replaced or hooked"
    tables = inner.token_embedding, inner.position_embedding
    if not untouched(*tables) or any(type(table) is not nn.Embedding for table in tables):
        return "its embeddings are replaced or hooked"
    if not untouched(module.final_layer_norm) or type(module.final_layer_norm) is not nn.LayerNorm:
        return "its final_layer_norm is replaced or hooked"
    return None


def _lengths(module: Any, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The tokens [B] of each text up to the one that is read, on the host; None where a mask hides any of them."""
    end, known = module.eos_token_id, module.embeddings.position_embedding.num_embeddings
    if type(end) is not int or ids.shape[1] > known or ids.is_floating_point():
        return None
    highest = end == 2 and FAMILIES[type(module.encoder.layers[0])].two_means_highest
    ids = ids.to(torch.int)
    read = (ids if highest else (ids == end).int()).argmax(-1)
    if attention_mask is None:
        return read.cpu() + 1
    if attention_mask.shape != ids.shape:
        return None
    behind = torch.arange(ids.shape[1], device=ids.device) > read[:, None]
    seen = (behind | attention_mask.to(ids.device, torch.bool)).all()
    *ends, seen = torch.cat([read, seen[None].to(read)]).tolist()  # one transfer
    return torch.tensor(ends) + 1 if seen else None


def _text_tensors(module: Any, blocks: list[Parts]) -> list[Tensor]:
    inner, norm = module.embeddings, module.final_layer_norm
    own = [inner.token_embedding.weight, inner.position_embedding.weight, norm.weight, norm.bias]
    return _tensors(blocks) + [t for t in own if t is not None]


def text_with_projection(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a text tower with a projection."""
    given = dict.fromkeys(("input_ids", "attention_mask", "position_ids"))
    return _projected(module, module.text_model, module.text_projection, "text_embeds", given, args, kwargs)


def image_with_projection(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of an image tower with a projection."""
    given = dict(pixel_values=None, interpolate_pos_encoding=False)
    return _projected(module, module.vision_model, module.visual_projection, "image_embeds", given, args, kwargs)


def _projected(
    module: Any,
    tower: nn.Module,
    projection: nn.Module,
    name: str,
    defaults: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    given = defaults | dict(zip(defaults, args, strict=False)) | kwargs
    kind = OUTPUTS.get(type(module))
    others = {key: value for key, value in given.items() if key not in defaults}
    if kind is None or not _pooled_only(module, others):
        return original(module, *args, **kwargs)
    given.pop("return_dict", None)
    outputs = tower(**given)
    embeds = projection(outputs.pooler_output)
    if not hasattr(outputs, "unread"):
        return kind(**{name: embeds}, last_hidden_state=outputs.last_hidden_state)
    return deferred(kind)(**{name: embeds}, last_hidden_state=outputs.unread())

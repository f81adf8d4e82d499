"""open_clip, from 3.3 on: CLIP, CustomTextCLIP, CoCa, and the towers, blocks and ResNet attention pool of its own.

Trunks of timm and text encoders of transformers inside of them are those libraries' files'.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import transformer as theirs
from open_clip.coca_model import MultimodalTransformer
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.modified_resnet import AttentionPool2d
from open_clip.timm_model import TimmModel
from open_clip.version import __version__ as version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from clipfast.interop.accelerate import Swap, Way, bare, original
from clipfast.model.fused import Layout, Linear, Norm, Parts, Stream, fused_block, projected
from clipfast.model.packed import pack
from clipfast.model.resnet import pooled_map
from clipfast.model.rule import know, untouched
from clipfast.model.transformer import causal_mask
from clipfast.model.vit import patches, tiles

if tuple(int(number) for number in version.split(".")[:2]) < (3, 3):
    raise ImportError(f"expected open_clip 3.3 or later, got {version}; convert the model instead (clipfast.convert)")

_AGAIN: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=False)  # of what is computed again in backward
_NORMS = {nn.LayerNorm, theirs.LayerNorm, theirs.LayerNormFp32}
# Activations that map each number for itself.
_ACTIVATIONS = {theirs.QuickGELU, nn.GELU, nn.ReLU, nn.SiLU, nn.Identity}
know(*_NORMS, *_ACTIVATIONS, theirs.Attention, theirs.LayerScale)
_BLOCKS = {theirs.ResidualAttentionBlock, theirs.CustomResidualAttentionBlock}
_TRANSFORMERS = {theirs.Transformer, theirs.CustomTransformer}
# What an instance may have in the place of the class's, of which ``forward`` consists.
_STEPS = {"_embeds", "_pool", "_global_pool"}


def swaps(model: nn.Module) -> Iterator[Swap]:
    """See ``accelerate``."""
    masked: set[int] = set()  # blocks of towers that hide padding, or a class token, by a mask
    for module in model.modules():
        kind, inside = type(module), vars(module)["_modules"]
        if kind is theirs.TextTransformer and _masks(module):
            masked |= {id(one) for one in inside["transformer"].modules()}
        if kind in _LEFT:
            yield Swap(module, None, _LEFT[kind])
        elif way := _way(module):
            swap = way.swap(module)
            yield swap._replace(lacks=_MASKED) if id(module) in masked else swap


def _way(module: Any) -> Way | None:
    kind = type(module)
    if kind is theirs.VisionTransformer and not _reads_one(module):
        return _ALL_STATES
    way = _WAYS.get(kind)
    return way._replace(says=_PADDED) if way and way.says == _TEXT and not _packs(module) else way


# ---- blocks


def block_lacks(module: Any) -> str | None:
    """Why a block's weights may not be read, or None."""
    inner = module.__dict__["_modules"]
    attn, mlp = inner["attn"], inner["mlp"]
    if "ln_1_kv" in inner:
        return "cross attention is not computed"
    if "attention" in module.__dict__ or not untouched(attn) or type(mlp) is not nn.Sequential or not untouched(mlp):
        return "its attn or mlp is replaced, wrapped or hooked"
    if reason := _custom_lacks(inner) if type(module) is theirs.CustomResidualAttentionBlock else _plain_lacks(attn):
        return reason
    fc = mlp.__dict__["_modules"]
    if [name for name in fc if name != "ln"] != ["c_fc", "gelu", "c_proj"]:
        return "its mlp is another"
    linears, norms = (attn.out_proj, fc["c_fc"], fc["c_proj"]), (inner["ln_1"], inner["ln_2"])
    scales = inner["ls_1"], inner["ls_2"]
    if not untouched(*linears, *norms, *scales, fc["gelu"]):
        return "a linear, a norm, a scale or the activation in it is replaced, wrapped or hooked, or of another class"
    if any(not isinstance(m, nn.Linear) for m in linears) or any(type(m) not in _NORMS or m.bias is None for m in norms):
        return "a linear or a norm in it is of another class"
    if type(fc["gelu"]) not in _ACTIVATIONS or (fc["c_fc"].bias is None) != (fc["c_proj"].bias is None):
        return "its activation is another, or a bias stands in one linear of its mlp alone"
    plain = type(scales[0]) is type(scales[1]) and type(scales[0]) in (theirs.LayerScale, nn.Identity)
    return None if plain else "its layer scale is another"


def _plain_lacks(attn: Any) -> str | None:
    if type(attn) is not nn.MultiheadAttention or attn.in_proj_weight is None or attn.in_proj_bias is None:
        return "its attention is of another class, or its projections are apart"
    if attn.bias_k is not None or attn.add_zero_attn or (attn.dropout and attn.training):
        return "its attention has more keys, or dropout while it trains"
    return None


def _custom_lacks(inner: dict[str, Any]) -> str | None:
    attn, mlp = inner["attn"], inner["mlp"]
    if type(attn) is not theirs.Attention or attn.logit_scale is not None or attn.head_scale is not None:
        return "its attention is of another class, has scaled cosines or a scale of heads"
    between = attn.ln_q, attn.ln_k, attn.ln_inner, inner["ln_attn"], getattr(mlp, "ln", None)
    if any(type(m) is not nn.Identity or not untouched(m) for m in between):
        return "a norm within attention or mlp (qk_norm, scale_attn, scale_attn_inner, scale_fc) is not computed"
    drops = attn.attn_drop, attn.out_drop
    if any(type(m) is not nn.Dropout or not bare(m, nn.Dropout) or (m.p and m.training) for m in drops):
        return "dropout, while it trains, or a hook there"
    return None


def parts(module: Any) -> Parts:
    attn, mlp = module.attn, module.mlp
    act, kind = mlp.gelu, type(mlp.gelu)
    if kind is theirs.QuickGELU:
        act = True
    elif kind is nn.GELU and act.approximate == "none":
        act = False
    scales = (module.ls_1.gamma, module.ls_2.gamma) if type(module.ls_1) is theirs.LayerScale else None
    return Parts(
        attn.num_heads, Norm.of(module.ln_1), (Linear(attn.in_proj_weight, attn.in_proj_bias),), Linear.of(attn.out_proj),
        Norm.of(module.ln_2), Linear.of(mlp.c_fc), act, Linear.of(mlp.c_proj), scales,
    )  # fmt: skip


def fusable(one: Any) -> bool:
    """Whether a block may be gone past."""
    return type(one) in _BLOCKS and bare(one, type(one)) and block_lacks(one) is None


# Masks that were compared: their version then, and whether they are causal. On a GPU a comparison waits.
_COMPARED = WeakTensorKeyDictionary()


def causality(mask: Tensor | None, length: int) -> bool | None:
    """Whether attention under this mask is causal, or of all to all (False); None where it is neither, or nobody can tell."""
    if mask is None:
        return False
    plain = type(mask) in (Tensor, nn.Parameter) and mask.is_floating_point() and not mask.is_meta
    if not plain or mask.shape != (length, length) or torch.compiler.is_compiling():
        return None
    return True if _causal(mask) else None


def _causal(mask: Tensor) -> bool:
    base = mask._base
    first = base is not None and base.ndim == 2 and base.shape[0] == base.shape[1] and base.stride() == mask.stride()
    if base is not None and first and base.storage_offset() == mask.storage_offset() and _causal(base):
        return True  # the first rows and columns of a causal mask
    if mask.is_inference():  # which count no versions
        return mask.equal(causal_mask(len(mask)).to(mask))
    found = _COMPARED.get(mask)
    if found is None or found[0] != mask._version:
        found = _COMPARED[mask] = mask._version, mask.equal(causal_mask(len(mask)).to(mask))
    return found[1]


def residual_block(
    module: Any, q_x: Any, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Any:
    """A block's forward: q_x [B, L, C], or [L, B, C] where its attention takes that, -> the same."""
    if k_x is None and v_x is None and type(q_x) is Tensor and q_x.ndim == 3 and block_lacks(module) is None:
        x = q_x if module.attn.batch_first else q_x.transpose(0, 1)
        causal = causality(attn_mask, x.shape[1])
        if causal is not None:
            x = fused_block(Stream(x, None, Layout(causal=causal)), parts(module)).settled()
            return x if module.attn.batch_first else x.transpose(0, 1)
    return original(module, q_x, k_x, v_x, attn_mask)


def custom_block(module: Any, x: Any, attn_mask: Tensor | None = None) -> Any:
    """The forward of a block with open_clip's own attention: x [B, L, C] -> the same."""
    if type(x) is Tensor and x.ndim == 3 and block_lacks(module) is None:
        causal = causality(attn_mask, x.shape[1])
        if causal is not None:
            return fused_block(Stream(x, None, Layout(causal=causal)), parts(module)).settled()
    return original(module, x, attn_mask)


def transformer(module: Any, x: Any, attn_mask: Tensor | None = None) -> Any:
    """A transformer's forward: x [B, L, C] -> the same. A block that nobody looks into is fused, any other is called."""
    if type(x) is not Tensor or x.ndim != 3 or (module.grad_checkpointing and torch.compiler.is_compiling()):
        return original(module, x, attn_mask)
    causal = causality(attn_mask, x.shape[1])
    if causal is None:
        return original(module, x, attn_mask)
    x = run(module, Stream(x, None, Layout(causal=causal)), attn_mask)
    return x.settled() if type(x) is Stream else x


def run(module: Any, x: Any, attn_mask: Tensor | None = None, read: bool = False) -> Any:
    """A stream through a transformer's blocks -> a stream, or what a block that is not fusable gave [B, L, C].

    attn_mask: as the stream's layout says, for such blocks.
    read: whether the last block, which is fusable, works for the token that is read alone.
    """
    layout, last = x.layout, len(module.resblocks) - 1
    for i, one in enumerate(module.resblocks):
        short = read and i == last
        again = module.grad_checkpointing and torch.is_grad_enabled() and not short
        if type(x) in (Tensor, Stream) and fusable(one):
            x, found = (x if type(x) is Stream else Stream(x, None, layout))._replace(read=short), parts(one)
            step = functools.partial(checkpoint, fused_block, **_AGAIN) if again else fused_block
            x = step(x, found)
        else:
            x = _as_itself(module, one, x.settled() if type(x) is Stream else x, attn_mask, again)
    return x


def _as_itself(module: Any, one: Any, x: Any, attn_mask: Tensor | None, again: bool) -> Any:
    """x [B, L, C] through one block, called as open_clip calls it."""
    x = x if module.batch_first else x.transpose(0, 1)
    x = checkpoint(one, x, None, None, attn_mask, use_reentrant=False) if again else one(x, attn_mask=attn_mask)
    return x if module.batch_first else x.transpose(0, 1)


def _transformer_lacks(module: Any) -> str | None:
    """Why a transformer may not be gone past, or its last block not work for one token, or None."""
    if type(module) not in _TRANSFORMERS or not bare(module, type(module)) or not len(module.resblocks):
        return "its transformer is replaced, wrapped or hooked"
    last = module.resblocks[-1]
    return None if fusable(last) else _why(last)


def _why(one: Any) -> str:
    return (block_lacks(one) if type(one) in _BLOCKS else None) or "a block is hooked, or of another class"


# ---- the image tower


def _reads_one(module: Any) -> bool:
    """Whether a tower gives the class token's features alone."""
    return module.attn_pool is None and module.pool_type == "tok" and not module.output_tokens


def image_tower(module: Any, x: Any) -> Any:
    """The forward of a vision transformer: x [B, channels, H, W] -> [B, D], and the tokens where it gives them."""
    if type(x) is not Tensor or x.ndim != 4 or _STEPS & module.__dict__.keys():
        return original(module, x)
    x = _patch_states(module, x)
    if _reads_one(module) and _transformer_lacks(module.transformer) is None and _plain_norm(module.ln_post):
        stream = Stream(x, None, Layout((slice(None), 0)))
        pooled, tokens = module.ln_post(run(module.transformer, stream, read=True).settled()), None
    else:
        pooled, tokens = module._pool(module.transformer(x))
    if module.proj is not None:
        pooled = projected(pooled, module.proj)
    return (pooled, tokens) if module.output_tokens else pooled


def _patch_states(module: Any, x: Tensor) -> Tensor:
    """x [B, channels, H, W] -> the states [B, L, C] that enter the blocks."""
    conv = module.conv1
    fits = tiles(conv) and x.shape[1] == conv.in_channels and x.dtype == conv.weight.dtype
    x = patches(conv, x) if fits else conv(x).flatten(2).transpose(1, 2)
    x = torch.cat([module.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
    return module.ln_pre(module.patch_dropout(x + module.positional_embedding.to(x.dtype)))


def _plain_norm(norm: Any) -> bool:
    return type(norm) in _NORMS | {nn.Identity} and untouched(norm)


def attention_pool(module: Any, x: Any) -> Any:
    """The forward of a ResNet's attention pool, x [B, C, h, w] -> [B, D]."""
    linears = module.q_proj, module.k_proj, module.v_proj, module.c_proj
    if type(x) is not Tensor or x.ndim != 4 or not untouched(*linears) or any(type(m) is not nn.Linear for m in linears):
        return original(module, x)
    return pooled_map(module, x)


# ---- the text tower


def _masks(module: Any) -> bool:
    """Whether a text tower hides padding by a mask, or has a class token."""
    return module.cls_emb is not None or module.use_pad_mask


def encode_text(module: Any, text: Any, normalize: bool = False) -> Any:
    """``CLIP.encode_text``: text [B, L] -> [B, D]."""
    whole = type(text) is Tensor and text.ndim == 2 and text.shape[1] == len(module.positional_embedding)
    end = getattr(module, "text_eos_id", None)
    features = _features(module, text, module.text_pool_type, end) if whole else None
    if features is None:
        return CLIP.encode_text(module, text, normalize)
    return F.normalize(features, dim=-1) if normalize else features


def text_tower(module: Any, text: Any) -> Any:
    """``TextTransformer.forward``: text [B, L] -> [B, D], and the tokens where it gives them."""
    whole = type(text) is Tensor and text.ndim == 2 and text.shape[1] <= len(module.positional_embedding)
    whole = whole and not (module.output_tokens or _masks(module) or _STEPS & module.__dict__.keys())
    features = _features(module, text, module.pool_type, module.eos_id) if whole else None
    return original(module, text) if features is None else features


def _features(module: Any, text: Tensor, pool: str, end: int | None) -> Tensor | None:
    """text [B, L] -> [B, D], by the last block for the one token that is read; None where that cannot be."""
    if text.is_floating_point() or not text.numel() or text_lacks(module):
        return None
    causal = causality(module.attn_mask, text.shape[1])
    at: Any = {"last": -1, "first": 0}.get(pool)
    if causal is None or (causal and pool == "first"):
        return None
    if pool in ("argmax", "eos"):
        if causal:
            x = _packed_states(module, text, pool, end)
            return None if x is None else _project(module, x)
        at = _ends(text, pool, end)
    if at is None:
        return None
    at = (slice(None) if type(at) is int else torch.arange(len(text), device=text.device), at)
    dtype = module.transformer.get_cast_dtype()
    x = module.token_embedding(text).to(dtype) + module.positional_embedding[: text.shape[1]].to(dtype)
    stream = Stream(x, None, Layout(at, causal))
    return _project(module, run(module.transformer, stream, module.attn_mask, read=True).settled())


def text_lacks(module: Any) -> str | None:
    """Why a text tower's last block cannot work for one token alone, or None."""
    if reason := _transformer_lacks(module.transformer):
        return reason
    return None if _plain_norm(module.ln_final) else "its ln_final is replaced or hooked"


def _ends(text: Tensor, pool: str, end: int | None) -> Tensor:
    """text [B, L] -> [B]: where each is read, as open_clip's ``text_global_pool`` says."""
    return text.argmax(-1) if pool == "argmax" else text.eq(end).int().argmax(-1)  # type: ignore[arg-type]


def _packed_states(module: Any, text: Tensor, pool: str, end: int | None) -> Tensor | None:
    """text [B, L] -> the states [B, C] at the end tokens, under a causal mask: what follows them is left out."""
    if text.is_meta or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    tokens, places = module.token_embedding, module.positional_embedding
    if packed_lacks(module):
        return None
    packed = pack(text, _ends(text, pool, end).cpu() + 1, len(places), tokens.num_embeddings)
    dtype = module.transformer.get_cast_dtype()
    x = tokens(packed.ids).to(dtype) + F.embedding(packed.position, places.to(dtype))
    return run(module.transformer, Stream(x, None, packed.layout()), read=True).settled()


def packed_lacks(module: Any) -> str | None:
    """Why a causal text tower cannot run without padding, or None."""
    if reason := text_lacks(module):
        return reason
    for one in module.transformer.resblocks:
        if not fusable(one):
            return _why(one)
    tokens, places = module.token_embedding, module.positional_embedding
    if type(tokens) is not nn.Embedding or not untouched(tokens) or type(places) not in (Tensor, nn.Parameter):
        return "its embeddings are replaced or hooked"
    return None


def _project(module: Any, x: Tensor) -> Tensor:
    x, projection = module.ln_final(x), module.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else projected(x, projection)


def _pool_type(module: Any) -> str:
    return module.text_pool_type if type(module) is CLIP else module.pool_type


def _packs(module: Any) -> bool:
    """Whether nothing that follows the token that is read reaches it."""
    return module.attn_mask is not None and _pool_type(module) in ("argmax", "eos")


def _text_runs_as_itself(module: Any) -> str | None:
    """For the report: why a text tower runs as itself, over its blocks, or None."""
    if type(module) is theirs.TextTransformer and (module.output_tokens or _masks(module)):
        return "it gives the states of all tokens, or hides padding by a mask"
    if _pool_type(module) == "none" or (_pool_type(module) == "first" and module.attn_mask is not None):
        return f"it is read as pool_type={_pool_type(module)!r} says"
    return packed_lacks(module) if _packs(module) else text_lacks(module)


_MASKED = "its tower hides padding by a mask, which is not computed"
_BLOCK = "layer_norm (with the residual), linear, attention, mlp"
_ROW = Way(transformer, "its blocks one after the other, the residual left to the next layer_norm")
_TEXT = "text without padding, the end token alone in the last block (pooling)"
_PADDED = "the token that is read alone in the last block (pooling); its padding is seen"
_IMAGE = "linear, in the place of the convolution"
_ALL_STATES = Way(image_tower, f"{_IMAGE}; the states of all tokens are read")
_WAYS: dict[type, Way] = {
    theirs.ResidualAttentionBlock: Way(residual_block, _BLOCK, block_lacks),
    theirs.CustomResidualAttentionBlock: Way(custom_block, _BLOCK, block_lacks),
    theirs.Transformer: _ROW,
    theirs.CustomTransformer: _ROW,
    theirs.VisionTransformer: Way(image_tower, f"{_IMAGE}; the class token alone in the last block (pooling)"),
    theirs.TextTransformer: Way(text_tower, _TEXT, _text_runs_as_itself),
    CLIP: Way(encode_text, _TEXT, _text_runs_as_itself, "encode_text"),
    AttentionPool2d: Way(attention_pool, "pooling, keys and values not formed"),
}
_LEFT = {
    theirs.AttentionalPooler: "cross attention of learned queries is not computed",
    MultimodalTransformer: "cross attention is not computed: the blocks without it are taken one by one",
    TimmModel: "its trunk is timm's: see what is said of that, or timm's models that are known",
    HFTextEncoder: "its encoder is transformers': see what is said of that, or transformers' models that are known",
}

"""timm: the blocks of its vision transformers wherever they stand, and the towers that are read at the class token.

``forward_features``, ``forward_intermediates`` and ``get_intermediate_layers`` run on the same blocks as ``forward``, which
works for the class token alone in the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed, activations
from timm.layers.format import Format
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clipfast.interop.accelerate import Swap, Way, bare, original
from clipfast.kernels import pooling
from clipfast.model.fused import Layout, Linear, Norm, Parts, Stream, fused_block
from clipfast.model.rule import know, untouched
from clipfast.model.vit import patches, tiles

# Activations that map each number for itself.
_ACTIVATIONS = {
    activations.QuickGELU, activations.GELU, activations.GELUTanh, activations.Swish, nn.GELU, nn.ReLU, nn.SiLU, nn.Identity,
}  # fmt: skip
_SCALES = {LayerScale, nn.Identity}
know(*_ACTIVATIONS, LayerNorm, LayerScale)
# What an instance may have in the place of the class's, of which ``forward`` consists.
_STEPS = {"forward_features", "forward_head", "pool", "_pos_embed"}


def swaps(model: nn.Module) -> Iterator[Swap]:
    """See ``accelerate``."""
    for module in model.modules():
        way = _WAYS.get(type(module))
        if type(module) is nn.Sequential and len(module) and all(type(one) is Block for one in module):
            way = _SEQUENCE
        if way is not None:
            yield way.swap(module)
        elif isinstance(module, VisionTransformer):
            yield Swap(module, None, "a class of its own, whose blocks are taken one by one")
        if isinstance(blocks := getattr(module, "blocks", None), nn.Sequential | nn.ModuleList):
            for one in blocks:
                if type(one) is not Block and type(one).__module__.startswith("timm.models."):
                    yield Swap(one, None, "a block of a kind that is not computed")


# ---- blocks


def block_lacks(module: Any) -> str | None:
    """Why a block's weights may not be read, or None."""
    inner = module.__dict__["_modules"]
    attn, mlp = inner["attn"], inner["mlp"]
    if type(attn) is not Attention or type(mlp) is not Mlp:
        return f"{type(attn).__name__} or {type(mlp).__name__} is not computed"
    if not bare(attn, Attention) or not bare(mlp, Mlp):
        return "its attn or mlp is wrapped or hooked"
    own, fc = attn.__dict__["_modules"], mlp.__dict__["_modules"]
    if attn.gate is not None or any(
        type(m) is not nn.Identity for m in (own["q_norm"], own["k_norm"], own["norm"], fc["norm"])
    ):
        return "a norm or a gate within attention or mlp (qk_norm, scale_norm) is not computed"
    drops = own["attn_drop"], own["proj_drop"], fc["drop1"], fc["drop2"], inner["drop_path1"], inner["drop_path2"]
    if not all(map(_idle, drops)):
        return "dropout or stochastic depth, while it trains, or a hook there"
    return _weights_lack(inner, own, fc) or _sizes_lack(attn, fc)


def _weights_lack(inner: dict[str, Any], own: dict[str, Any], fc: dict[str, Any]) -> str | None:
    linears = own["qkv"], own["proj"], fc["fc1"], fc["fc2"]
    norms, scales = (inner["norm1"], inner["norm2"]), (inner["ls1"], inner["ls2"])
    between = own["q_norm"], own["k_norm"], own["norm"], fc["norm"]
    if not untouched(*linears, *norms, *scales, *between, fc["act"]):
        return "a linear, a norm, a scale or the activation in it is replaced, wrapped or hooked, or of another class"
    if any(type(m) is not nn.Linear for m in linears) or not all(map(_plain_norm, norms)):
        return "a linear or a norm in it is of another class, or the norm is timm's fast one"
    if type(fc["act"]) not in _ACTIVATIONS or type(scales[0]) is not type(scales[1]) or type(scales[0]) not in _SCALES:
        return "its activation or its layer scale is another"
    return None


def _sizes_lack(attn: Any, fc: dict[str, Any]) -> str | None:
    width = attn.qkv.in_features
    if attn.attn_dim != width or attn.proj.out_features != width or attn.scale != attn.head_dim**-0.5:
        return "heads of another width or scale than its states' width says"
    if (fc["fc1"].bias is None) != (fc["fc2"].bias is None):
        return "a bias in one linear of its mlp alone"
    return None


def _idle(module: Any) -> bool:
    """Whether a dropout does nothing now."""
    own = module.__dict__
    if type(module) is nn.Identity:
        return bare(module, nn.Identity)
    if type(module) is nn.Dropout:
        return bare(module, nn.Dropout) and not (own["p"] and module.training)
    return bare(module, DropPath) and not (own["drop_prob"] and module.training)


def _plain_norm(module: Any) -> bool:
    known = type(module) in (nn.LayerNorm, LayerNorm) and len(module.normalized_shape) == 1
    # timm's fast norm rounds to the lower precision under autocast.
    return known and module.weight is not None and module.bias is not None and not getattr(module, "_fast_norm", False)


def parts(module: Any) -> Parts:
    attn, mlp = module.attn, module.mlp
    act, kind = mlp.act, type(mlp.act)
    if kind is activations.QuickGELU:
        act = True
    elif kind is activations.GELU or (kind is nn.GELU and act.approximate == "none"):
        act = False
    scales = (module.ls1.gamma, module.ls2.gamma) if type(module.ls1) is LayerScale else None
    return Parts(
        attn.num_heads, Norm.of(module.norm1), (Linear.of(attn.qkv),), Linear.of(attn.proj), Norm.of(module.norm2),
        Linear.of(mlp.fc1), act, Linear.of(mlp.fc2), scales,
    )  # fmt: skip


def _asks(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call carries a mask, or is to be causal."""
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))


def transformer_block(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's forward: x [B, L, C] -> the same."""
    if type(x) is Tensor and x.ndim == 3 and not _asks(args, kwargs) and block_lacks(module) is None:
        return fused_block(Stream(x, None, Layout()), parts(module)).settled()
    return original(module, x, *args, **kwargs)


def fusable(one: Any) -> bool:
    """Whether a block may be gone past."""
    return bare(one, Block) and block_lacks(one) is None


def step(one: Any, x: Any) -> Any:
    """x, states [B, L, C] or a stream, through one block."""
    if type(x) is Stream or (type(x) is Tensor and x.ndim == 3):
        if fusable(one):
            return fused_block(_stream(x), parts(one))
        return one(x.settled() if type(x) is Stream else x)
    return one(x)


def _stream(x: Any) -> Stream:
    return x if type(x) is Stream else Stream(x, None, Layout())


def sequence(module: Any, x: Any) -> Any:
    """The forward of blocks one after the other, x [B, L, C] -> the same. A block that nobody looks into is fused."""
    for one in module:
        x = step(one, x)
    return x.settled() if type(x) is Stream else x


# ---- before and behind them


def embed_lacks(module: Any) -> str | None:
    """Why patches are embedded by timm's convolution, or None."""
    if not tiles(module.proj):
        return "its convolution is replaced, wrapped or hooked, or its patches overlap"
    if not module.flatten or module.output_fmt != Format.NCHW or module.dynamic_img_pad or not module.strict_img_size:
        return "images of any size (dynamic_img_size), or patches in another layout"
    return None


def image_embeddings(module: Any, x: Any) -> Any:
    """The forward of patch embeddings: x [B, channels, H, W] -> [B, patches, C]."""
    conv, size = module.proj, module.img_size
    if embed_lacks(module) or type(x) is not Tensor or x.ndim != 4 or x.shape[1] != conv.in_channels:
        return original(module, x)
    if size is not None and x.shape[2:] != size:
        return original(module, x)  # which says so
    return module.norm(patches(conv, x))


def pool_lacks(module: Any) -> str | None:
    """Why a pool of one latent query runs as itself, or None."""
    q, kv = module.q, module.kv
    if not untouched(q, kv, module.q_norm, module.k_norm) or type(q) is not nn.Linear or type(kv) is not nn.Linear:
        return "its projections are replaced, wrapped or hooked, or it norms queries and keys"
    plain = type(module.q_norm) is type(module.k_norm) is nn.Identity and module.latent_len == 1 and module.pos_embed is None
    if not plain or not q.in_features == q.out_features == kv.in_features or module.scale != module.head_dim**-0.5:
        return "it has several queries, positions, norms, or widths that differ"
    return None if type(module.latent) is nn.Parameter else "its query is no plain parameter"


def latent_pool(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a pool of one latent query: x [B, L, C] -> [B, C]; keys and values are not formed."""
    if type(x) is not Tensor or _asks(args, kwargs) or pool_lacks(module):
        return original(module, x, *args, **kwargs)
    q, (k_weight, v_weight) = module.q, module.kv.weight.chunk(2)
    q_bias = x.new_zeros(len(q.weight)) if q.bias is None else q.bias
    v_bias = x.new_zeros(len(v_weight)) if module.kv.bias is None else module.kv.bias.chunk(2)[1]
    query = module.latent[0].expand(len(x), -1)
    y = pooling(x, query, q.weight, q_bias, k_weight, v_weight, v_bias, module.num_heads)[:, None]
    y = module.proj_drop(module.proj(y))
    if module.mlp is not None:
        y = y + module.mlp(module.norm(y))
    return y[:, 0] if module.pool == "token" else y.mean(1) if module.pool == "avg" else y


def tower_lacks(module: Any) -> str | None:
    """Why a tower runs as itself, over its blocks, or None."""
    own, blocks = module.__dict__, module.blocks
    if module.global_pool != "token" or module.attn_pool is not None:
        return "all states are read: its blocks alone are fused"
    if _STEPS & own.keys() or module.grad_checkpointing:
        return "a part of its forward is replaced, or its blocks are to be computed again in backward"
    if not bare(blocks, nn.Sequential) or not len(blocks) or type(blocks[-1]) is not Block:
        return "its blocks are replaced, hooked or of another class"
    if not bare(blocks[-1], Block) or not untouched(module.norm):
        return "its last block or its norm is replaced or hooked, or the norm is of another class"
    return block_lacks(blocks[-1])


def tower(module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a tower that is read at its class token: x [B, channels, H, W] -> [B, classes]."""
    if type(x) is not Tensor or _asks(args, kwargs) or tower_lacks(module):
        return original(module, x, *args, **kwargs)
    x = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(x))))
    *others, last = module.blocks
    for one in others:
        x = step(one, x)
    if type(x) is Stream or (type(x) is Tensor and x.ndim == 3):
        x = fused_block(_stream(x)._replace(layout=Layout((slice(None), 0)), read=True), parts(last)).settled()
    else:
        x = last(x)[:, 0]
    return module.head(module.head_drop(module.fc_norm(module.norm(x))))


_SEQUENCE = Way(sequence, "its blocks one after the other, the residual left to the next layer_norm")
_WAYS: dict[type, Way] = {
    Block: Way(transformer_block, "layer_norm (with the residual), linear, attention, mlp", block_lacks),
    PatchEmbed: Way(image_embeddings, "linear, in the place of the convolution", embed_lacks),
    AttentionPoolLatent: Way(latent_pool, "pooling, keys and values not formed", pool_lacks),
    VisionTransformer: Way(tower, "the class token alone in the last block (pooling)", tower_lacks),
}

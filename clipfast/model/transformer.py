"""Residual attention blocks: as OpenAI's modules, and fused, for whoever's modules hold the weights.

The residual stream s travels beside the update that the block before owes to it: addition and layer norm are one pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast.kernels import attention, int8_linear, layer_norm, linear, mlp, pooling
from clipfast.kernels.linear import onednn
from clipfast.model import scripted
from clipfast.model.frozen import LINEARS, Frozen, Int8Linear, PackedLinear
from clipfast.model.rule import know, plain, untouched, watched, whole

# ---- the fused block


class Linear(NamedTuple):
    weight: Tensor  # [out, in], or int8 in strips
    bias: Tensor | None
    scale: Tensor | None = None  # [out] of an int8 weight

    @classmethod
    def of(cls, module: Any) -> Linear:
        if type(module) is Int8Linear:  # read past nn.Module's look-up, which for a text of 12 tokens is 3 % of the time
            held = module._buffers
            return cls(held["weight"], module._parameters["bias"], held["scale"])  # type: ignore[arg-type]
        return cls(module.rows() if type(module) is PackedLinear else module.weight, module.bias)

    def __call__(self, x: Tensor, quick_gelu: bool | None = None) -> Tensor:
        """x [..., in] -> [..., out]; ``quick_gelu``: the activation of an int8 one."""
        if self.scale is None:
            return linear(x, self.weight, self.bias)
        return int8_linear(x, self.weight, self.scale, self.bias, quick_gelu)


class Norm(NamedTuple):
    weight: Tensor  # [C]
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm:
        return cls(module.weight, module.bias, module.eps)


class Layout(NamedTuple):
    """How the tokens of a batch lie: packed one behind the other, or dense with ``cu_seqlens`` None."""

    read: Any = None  # the index of the token that is read out of each sequence
    causal: bool = False
    cu_seqlens: Tensor | None = None  # int32 [B + 1]: where each sequence starts, and T
    max_length: int | None = None

    def rows(self, x: Tensor) -> Tensor:
        """int32 [B]: which rows of x [B, L, C], or [T, C], are read."""
        if self.cu_seqlens is not None:
            return self.read
        return torch.arange(x.shape[0] * x.shape[1], dtype=torch.int32, device=x.device).view(x.shape[:2])[self.read]


class Stream(NamedTuple):
    """Token states on their way through fused blocks."""

    s: Tensor  # [B, L, C], or packed [T, C]
    update: Tensor | None  # as s: what the block before still owes to s
    layout: Layout
    read: bool = False  # whether the next block works for the token that is read alone; afterwards that it did

    def settled(self) -> Tensor:
        return self.s if self.update is None else self.s + self.update


class Parts(NamedTuple):
    """The tensors of a residual attention block, pre-norm."""

    heads: int
    ln_1: Norm
    qkv: tuple[Linear, ...]  # one of [3C, C], or those of queries, keys and values apart
    out: Linear
    ln_2: Norm
    fc: Linear
    activation: bool | Callable[[Tensor], Tensor]  # True: QuickGELU, False: exact GELU, or what maps each number
    proj: Linear
    scales: tuple[Tensor, Tensor] | None = None  # [C] each: layer scale of either branch
    products: torch.dtype | None = None  # of the matrix products; None: as the weights are

    def lowered(self, read: bool) -> Parts:
        """With weights in the dtype of the products. Of a block that is read, pooling multiplies with the queries', keys' and
        values', and stays as it is."""
        if self.products is None:
            return self
        qkv = self.qkv if read else tuple(self._low(part) for part in self.qkv)
        return self._replace(qkv=qkv, out=self._low(self.out), fc=self._low(self.fc), proj=self._low(self.proj))

    def _low(self, part: Linear) -> Linear:
        return part._replace(weight=part.weight.to(self.products))


def block(stream: Stream, parts: Parts) -> Stream:
    """One block: [..., C] -> the same; of a stream to be read -> [B, C], at the token that is read alone."""
    s, update, layout, read = stream
    parts = parts.lowered(read)
    x, s = (normed(s, parts.ln_1), s) if update is None else normed(s, parts.ln_1, update)
    y = _pool(x, parts, layout) if read else _attend(x, parts, layout)
    y = parts.out(y)
    x, s = normed(s[layout.read] if read else s, parts.ln_2, y if parts.scales is None else y * parts.scales[0])
    fc, proj, act = parts.fc, parts.proj, parts.activation
    if isinstance(act, bool) and fc.scale is not None:
        y = proj(fc(x, act))
    elif isinstance(act, bool) and fc.bias is not None:
        y = mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, act)  # type: ignore[arg-type]
    else:
        act = act if callable(act) else QuickGELU() if act else nn.GELU()
        y = proj(act(fc(x)))
    return Stream(s, y if parts.scales is None else y * parts.scales[1], layout, read)


def normed(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Any:
    """The layer norm of x, or (that of x + residual, x + residual)."""
    return layer_norm(x, norm.weight, norm.bias, residual, norm.eps)


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., C] @ weight [C, D]."""
    return x @ weight if watched() or type(weight) not in (Tensor, nn.Parameter) else linear(x, weight.T)


def _attend(x: Tensor, parts: Parts, layout: Layout) -> Tensor:
    """x [..., C] -> [..., C]: every token attends."""
    qkv = joined_linear(x, parts.qkv)
    return attention(qkv, parts.heads, causal=layout.causal, cu_seqlens=layout.cu_seqlens, max_length=layout.max_length)


def joined_linear(x: Tensor, parts: tuple[Linear, ...]) -> Tensor:
    """x [..., C] through several projections, side by side: one product of joined weights, or joined results, whichever is the
    smaller copy."""
    if len(parts) == 1:
        return parts[0](x)
    if x.numel() < parts[0].weight.numel() or any(part.bias is None for part in parts):
        return torch.cat([part(x) for part in parts], -1)
    return linear(x, torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))  # type: ignore[misc]


def _pool(x: Tensor, parts: Parts, layout: Layout) -> Tensor:
    """x [..., C] -> [B, C]: only the token that is read attends, to the whole sequence."""
    if (
        parts.qkv[0].scale is not None
    ):  # all keys in 8 bits: an eighth of the time of one query's products in fp32, for one text
        return _attend(x, parts, layout)[layout.read]
    if len(parts.qkv) == 1:
        weights = parts.qkv[0].weight.chunk(3)
        biases = parts.qkv[0].bias.chunk(3) if parts.qkv[0].bias is not None else (None,) * 3
    else:
        weights = tuple(p.weight for p in parts.qkv)
        biases = tuple(p.bias for p in parts.qkv)  # type: ignore[misc]
    zero = [x.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return pooling(
        x, x[layout.read], weights[0], zero[0], weights[1], weights[2], zero[2], parts.heads,
        cu_seqlens=layout.cu_seqlens, max_length=layout.max_length,
    )  # fmt: skip


# ---- OpenAI's modules


class LayerNorm(nn.LayerNorm):
    """Layer norm whose sums are in fp32 at the least, and whose result has its input's dtype."""

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.LayerNorm(self)

    def forward(self, x: Tensor) -> Tensor:
        if not watched() and plain(nn.LayerNorm) and _plain_norm(self):
            return layer_norm(x, self.weight, self.bias, None, self.eps)
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def _plain_norm(ln: nn.LayerNorm) -> bool:
    weights = ln.__dict__["_parameters"]
    return len(ln.normalized_shape) == 1 and all(type(weights.get(n)) in (Tensor, nn.Parameter) for n in ("weight", "bias"))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """open_clip's: a learned factor for each channel of a branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


class ResidualAttentionBlock(nn.Module):
    """A residual attention block, pre-norm (paper, section 2.4).

    Args:
        d_model, n_head: C and H.
        attn_mask: added to the scores [L, L], or None.
        mlp_width: F; None: 4 · C.
        activation: of ``ACTIVATIONS``.
        eps: of both layer norms.
        dropout: of the attention weights, in training.
        layer_scale: whether each branch has a learned factor for each channel.
    """

    products: torch.dtype | None = None  # what the fused way multiplies in, see ``kernels.linear``; None: as the weights are

    def __init__(
        self, d_model: int, n_head: int, attn_mask: Tensor | None = None, *, mlp_width: int | None = None,
        activation: str = "quick_gelu", eps: float = 1e-5, dropout: float = 0.0, layer_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")
        hidden = mlp_width or 4 * d_model
        self.attn = nn.MultiheadAttention(d_model, n_head, dropout)
        self.ln_1 = LayerNorm(d_model, eps)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(d_model, hidden), gelu=ACTIVATIONS[activation](), c_proj=nn.Linear(hidden, d_model))
        )
        self.ln_2 = LayerNorm(d_model, eps)
        self.ls_1, self.ls_2 = (LayerScale(d_model) if layer_scale else None for _ in range(2))
        self.attn_mask = attn_mask

    @property
    def attn_mask(self) -> Tensor | None:
        return self._mask

    @attn_mask.setter
    def attn_mask(self, mask: Tensor | None) -> None:
        # Compared here, once: a comparison in the forward pass would wait for a GPU.
        self._mask, self._version = mask, 0 if mask is None or mask.is_inference() else mask._version
        self.causal = mask is not None and is_causal(mask)

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.Block(self)

    def attention(self, x: Tensor) -> Tensor:
        mask, L = self.attn_mask, x.shape[0]
        if mask is not None:
            mask = mask[..., -L:, -L:].to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: Any) -> Any:
        """x [L, B, C] -> the same; or a stream -> a stream, of a block that is ``fusable``."""
        if type(x) is Stream:
            out = together(x, [self]) if type(self._modules["attn"]) in LINEARS else None
            return block(x, self.parts()) if out is None else out
        if type(x) is Tensor and x.ndim == 3 and whole_inside(self):
            return block(Stream(x.transpose(0, 1), None, Layout(causal=self.causal)), self.parts()).settled().transpose(0, 1)
        y = self.attention(self.ln_1(x))
        x = x + (y if self.ls_1 is None else self.ls_1(y))
        y = self.mlp(self.ln_2(x))
        return x + (y if self.ls_2 is None else self.ls_2(y))

    def parts(self) -> Parts:
        own = self._modules
        attn: Any = own["attn"]
        mlp: Any = own["mlp"]
        kind = type(mlp.gelu)
        exact = kind is nn.GELU and mlp.gelu.approximate == "none"
        frozen = type(attn) in LINEARS
        return Parts(
            attn.num_heads, Norm.of(self.ln_1),
            (Linear.of(attn.in_proj) if frozen else Linear(attn.in_proj_weight, attn.in_proj_bias),), Linear.of(attn.out_proj),
            Norm.of(self.ln_2), Linear.of(mlp.c_fc), kind is QuickGELU if exact or kind is QuickGELU else mlp.gelu,
            Linear.of(mlp.c_proj), None if self.ls_1 is None or self.ls_2 is None else (self.ls_1.gamma, self.ls_2.gamma),
            self.products,
        )  # fmt: skip


def causal_mask(length: int) -> Tensor:
    """[L, L] on the CPU, to be added to scores: −inf where key j comes after query i."""
    with torch.inference_mode(False):  # a tensor that counts its changes, wherever a model is built
        return torch.full((length, length), -torch.inf, device="cpu").triu_(1)


def is_causal(mask: Tensor) -> bool:
    return mask.ndim == 2 and mask.equal(causal_mask(len(mask)).to(mask))


def _changed(mask: Tensor, version: int) -> bool:
    """Whether a causal mask is one no more; that of a copy made under inference_mode counts no changes, and is compared."""
    return not is_causal(mask) if mask.is_inference() else mask._version != version


def whole_inside(block: Any) -> bool:
    """Whether what a block consists of is untouched, so that its weights may be read; hooks on itself do not count."""
    own = block.__dict__
    if not plain(ResidualAttentionBlock) or not (type(block) is ResidualAttentionBlock or whole(block, ResidualAttentionBlock)):
        return False
    mask, modules = own["_mask"], own["_modules"]
    if "attention" in own or (mask is not None and not block.causal):
        return False
    if mask is not None and not torch.compiler.is_compiling() and _changed(mask, own["_version"]):
        return False
    attn, mlp = modules["attn"], modules["mlp"]
    if not untouched(*(m for m in modules.values() if m is not None)) or type(mlp) is not nn.Sequential:
        return False
    layers, inner = mlp.__dict__["_modules"], attn.__dict__["_modules"]
    if [*layers] != ["c_fc", "gelu", "c_proj"] or not untouched(*inner.values(), *layers.values()):
        return False
    held = LINEARS.get(type(attn), nn.Linear)
    return (
        (held is not nn.Linear or _plain_attention(attn))
        and type(layers["c_fc"]) is type(layers["c_proj"]) is held
        and type(modules["ln_1"]) is type(modules["ln_2"]) is LayerNorm
        and type(layers["gelu"]) in ACTIVATIONS_KNOWN
        and {type(block.ls_1), type(block.ls_2)} in ({LayerScale}, {type(None)})
    )  # fmt: skip


def _plain_attention(attn: Any) -> bool:
    if type(attn) is not nn.MultiheadAttention or attn.batch_first or attn.add_zero_attn or (attn.dropout and attn.training):
        return False
    given = attn.__dict__["_parameters"]
    return attn.bias_k is None and given.get("in_proj_weight") is not None and given.get("in_proj_bias") is not None


know(LayerNorm, LayerScale, QuickGELU)
know(ResidualAttentionBlock, methods=("forward", "attention"))
ACTIVATIONS_KNOWN = {QuickGELU, nn.GELU, nn.SiLU, nn.ReLU, nn.Identity}


def fusable(block: nn.Module) -> bool:
    """Whether a block takes a ``Stream``: it is exactly ours, nobody looks at it, and its parts are untouched."""
    return whole(block, ResidualAttentionBlock) and whole_inside(block)


def _in_one_call(parts: Parts) -> bool:
    """Whether ``encoded`` takes a block of these."""
    biases = [linear.bias for linear in (*parts.qkv, parts.out, parts.fc, parts.proj)]
    plain = (
        parts.scales is None
        and parts.products is None
        and isinstance(parts.activation, bool)
        and parts.ln_1.eps == parts.ln_2.eps
    )
    return plain and None not in biases and len(parts.ln_1.weight) // parts.heads % 16 == 0


def _all_together(stream: Stream, blocks: Any) -> Stream | None:
    """A stream through all blocks in one call, of which the last works for what is read alone; None where that cannot be."""
    layout = stream.layout
    packed = layout.cu_seqlens is not None  # whose maker has asked all blocks
    if not len(blocks) or (layout.causal and not packed):
        return None
    for block in blocks:
        own = block.__dict__
        if type(own["_modules"].get("attn")) not in LINEARS or not (
            packed or (fusable(block) and block.causal is layout.causal)
        ):
            return None
    return together(Stream(stream.s, stream.update, layout, True), blocks)


def together(stream: Stream, blocks: Sequence[Any]) -> Stream | None:
    """A stream through frozen blocks that are fusable, in one call; None where these are not of a kind that goes so."""
    frozen = Frozen(blocks, QuickGELU)
    if not frozen.fits:
        return None
    x, layout = stream.settled(), stream.layout
    read = layout.rows(x) if stream.read else None
    return Stream(frozen(x, layout.causal, layout.cu_seqlens, read), None, layout, stream.read)


class Transformer(nn.Module):
    """Blocks one after the other; arguments beyond OpenAI's are the blocks'."""

    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.checkpointing = False  # whether blocks are computed again in backward instead of kept
        self.resblocks: Any = nn.Sequential(
            *(ResidualAttentionBlock(width, heads, attn_mask, **options) for _ in range(layers))
        )

    def forward(self, x: Any) -> Any:
        """x [L, B, C] -> the same; or a stream -> [B, C], the state of the token that is read."""
        blocks = self.resblocks
        if type(x) is not Stream:
            return _as_itself(self.run(x)) if untouched(blocks) and type(x) is Tensor and x.ndim == 3 else blocks(x)
        read = x.layout.read
        return self.read(self.run(x, read=True), read)

    @staticmethod
    def read(x: Any, at: Any) -> Tensor:
        """What ``run`` gave -> [B, C], the states of the tokens at that index."""
        if type(x) is Stream and x.read:
            return x.settled()
        return (x.settled() if type(x) is Stream else x.transpose(0, 1))[at]

    def run(self, x: Any, read: bool = False, kept: list[Tensor] | None = None, blocks: Any = None) -> Any:
        """x, a stream or [L, B, C], through the blocks; a block that is not fusable takes [L, B, C] and may give what it likes.

        read: whether the last block may work for the token that is read alone.
        blocks: None: all.
        kept: takes the states [B, L, C] after each block.
        """
        blocks = self.resblocks if blocks is None else blocks
        last, given = len(blocks) - 1, x.layout if isinstance(x, Stream) else Layout()
        if read and kept is None and type(x) is Stream and (found := _all_together(x, blocks)) is not None:
            return found
        for i, block in enumerate(blocks):
            packed = isinstance(x, Stream) and x.layout.cu_seqlens is not None  # whose maker has asked all blocks
            if packed or (isinstance(x, Tensor | Stream) and fusable(block)):
                x = x if isinstance(x, Stream) else Stream(x.transpose(0, 1), None, given)
                layout = x.layout
                if layout.causal != block.causal:
                    layout = Layout(layout.read, bool(block.causal), layout.cu_seqlens, layout.max_length)
                # Under a causal mask padded texts go on behind the token that is read, which must not see that.
                short = read and i == last and (layout.cu_seqlens is not None or not layout.causal)
                x = Stream(x.s, x.update, layout, short)
            else:
                x = _as_itself(x)
            if self.checkpointing and torch.is_grad_enabled() and not (read and i == last):
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=type(x) is not Stream)
            else:
                x = block(x)
            if kept is not None:
                if type(x) is Stream:
                    x = Stream(x.settled(), None, x.layout)
                kept.append(x.s if type(x) is Stream else x.transpose(0, 1))
        return x

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.Transformer(self)

    def pack_in_bf16(self) -> None:
        """See ``CLIP.for_inference``."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            homes: list[Any] = [(block.attn.out_proj, "weight"), (block.mlp.c_fc, "weight"), (block.mlp.c_proj, "weight")]
            if i != last:  # which reads its projection in parts
                homes.append((block.attn, "in_proj_weight"))
            for home, name in homes:
                weight = onednn.packed(getattr(home, name).to(torch.bfloat16))
                setattr(home, name, nn.Parameter(weight, requires_grad=False))

    def freezable(self, int8: bool) -> list[ResidualAttentionBlock]:
        """The blocks whose weights ``CLIP.for_inference`` rounds, or lays out: those that nobody has touched."""
        return [block for block in self.resblocks if fusable(block) and (int8 or _in_one_call(block.parts()))]


know(Transformer)


def _as_itself(x: Any) -> Any:
    """A stream as OpenAI's blocks take it, [L, B, C]."""
    return x.settled().transpose(0, 1) if type(x) is Stream else x

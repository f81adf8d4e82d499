"""Residual attention blocks as OpenAI's modules, which run fused (fused.py) where nobody looks at them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast.kernels import layer_norm
from clipfast.kernels.linear import onednn
from clipfast.model import scripted
from clipfast.model.frozen import LINEARS, Frozen
from clipfast.model.fused import Layout, Linear, Norm, Parts, QuickGELU, Stream, fused_block
from clipfast.model.rule import know, plain, untouched, watched, whole


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
            return fused_block(x, self.parts()) if out is None else out
        if type(x) is Tensor and x.ndim == 3 and whole_inside(self):
            stream = fused_block(Stream(x.transpose(0, 1), None, Layout(causal=self.causal)), self.parts())
            return stream.settled().transpose(0, 1)
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


know(LayerNorm, LayerScale)
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

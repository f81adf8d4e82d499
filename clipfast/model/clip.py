"""CLIP as the paper has it: an image tower, a text tower, one embedding space (Radford et al. 2021, section 2).

Parameter names are those of OpenAI's code, so that published weights load as they are. Two exact savings run through the
towers: text is packed to its true lengths, since under a causal mask nothing after the end token can reach it; and the last
block works for the one token that is read out of it, since no other output of that block is used.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast.kernels import attention, layer_norm, linear, mlp, pooling
from clipfast.kernels.linear import onednn
from clipfast.model.packed import Packed, pack
from clipfast.model.resnet import Bottleneck, ModifiedResNet

_SIZES = ("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size",
          "context_length", "vocab_size", "transformer_width", "transformer_heads", "transformer_layers")  # fmt: skip
# The nine published models (paper, tables 19 and 20).
MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True))
    for name, sizes in {
        "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
        "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
        "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
        "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
        "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
        "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
        "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
        "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
        "ViT-L/14@336px": (768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
    }.items()
}


class Layout(NamedTuple):
    """How the tokens of a batch lie: packed one behind the other, or dense with ``cu_seqlens`` None."""

    read: Any  # the index of the token that is read out of each sequence
    causal: bool = False
    cu_seqlens: Tensor | None = None  # int32 [B + 1]: where each sequence starts, and T
    max_length: int | None = None


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, layout: Layout, read: bool = False) -> Tensor:
        """x [..., C] -> [..., C]: every token attends; ``read``: -> [B, C], that of the token that is read."""
        if read:
            return self._read(x, layout)
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        y = attention(qkv, self.heads, causal=layout.causal, cu_seqlens=layout.cu_seqlens, max_length=layout.max_length)
        return linear(y, self.out_proj.weight, self.out_proj.bias)

    def _read(self, x: Tensor, layout: Layout) -> Tensor:
        """x [..., C] -> [B, C]: only the token that is read attends, to the whole sequence."""
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, _, v_bias = self.in_proj_bias.chunk(3)
        y = pooling(
            x, x[layout.read], q_weight, q_bias, k_weight, v_weight, v_bias, self.heads,
            cu_seqlens=layout.cu_seqlens, max_length=layout.max_length,
        )  # fmt: skip
        return linear(y, self.out_proj.weight, self.out_proj.bias)


class Mlp(nn.Module):
    def __init__(self, width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, self.quick_gelu)


class Block(nn.Module):
    """A residual attention block, pre-norm.

    The residual stream s travels beside the update that the layer before owes to it: addition and layer norm are one pass.
    """

    def __init__(self, width: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, quick_gelu)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, s: Tensor, update: Tensor | None, layout: Layout, read: bool = False) -> tuple[Tensor, Tensor]:
        """(s, update), both [..., C] -> the same after this block; ``read``: [B, C], at the token that is read alone."""
        x, s = self._enter(s, update)
        x, s = _norm(self.ln_2, s[layout.read] if read else s, self.attn(x, layout, read))
        return s, self.mlp(x)

    def _enter(self, s: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        return (_norm(self.ln_1, s), s) if update is None else _norm(self.ln_1, s, update)


def _norm(ln: nn.LayerNorm, x: Tensor, residual: Tensor | None = None) -> Any:
    return layer_norm(x, ln.weight, ln.bias, residual, ln.eps)


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.checkpointing = False  # whether blocks are computed again in backward instead of kept
        self.resblocks: Any = nn.ModuleList(Block(width, heads, quick_gelu) for _ in range(layers))

    def forward(self, s: Tensor, layout: Layout) -> Tensor:
        """s [..., C] -> [B, C]: the state of the token that is read."""
        update = None
        for block in self.resblocks[:-1]:
            if self.checkpointing and torch.is_grad_enabled():
                s, update = checkpoint(block, s, update, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                s, update = block(s, update, layout)
        s, update = self.resblocks[-1](s, update, layout, read=True)
        return s + update

    def states(self, s: Tensor, layout: Layout) -> list[Tensor]:
        """s [..., C] -> the residual stream [..., C] of every token after each block."""
        states = []
        for block in self.resblocks:
            s, update = block(s, None, layout)
            s = s + update
            states.append(s)
        return states

    def pack_weights(self) -> None:
        """See ``CLIP.for_inference``."""
        for block in self.resblocks:
            homes = [(block.attn.out_proj, "weight"), (block.mlp.c_fc, "weight"), (block.mlp.c_proj, "weight")]
            if block is not self.resblocks[-1]:  # which reads its projection in parts
                homes.append((block.attn, "in_proj_weight"))
            for home, name in homes:
                setattr(home, name, nn.Parameter(onednn.packed(getattr(home, name)), requires_grad=False))


class VisionTransformer(nn.Module):
    """ViT with one more layer norm before the transformer (paper, section 2.4)."""

    def __init__(
        self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        tokens = (input_resolution // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    layout = Layout(read=(slice(None), 0))

    def embed(self, x: Tensor) -> Tensor:
        """x [B, 3, R, R] -> [B, L, C]: class token and patches, with positions, normalised."""
        patch = self.conv1.kernel_size[0]
        grid = self.input_resolution // patch
        # The patches do not overlap: the convolution is one product, which takes 0.5 to 0.7 of its time at B/32 on a CPU.
        x = x[..., : grid * patch, : grid * patch].unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
        x = linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.conv1.weight.flatten(1))
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return _norm(self.ln_pre, x + self.positional_embedding.to(x.dtype))

    def project(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., output_dim]."""
        return linear(_norm(self.ln_post, x), self.proj.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.transformer(self.embed(x), self.layout))


class CLIP(nn.Module):
    """Two towers and a temperature; arguments, attributes, keys and outputs are those of OpenAI's class.

    Args:
        embed_dim: D, the width of the shared space.
        image_resolution: R, pixels a side.
        vision_layers: the depth of a ViT, or the four stage depths of a ResNet.
        vision_width: C of the image tower (ResNet: channels of the first stage).
        vision_patch_size: pixels a side; None for a ResNet.
        context_length: the longest text, in tokens.
        vocab_size: token ids.
        transformer_width, transformer_heads, transformer_layers: the text tower.
        quick_gelu: x·σ(1.702x), as in OpenAI's weights; False for the exact GELU.
        vision_heads: heads of the image tower; None for 64 channels a head.
    """

    def __init__(
        self, embed_dim: int, image_resolution: int, vision_layers: int | tuple[int, int, int, int], vision_width: int,
        vision_patch_size: int | None, context_length: int, vocab_size: int, transformer_width: int, transformer_heads: int,
        transformer_layers: int, *, quick_gelu: bool = True, vision_heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.context_length, self.vocab_size, self.quick_gelu = context_length, vocab_size, quick_gelu
        vit = not isinstance(vision_layers, (tuple, list))
        width = vision_width if vit else 32 * vision_width  # where the image tower attends
        heads = vision_heads or width // 64
        layers: Any = vision_layers
        side, patch = image_resolution, vision_patch_size or 0
        for name, got, fits, expected in (
            ("vision_layers", layers, layers > 0 if vit else len(layers) == 4, "a depth, or a ResNet's four"),
            ("image_resolution", side, side > 0 if vit else side >= 32, "a positive number, of at least 32 for a ResNet"),
            ("vision_patch_size", vision_patch_size, not vit or 0 < patch <= side, f"1 to {side} for a ViT"),
            ("vision_heads", heads, heads > 0 and width % heads == 0, f"a divisor of {width}, the width of its attention"),
            ("transformer_layers", transformer_layers, transformer_layers > 0, "a positive number"),
            ("transformer_heads", transformer_heads, transformer_heads > 0 and transformer_width % transformer_heads == 0,
             f"a divisor of transformer_width, {transformer_width}"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"CLIP: expected {name} to be {expected}, got {got}")
        self.visual: VisionTransformer | ModifiedResNet
        if vit:
            self.visual = VisionTransformer(side, patch, width, layers, heads, embed_dim, quick_gelu)
        else:
            self.visual = ModifiedResNet(tuple(layers), embed_dim, heads, side, vision_width)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, quick_gelu)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """As the paper's code does: the text tower by GPT-2's rule, a ResNet's residual branches starting at zero."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(linear.weight, std=pool.c_proj.in_features**-0.5)
            for module in self.visual.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.bn3.weight)
        width, layers = self.transformer.width, self.transformer.layers
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """image [B, 3, R, R] -> [B, D] in the model's dtype, of unit length when ``normalize``."""
        features = self.visual(self.checked_image(image))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor | Packed, normalize: bool = False, lengths: Tensor | list[int] | None = None) -> Tensor:
        """text [B, L ≤ context_length] of token ids -> [B, D] in the model's dtype, of unit length when ``normalize``.

        Args:
            text: token ids, or what ``pack`` made of them (for ``torch.compile(model.encode_text, fullgraph=True)``).
            lengths: see ``pack``.
        """
        s, layout = self._embed_text(text if isinstance(text, Packed) else self.pack(text, lengths))
        features = self._project(self.transformer(s, layout))
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_per_image [B_image, B_text], logits_per_text [B_text, B_image]): scaled cosine similarities."""
        image_features, text_features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()

    def forward_intermediates(
        self, image: Tensor | None = None, text: Tensor | None = None, normalize: bool = True
    ) -> dict[str, Any]:
        """The features, and what every token was after each block.

        Returns a dict: ``image_features`` [B, D] and ``image_intermediates``, a list of [B, L, C] (class token first) or, for a
        ResNet, of [B, C, h, w]; ``text_features`` [B, D] and ``text_intermediates``, a list of [B, L, C], zero behind the end.
        """
        out: dict[str, Any] = {}
        visual = self.visual
        if image is not None:
            if isinstance(visual, ModifiedResNet):
                states = visual.states(self.checked_image(image))
                features = visual.attnpool(states[-1])
            else:
                states = visual.transformer.states(visual.embed(self.checked_image(image)), visual.layout)
                features = visual.project(states[-1][:, 0])
            out |= dict(image_features=features, image_intermediates=states)
        if text is not None:
            packed = self.pack(text)
            s, layout = self._embed_text(packed)
            states = self.transformer.states(s, layout)
            features = self._project(states[-1][layout.read])
            row = torch.repeat_interleave(packed.cu_seqlens.diff(), output_size=len(s))
            padded = [s.new_zeros(*text.shape, s.shape[-1]).index_put((row, packed.position), state) for state in states]
            out |= dict(text_features=features, text_intermediates=padded)
        if normalize:
            out |= {k: F.normalize(v, dim=-1) for k, v in out.items() if k.endswith("features")}
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in backward instead of kept: a third more work for a fraction of the memory.

        A ResNet's are kept: its batch statistics would move twice.
        """
        for transformer in self._transformers():
            transformer.checkpointing = enable

    def for_inference(self, packed: bool = False) -> CLIP:
        """A copy in eval mode that asks for no gradients, with a ResNet's batch norms folded into its convolutions.

        Args:
            packed: keep the weights of the blocks in the CPU's layout: 1.7 × as fast for one text, 1.3 × for one image, a few
                per cent for many. Such a copy only encodes: it cannot be saved, copied, moved or compiled, and no gradient
                passes through it. Where that layout does not pay, a warning says why, and the copy is as without.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        if isinstance(model.visual, ModifiedResNet):
            model.visual.fold_batch_norms()
        if packed and (reason := onednn.lacks_packed(self.transformer.resblocks[0].mlp.c_fc.weight)):
            warnings.warn(f"for_inference: weights are not packed: {reason}", stacklevel=2)
        elif packed:
            for transformer in model._transformers():
                transformer.pack_weights()
        return model

    def _transformers(self) -> list[Transformer]:
        return [t for tower in (self.visual, self) if isinstance(t := getattr(tower, "transformer", None), Transformer)]

    def _project(self, x: Tensor) -> Tensor:
        """The text tower's states at the end token [B, C] -> [B, D]."""
        return linear(_norm(self.ln_final, x), self.text_projection.T)

    def checked_image(self, image: Tensor) -> Tensor:
        """The images in the model's dtype, if they fit; ValueError for another shape, TypeError for what are no pixels."""
        side = self.visual.input_resolution
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"encode_image: expected a floating tensor [B, 3, {side}, {side}], got {got}; see preprocess")
        if image.ndim != 4 or image.shape[1:] != (3, side, side):
            raise ValueError(f"encode_image: expected images [B, 3, {side}, {side}], got {list(image.shape)}; see preprocess")
        return image.to(self.dtype)

    @torch.compiler.disable(reason="texts have any lengths: call model.encode_text(model.pack(text, lengths))")
    def pack(self, text: Tensor, lengths: Tensor | list[int] | None = None) -> Packed:
        """text [B, L ≤ context_length] of token ids -> the tokens up to the end token of each row, on the device of ``text``.

        Args:
            lengths: B counts of tokens up to and including the end token, on the host, as ``tokenize(…, return_lengths=True)``
                gives them; None: up to the first end token, the last of the vocabulary. On a GPU that waits for the device
                once; with ``lengths`` nothing waits, and the ids are not checked.

        Raises:
            ValueError: a shape or a length does not fit, an id is not in the vocabulary, a row has no end token.
            TypeError: ``text`` is no tensor of integers.
        """
        return pack(text, lengths, self.context_length, self.vocab_size)

    def _embed_text(self, packed: Packed) -> tuple[Tensor, Layout]:
        """Packed token states [T, C] and their layout."""
        # Not by index: the backward pass of that adds up rows in one thread, 0.4 ms for 930 tokens.
        places = F.embedding(packed.position, self.positional_embedding.to(self.dtype))
        s = self.token_embedding(packed.ids).to(self.dtype) + places
        # A compiled tower is not compiled again for a longer text.
        longest = self.context_length if torch.compiler.is_compiling() else packed.max_length
        return s, Layout(packed.cu_seqlens[1:] - 1, True, packed.cu_seqlens, longest)

"""CLIP as the paper has it: an image tower, a text tower, one embedding space (Radford et al. 2021, section 2).

Parameter names are those of OpenAI's code, so that published weights load as they are. Two exact savings run through the
towers: text is packed to its true lengths, since under a causal mask nothing after the end token can reach it; and the last
block works for the one token that is read out of it, since no other output of that block is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.model import scripted
from clipfast.model.forked import check_threads
from clipfast.model.fused import Layout, Stream, projected
from clipfast.model.inference import prepared
from clipfast.model.intermediates import image_intermediates, text_intermediates
from clipfast.model.packed import Packed, pack, padded, uncompiled
from clipfast.model.resnet import Bottleneck, ModifiedResNet
from clipfast.model.rule import untouched, watched, whole
from clipfast.model.transformer import LayerNorm, Transformer, causal_mask, fusable
from clipfast.model.vit import VisionTransformer

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


class CLIP(nn.Module):
    """Two towers and a temperature; arguments, attributes, keys, modules and outputs are those of OpenAI's class.

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
        vision: how the image tower differs from OpenAI's: arguments of ``VisionTransformer`` and of its blocks.
        text: how the text tower does: those of its blocks; ``causal`` (True); ``end_token``, where a text is read: None for its
            largest id, an id for the first place of that, -1 for the last column; ``bag``: no transformer, a text is the
            mean of its words' embeddings.
        logit_bias: what a model of the sigmoid loss starts its bias with; None: it has none.
        predicts: what an image's features are trained to predict, "words" or the "caption" (see ``predict``); None: nothing.
    """

    output_dict = False  # open_clip's: whether ``forward`` gives features, scale and bias
    frozen: str | None = None  # "packed" or "int8", of a copy that ``for_inference`` made so

    def __init__(
        self, embed_dim: int, image_resolution: int, vision_layers: int | tuple[int, int, int, int], vision_width: int,
        vision_patch_size: int | None, context_length: int, vocab_size: int, transformer_width: int, transformer_heads: int,
        transformer_layers: int, *, quick_gelu: bool = True, vision_heads: int | None = None,
        vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None, logit_bias: float | None = None,
        predicts: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.context_length, self.vocab_size, self.quick_gelu = context_length, vocab_size, quick_gelu
        self.vision_options, self.text_options = dict(vision or {}), dict(text or {})
        self.bag = bool(self.text_options.get("bag", False))
        transformer_layers = 0 if self.bag else transformer_layers
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
            ("transformer_layers", transformer_layers, transformer_layers > 0 or self.bag, "a positive number"),
            ("transformer_heads", transformer_heads, transformer_heads > 0 and transformer_width % transformer_heads == 0,
             f"a divisor of transformer_width, {transformer_width}"),
            ("predicts", predicts, predicts in (None, "words", "caption"), "words, caption or None"),
            ("text", self.text_options, not (self.bag and predicts), "without bag beside predicts: nothing reads the bag"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"CLIP: expected {name} to be {expected}, got {got}")
        activation = {"activation": "quick_gelu" if quick_gelu else "gelu"}
        self.visual: VisionTransformer | ModifiedResNet
        if vit:
            options = activation | self.vision_options
            self.visual = VisionTransformer(side, patch, width, layers, heads, embed_dim, **options)
        else:
            self.visual = ModifiedResNet(tuple(layers), embed_dim, heads, side, vision_width, **self.vision_options)
        options = activation | self.text_options
        self.causal, self.end_token = options.pop("causal", True), options.pop("end_token", None)
        options.pop("bag", None)
        mask = self.build_attention_mask() if self.causal else None
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, mask, **options)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width, options.get("eps", 1e-5))
        self.text_projection: nn.Parameter | None = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))
        self.words = nn.Linear(embed_dim, vocab_size) if predicts == "words" else None
        self.prefix = nn.Linear(embed_dim, transformer_width) if predicts == "caption" else None
        self.initialize_parameters()
        self.positional_embedding.requires_grad_(not self.bag)  # a bag has no order

    @property
    def objective(self) -> str:
        """What the model is made for: contrastive, bag, words or caption."""
        if self.words is not None:
            return "words"
        return "caption" if self.prefix is not None else "bag" if self.bag else "contrastive"

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
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def build_attention_mask(self) -> Tensor:
        """[L, L] for a context of L tokens: what is added to the scores of a causal text tower."""
        return causal_mask(self.context_length)

    @property
    def dtype(self) -> torch.dtype:
        return self.positional_embedding.dtype if self.visual is None else self.visual.conv1.weight.dtype

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
        if self.bag:
            features = self._project(self.ln_final(self._mean_of_words(text, lengths)))
        elif self._packs():
            s, layout = self._embed_packed(text if isinstance(text, Packed) else self.pack(text, lengths))
            features = self._project(self.ln_final(self.transformer(Stream(s, None, layout))))
        else:
            features = self._encode_padded(*padded(text) if isinstance(text, Packed) else (text, lengths))
        return F.normalize(features, dim=-1) if normalize else features

    def _mean_of_words(self, text: Tensor | Packed, lengths: Tensor | list[int] | None) -> Tensor:
        """[B, C]: the mean embedding of what stands between the start and the end token; 0 for a text without words."""
        ids, counts = padded(text if isinstance(text, Packed) else self.pack(text, lengths))
        place = torch.arange(ids.shape[1], device=ids.device)
        words = ((place > 0) & (place < counts[:, None] - 1)).to(self.dtype)
        return (self.token_embedding(ids).to(self.dtype) * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)

    def _packs(self) -> bool:
        """Whether the text tower may leave out what follows the end token, which under a causal mask cannot reach it: where
        nobody looks into the tower, since what others see are all tokens."""
        return (
            self.causal and self.end_token != -1 and self._reads()
            and untouched(self.token_embedding) and all(fusable(block) and block.causal for block in self.transformer.resblocks)
        )  # fmt: skip

    def _reads(self) -> bool:
        """Whether the text tower's last block may work for the end token alone."""
        return whole(self.transformer, Transformer) and untouched(self.transformer.resblocks, self.ln_final)

    def _encode_padded(self, text: Tensor, lengths: Tensor | list[int] | None = None) -> Tensor:
        """Every token of text [B, L] through the tower, in OpenAI's shapes where somebody looks; -> [B, D]."""
        x: Any = self.embed_text(text)
        ends = self.ends(text) if lengths is None else torch.as_tensor(lengths, device=text.device) - 1
        at = (torch.arange(x.shape[0], device=x.device), ends)
        if not self._reads():
            x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
            return self._project(self.ln_final(x).type(self.dtype)[at])
        blocks, layout = [*self.transformer.resblocks], Layout(at)
        watching = [i for i, block in enumerate(blocks) if not fusable(block) or block.causal is not self.causal]
        free = max(watching, default=-1) + 1 if self.causal and self.end_token != -1 else len(blocks)
        x = self.transformer.run(Stream(x, None, layout), read=free == len(blocks), blocks=blocks[:free])
        if free < len(blocks) and isinstance(x, Stream | Tensor) and not torch.compiler.is_compiling():
            # From here on nobody looks: what follows the end token may go.
            packed = self.pack(text, ends.cpu() + 1)
            layout = packed.layout()
            states = x.settled() if isinstance(x, Stream) else x.transpose(0, 1)
            x = Stream(states[packed.rows(), packed.position], None, layout)
        x = self.transformer.read(self.transformer.run(x, read=True, blocks=blocks[free:]), layout.read)
        return self._project(self.ln_final(x).type(self.dtype))

    def embed_text(self, text: Tensor) -> Tensor:
        """text [B, L] -> the states [B, L, C] that enter the text tower."""
        return self.token_embedding(text).type(self.dtype) + self.positional_embedding[: text.shape[1]].type(self.dtype)

    def ends(self, text: Tensor) -> Tensor:
        """text [B, L] -> [B]: where each is read."""
        if self.end_token == -1:
            return torch.full_like(text[:, 0], text.shape[1] - 1, dtype=torch.int64)
        return text.argmax(-1) if self.end_token is None else (text == self.end_token).int().argmax(-1)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        """(logits_per_image [B_image, B_text], logits_per_text [B_text, B_image]): scaled cosine similarities.

        With ``output_dict`` what open_clip's class gives: ``image_features`` and ``text_features`` [B, D] of unit length, None
        where there is no input, ``logit_scale`` and, of a model that has one, ``logit_bias``.
        """
        if not self.output_dict:
            if image is None or text is None:
                raise ValueError("forward: expected images and texts; with output_dict = True either will do")
            return self.get_logits(image, text)
        out = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        return out if self.logit_bias is None else out | {"logit_bias": self.logit_bias}

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """See ``forward``; of a model with a ``logit_bias``, with that."""
        image_features, text_features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits_per_image = self._scaled(image_features, text_features)
        return logits_per_image, logits_per_image.t()

    def _scaled(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """[B_image, D] and [B_text, D] -> their logits [B_image, B_text]."""
        logits = self.logit_scale.exp() * image_features @ text_features.t()
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward_intermediates(
        self, image: Tensor | None = None, text: Tensor | None = None, image_indices: int | list[int] | None = None,
        text_indices: int | list[int] | None = None, stop_early: bool = False, normalize: bool = True,
        normalize_intermediates: bool = False, intermediates_only: bool = False, image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False, text_output_fmt: str = "NLC", text_output_extra_tokens: bool = False,
        output_logits: bool = False, output_logit_scale_bias: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """The features, and what every token was after each block, as open_clip's class gives them.

        Args:
            image_indices, text_indices: of the blocks; a number: the last so many; None: all.
            stop_early: kept for open_clip's callers: without ``intermediates_only`` every block is needed.
            normalize: whether features have unit length.
            normalize_intermediates: whether the states go through the tower's last norm.
            intermediates_only: no features.
            image_output_fmt: "NCHW", or "NLC".
            image_output_extra_tokens: the class tokens as well.

        Returns:
            A dict: ``image_intermediates``, a list of [B, C, h, w] or [B, h·w, C]; ``image_intermediates_prefix``, of
            [B, 1, C]; ``image_features`` [B, D]; ``text_intermediates``, of [B, L, C]; ``text_features`` [B, D]; with
            ``output_logits`` ``image_logits`` and ``text_logits``; with ``output_logit_scale_bias`` ``logit_scale`` and
            ``logit_bias``.
        """
        given = image_indices, normalize_intermediates, intermediates_only, image_output_fmt, image_output_extra_tokens
        out: dict[str, Any] = {}
        if intermediates_only and (output_logits or output_logit_scale_bias):
            raise ValueError("forward_intermediates: expected features for logits, got intermediates_only")
        if text_output_fmt != "NLC":
            raise ValueError(f"forward_intermediates: expected text_output_fmt NLC, got {text_output_fmt!r}")
        if image is not None:
            out |= image_intermediates(self.visual, self.checked_image(image), *given)
        if text is not None:
            out |= text_intermediates(self, text, text_indices, normalize_intermediates, intermediates_only)
        if normalize:
            out |= {k: F.normalize(v, dim=-1) for k, v in out.items() if k.endswith("features")}
        if output_logits:
            logits = self._scaled(out["image_features"], out["text_features"])
            out |= {"image_logits": logits, "text_logits": logits.T}
        if output_logit_scale_bias:
            out |= {"logit_scale": self.logit_scale.exp()}
            out |= {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return out

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in backward instead of kept: a third more work for a fraction of the memory.

        A ResNet's are kept: its batch statistics would move twice.
        """
        for transformer in self._transformers():
            transformer.checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """No gradients in the image tower but for its last groups (LiT); see ``VisionTransformer.lock``."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """No gradients in the text tower but for its last groups: embeddings, each block, the last and the norm, projection."""
        if not freeze_layer_norm:
            raise ValueError("lock_text_tower: expected freeze_layer_norm True: norms are frozen as the other weights are")
        blocks = [*self.transformer.resblocks]
        first = [self.token_embedding, self.positional_embedding]
        groups = [first, *([block] for block in blocks[:-1]), [*blocks[-1:], self.ln_final], [self.text_projection]]
        for group in groups[: len(groups) - unlocked_layers]:
            for part in group:
                if part is not None:
                    part.requires_grad_(False)

    def no_weight_decay(self) -> set[str]:
        """Names of more than one dimension that open_clip's optimiser does not decay."""
        return {"positional_embedding"} | {f"visual.{name}" for name in self.visual.no_weight_decay()}

    def for_inference(self, packed: bool = False, int8: bool = False, bf16: bool = False) -> CLIP:
        """A copy in eval mode that asks for no gradients, with a ResNet's batch norms folded into its convolutions.

        Args:
            int8: round the weights of the blocks and of the token embedding to 8 bits, and what they are multiplied with as it
                comes: a quarter of the memory, three times the speed on a CPU, features whose cosine to those of fp32 is above
                0.995. No gradient passes, and other libraries cannot read it.
                Convolutions, norms and the last projections stay as they are.
            packed: lay out the weights of the blocks for a CPU that answers single requests, in fp32: twice as fast for one
                text. No gradient passes, and other libraries cannot read it. Where that is of no use, a warning says why, and
                the copy is as without.
            bf16: weights of the blocks in bf16, in the CPU's layout, and products of bf16, all else in fp32: half the memory,
                features whose cosine to those of fp32 is above 0.9995. Such a copy only encodes: it cannot be saved, copied,
                moved or compiled. Where a measurement, made once for a width, finds it no faster on this processor, a warning
                has the figures, and the copy is as without.
        """
        return prepared(self, packed, int8, bf16)

    def __prepare_scriptable__(self) -> nn.Module:
        if self.bag:
            raise ValueError("torch.jit.script: expected a text tower with a transformer, got a bag of words")
        if self.frozen:
            raise ValueError(
                f"torch.jit.script: expected a model of fp32 weights, got {self.frozen} ones; script the fp32 model"
            )
        return scripted.CLIP(self)

    def _transformers(self) -> list[Transformer]:
        return [t for tower in (self.visual, self) if isinstance(t := getattr(tower, "transformer", None), Transformer)]

    def _project(self, x: Tensor) -> Tensor:
        """The text tower's normalised states at the end token [B, C] -> [B, D]."""
        return x if self.text_projection is None else projected(x, self.text_projection)

    def checked_image(self, image: Tensor) -> Tensor:
        """The images in the model's dtype, if they fit; ValueError for another shape, TypeError for what are no pixels."""
        visual = self.visual
        if watched() or not isinstance(visual, VisionTransformer | ModifiedResNet):
            return image.type(self.dtype)
        if isinstance(image, Tensor):
            check_threads(image)
        side, channels = visual.input_resolution, getattr(visual.conv1, "in_channels", 3)
        expected = f"[B, {channels}, {side}, {side}]"
        if not isinstance(image, Tensor) or not image.is_floating_point():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"encode_image: expected a floating tensor {expected}, got {got}; see preprocess")
        if image.ndim != 4 or not visual.fits(*image.shape[1:]):
            fits = f"{side} is model.visual.input_resolution; see preprocess"
            raise ValueError(f"encode_image: expected images {expected}, got {list(image.shape)}: {fits}")
        return image.to(self.dtype)

    @uncompiled("texts have any lengths: call model.encode_text(model.pack(text, lengths))")
    def pack(self, text: Tensor, lengths: Tensor | list[int] | None = None) -> Packed:
        """text [B, L ≤ context_length] of token ids -> the tokens up to the end token of each row, on the device of ``text``.

        Args:
            lengths: B counts of tokens up to and including the end token, on the host, as ``tokenize(…, return_lengths=True)``
                gives them; None: up to where a text is read, for OpenAI's models the first place of its largest id. On a GPU
                that waits for the device once; with ``lengths`` nothing waits, and the ids are not checked.

        Raises:
            ValueError: a shape or a length does not fit, an id is not in the vocabulary.
            TypeError: ``text`` is no tensor of integers.
        """
        if isinstance(text, Tensor):
            check_threads(text)
        return pack(text, lengths, self.context_length, self.token_embedding.num_embeddings, self.end_token)

    def _embed_packed(self, packed: Packed) -> tuple[Tensor, Layout]:
        """Packed token states [T, C] and their layout."""
        # Not by index: the backward pass of that adds up rows in one thread, 0.4 ms for 930 tokens.
        places = F.embedding(packed.position, self.positional_embedding.to(self.dtype))
        s = self.token_embedding(packed.ids).to(self.dtype) + places
        # A compiled tower is not compiled again for a longer text.
        longest = self.context_length if torch.compiler.is_compiling() else packed.max_length
        return s, packed._replace(max_length=longest).layout()

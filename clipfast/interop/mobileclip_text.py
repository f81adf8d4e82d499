"""The text tower 'mct' of Apple's MobileCLIP-S0 (Vasu et al. 2024), reparameterised, and Apple's first names for text towers.

Between two convolutional mixers stand four blocks of attention. Nothing is causal: a text sees its padding, and all 77 tokens
are computed. Only the last mixer's MLP works for the token that is read alone.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from clipfast.kernels import mlp
from clipfast.model.fused import projected
from clipfast.model.rule import untouched
from clipfast.model.transformer import LayerNorm, Transformer

State = dict[str, Tensor]


class Mixer(nn.Module):
    """A reparameterised RepMixer block: tokens mixed by one convolution each channel; then another, and an MLP, as a branch."""

    def __init__(self, width: int, kernel: int, hidden: int) -> None:
        super().__init__()
        along: Any = dict(kernel_size=(1, kernel), padding=(0, kernel // 2), groups=width)
        self.mix, self.conv = nn.Conv2d(width, width, **along), nn.Conv2d(width, width, **along)
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor, read: Any = None) -> Tensor:
        """x [B, L, C] -> the same; with ``read``, an index of tokens, what it gives there."""
        # Seen as an image [B, C, 1, L] in channels-last order: 16 texts take 0.2 ms, as a signal [B, C, L] 12 ms (measured).
        x = self.mix(x.transpose(1, 2).unsqueeze(2))
        x, y = (t.squeeze(2).transpose(1, 2) for t in (x, self.conv(x)))
        if read is not None:
            x, y = x[read], y[read]
        fc1, fc2 = self.fc1, self.fc2
        if untouched(fc1, self.act, fc2) and type(fc1) is type(fc2) is nn.Linear:
            return x + mlp(y, fc1.weight, fc1.bias, fc2.weight, fc2.bias, False)
        return x + fc2(self.act(fc1(y)))


class MixerText(nn.Module):
    """Token ids -> features. Its parameters, but for the mixers', have open_clip's names.

    Args:
        vocab_size, context_length: token ids, and the longest text.
        width, heads, layers: of the attention blocks.
        embed_dim: D.
        kernel, hidden: of the mixers.
    """

    def __init__(
        self, vocab_size: int, context_length: int, width: int, heads: int, layers: int, embed_dim: int, kernel: int,
        hidden: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.first = Mixer(width, kernel, hidden)
        self.transformer = Transformer(width, layers, heads, activation="gelu")
        self.last = Mixer(width, kernel, hidden)
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))

    def encode_text(self, text: Tensor, normalize: bool = False, lengths: Tensor | list[int] | None = None) -> Tensor:
        """text [B, L] of token ids, padded with zeros -> [B, D], of unit length when ``normalize``.

        lengths: B counts of tokens up to and including the one that is read; None: up to the largest id of each row.
        """
        _check(text)
        ends = text.argmax(-1) if lengths is None else torch.as_tensor(lengths, device=text.device) - 1
        x = self.first(self.token_embedding(text) + self._places(text.shape[1]))
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        x = self.last(x, (torch.arange(len(text), device=text.device), ends))
        features = projected(self.ln_final(x), self.text_projection)
        return F.normalize(features, dim=-1) if normalize else features

    forward = encode_text

    def _places(self, length: int) -> Tensor:
        """[L, C]: for texts of another length Apple's code stretches the positions."""
        places = self.positional_embedding
        if length == len(places):
            return places
        return F.interpolate(places[None, None], (length, places.shape[1]), mode="bilinear")[0, 0]


def _check(text: Any) -> None:
    integers = isinstance(text, Tensor) and not (text.is_floating_point() or text.is_complex() or text.dtype == torch.bool)
    if not integers:
        got = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"encode_text: expected a tensor of integer token ids [B, 77], got {got}; see model.tokenizer")
    if text.ndim != 2 or not text.shape[1]:
        raise ValueError(f"encode_text: expected token ids [B, 77], got {list(text.shape)}; see model.tokenizer")


# ---- from Apple's names

_NAMES = {
    "embedding_layer.weight": "token_embedding.weight",
    "positional_embedding.pos_embed.pos_embed": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "projection_layer": "text_projection",
    "pre_norm_mha.0.": "ln_1.",
    "pre_norm_mha.1.qkv_proj.": "attn.in_proj_",
    "pre_norm_mha.1.out_proj.": "attn.out_proj.",
    "pre_norm_ffn.0.": "ln_2.",
    "pre_norm_ffn.1.": "mlp.c_fc.",
    "pre_norm_ffn.4.": "mlp.c_proj.",
}
_BLOCK = re.compile(r"transformer\.(\d+)\.")


def renamed(where: str, state: State) -> State:
    """A text tower under Apple's first names, without their ``text_encoder.`` -> open_clip's, and ``first`` and ``last`` for
    the mixers, which are reparameterised.

    Raises:
        ValueError: a mixer lacks a tensor.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    mixers = sorted({int(found[1]) for name in state if "token_mixer" in name and (found := _BLOCK.match(name))})
    out: State = {}
    for place, index in zip(("first", "last"), mixers, strict=False):
        prefix = f"transformer.{index}."
        held = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        out |= {f"{place}.{name}": tensor for name, tensor in _mixer(where, prefix, held).items()}
    before = 1 if mixers[:1] == [0] else 0
    for name, tensor in state.items():
        name = _BLOCK.sub(lambda found: f"transformer.resblocks.{int(found[1]) - before}.", name)
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = tensor.reshape(tensor.shape[-2:]) if name == "positional_embedding" else tensor
    return out


def _mixer(where: str, prefix: str, held: State) -> State:
    """The tensors of a RepMixer block as it was trained -> those of a ``Mixer``, computed in float64.

    Trained: x ← x + γ·(mixer(x) - norm(x)) and x ← x + δ·convffn(x), where mixer is BN(conv(x)) + BN(x) and norm is BN(x).
    """

    def take(name: str) -> Tensor:
        if name not in held:
            raise ValueError(f"{where}: not the text tower of MobileCLIP-S0: lacks text_encoder.{prefix}{name}")
        return held.pop(name).double()

    def folded(kernel: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        mean, var, weight, bias = (take(f"{norm}.{name}") for name in ("running_mean", "running_var", "weight", "bias"))
        fused, shift = fuse_conv_bn_weights(kernel, None, mean, var, 1e-5, weight, bias)
        return fused.detach(), shift.detach()

    kernel = take("token_mixer.mixer.rbr_conv.0.conv.weight")  # [C, 1, 1, kernel]
    same = torch.zeros_like(kernel)
    same[..., kernel.shape[-1] // 2] = 1
    branches = folded(kernel, "token_mixer.mixer.rbr_conv.0.bn"), folded(same, "token_mixer.mixer.rbr_skip")
    less, scale = folded(same, "token_mixer.norm.rbr_skip"), take("token_mixer.layer_scale").flatten()
    mixed = [a + b - c for a, b, c in zip(*branches, less, strict=True)]
    conv, after = folded(take("convffn.conv.conv.weight"), "convffn.conv.bn"), take("layer_scale").flatten()
    out = {
        "mix.weight": same + scale[:, None, None, None] * mixed[0], "mix.bias": scale * mixed[1],
        "conv.weight": conv[0], "conv.bias": conv[1],
        "fc1.weight": take("convffn.fc1.weight").flatten(1), "fc1.bias": take("convffn.fc1.bias"),
        "fc2.weight": after[:, None] * take("convffn.fc2.weight").flatten(1), "fc2.bias": after * take("convffn.fc2.bias"),
    }  # fmt: skip
    return {name: tensor.float() for name, tensor in out.items()} | held  # what is left is unexpected

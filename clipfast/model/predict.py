"""Prediction of a caption from its image: the two baselines of the paper's figure 2, beside which contrasting is efficient.

"words": a softmax over the vocabulary, whose target are the caption's words, their order left out (Joulin et al. 2016).
"caption": the text tower as a language model, whose first state also holds the image (a prefix of one place).
Either reads the image's features as evaluation keeps them: of unit length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.model.fused import Stream
from clipfast.model.packed import Packed, padded


def predicted(model: Any, image: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """Features [B, D], token ids [B, L] and lengths [B] -> the sum [] of the cross entropies that ``targets`` counts."""
    return -(words_likelihood if model.words is not None else caption_likelihood)(model, image, model.pack(text, lengths)).sum()


def targets(objective: str, lengths: Tensor) -> int:
    """How much a batch has to predict: captions with a word, or all tokens behind the start token."""
    return int((lengths > 2).sum() if objective == "words" else (lengths - 1).sum())


def seen(image: Tensor) -> Tensor:
    """Features [..., D] with a mean square of 1, which is what the predictions are made from."""
    return F.normalize(image, dim=-1) * image.shape[-1] ** 0.5


def word_scores(model: Any, image: Tensor) -> Tensor:
    """Features [B, D] -> the logarithm of each word's share [B, V], in fp32 at the least."""
    return at_least_fp32(model.words(seen(image))).log_softmax(-1)


def words_likelihood(model: Any, image: Tensor, packed: Packed) -> Tensor:
    """[B]: the mean log-likelihood of the words of each caption; 0 for a caption without any."""
    scores = word_scores(model, image)
    ids, lengths = padded(packed)
    place = torch.arange(ids.shape[1], device=ids.device)
    words = ((place > 0) & (place < lengths[:, None] - 1)).to(scores.dtype)
    return (scores.gather(1, ids) * words).sum(1) / words.sum(1).clamp(min=1)


def caption_states(model: Any, image: Tensor, packed: Packed) -> Tensor:
    """[T, C]: what the text tower knows at each token of the packed captions, and of the image at each caption's start."""
    first = model.prefix(seen(image))
    if model._packs():
        s, layout = model._embed_packed(packed)
        s = s.index_add(0, packed.cu_seqlens[:-1].long(), first.to(s.dtype))
        x = model.transformer.run(Stream(s, None, layout))
        x = x.settled() if isinstance(x, Stream) else x
    else:  # somebody's blocks, in OpenAI's shapes
        x = model.embed_text(padded(packed)[0])
        x = torch.cat([x[:, :1] + first[:, None].to(x.dtype), x[:, 1:]], 1)
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)[packed.rows(), packed.position]
    return model.ln_final(x).to(model.dtype)


def caption_likelihood(model: Any, image: Tensor, packed: Packed) -> Tensor:
    """[T - B]: the log-likelihood of each token behind a start token, given what stands before it and the image."""
    following = packed.position[1:] > 0
    states, ids = caption_states(model, image, packed)[:-1][following], packed.ids[1:][following]
    return -F.cross_entropy(at_least_fp32(states @ model.token_embedding.weight.to(states.dtype).T), ids, reduction="none")


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

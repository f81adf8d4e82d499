"""Zero-shot classification by models that predict captions (paper, figure 2): the class whose prompt is the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.evaluate.features import inference
from clipfast.inputs import tokenize
from clipfast.model import CLIP, Packed
from clipfast.model.predict import at_least_fp32, caption_states, word_scores

STATES = 1 << 24  # numbers of the decoder's states, or of scores over the vocabulary, in memory at a time


@torch.no_grad()
def text_likelihoods(model: CLIP, features: Tensor, texts: Sequence[str], tokenizer: Callable[..., Any] = tokenize) -> Tensor:
    """[N, texts] float32 on the CPU: the log-likelihood of each text given the image features [N, D], of any length.

    caption: of all tokens, end token included. words: the mean over the words, less what it would be at best (the entropy of
    the text's own words), since a text of more words has to share its probability among them.
    """
    if model.objective not in ("words", "caption"):
        raise ValueError(f"expected a model that predicts words or a caption, got one for {model.objective}")
    tokens, lengths = tokenizer(list(texts), model.context_length, truncate=True, return_lengths=True)
    with inference(model) as device:
        features = features.to(device)
        found = _words if model.objective == "words" else _captions
        return found(model, features, tokens.to(device), lengths).float().cpu()


def _words(model: CLIP, features: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    own = [row[1 : n - 1] for row, n in zip(tokens.long(), lengths.tolist(), strict=True)]
    used, place = torch.unique(torch.cat(own), return_inverse=True)
    if empty := [number for number, ids in enumerate(own) if not len(ids)]:
        raise ValueError(f"expected a word in every prompt, got none in prompt {empty[0]}")
    counts = torch.zeros(len(own), len(used), device=features.device)
    rows = torch.repeat_interleave(torch.arange(len(own)), lengths - 2).to(features.device)
    counts.index_put_((rows, place), torch.ones(len(place), device=features.device), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(shares).sum(1)
    blocks = features.split(max(1, STATES // model.vocab_size))
    return torch.cat([at_least_fp32(word_scores(model, block)[:, used]) @ shares.T + entropy for block in blocks])


def _captions(model: CLIP, features: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Texts that begin alike share what the vocabulary's softmax costs: it is computed for each beginning once."""
    packed, rows = model.pack(tokens, lengths), tokens.tolist()
    begins: dict[tuple[int, ...], int] = {}
    first, which, into = list[int](), list[int](), list[int]()  # beginnings: their token; tokens that predict: beginning, text
    for text, (start, n) in enumerate(zip(packed.cu_seqlens.tolist(), lengths.tolist(), strict=False)):
        for place in range(n - 1):
            begin = tuple(rows[text][: place + 1])
            if begin not in begins:
                begins[begin] = len(first)
                first.append(start + place)
            which.append(begins[begin])
            into.append(text)
    T, P = len(packed.ids), len(tokens)
    at, which_, into_ = (torch.tensor(own, device=features.device) for own in (first, which, into))
    speaks = torch.cat([packed.position[1:] > 0, packed.position.new_zeros(1).bool()])  # tokens with one behind them
    weight, target = model.token_embedding.weight, packed.ids.roll(-1)[speaks]
    scores = []
    for block in features.split(max(1, STATES // max(T * weight.shape[1], 1))):
        n = len(block)
        ends = (packed.cu_seqlens[1:] + T * torch.arange(n, device=at.device)[:, None]).flatten().int()
        many = Packed(packed.ids.repeat(n), packed.position.repeat(n), F.pad(ends, (1, 0)), packed.max_length)
        states = caption_states(model, block.repeat_interleave(P, 0), many).view(n, T, -1)
        parts = states[:, at].flatten(0, 1).split(max(1, STATES // len(weight)))
        whole = torch.cat([at_least_fp32(part @ weight.to(part.dtype).T).logsumexp(-1) for part in parts]).view(n, -1)
        own = (at_least_fp32(states[:, speaks]) * at_least_fp32(weight[target])).sum(-1) - whole[:, which_]
        scores.append(torch.zeros(n, P, device=at.device, dtype=own.dtype).index_add_(1, into_, own))
    return torch.cat(scores)

"""Token ids numbered anew: a model of the few that some texts use, which is trained in less time to the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from clipfast.model import CLIP


class Vocabulary:
    """CLIP's token ids of some texts, numbered anew in their order, so that the special ones stay the largest.

    A tenth of the 49,408 occurs, but an update goes over the whole table, and so does a softmax that predicts captions.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        tokens = clipfast.tokenize(list(texts), 77, truncate=True)
        self.ids = torch.unique(torch.cat([tokens.flatten(), tokens.new_zeros(1)])).long()  # 0 is what pads

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: Sequence[str], context_length: int, truncate: bool = False, return_lengths: bool = True) -> Any:
        """As `clipfast.tokenize`."""
        tokens, lengths = clipfast.tokenize(texts, context_length, truncate, return_lengths=True)
        return self.renumbered(tokens), lengths

    def renumbered(self, tokens: Tensor) -> Tensor:
        found = torch.searchsorted(self.ids, tokens.long()).clamp(max=len(self.ids) - 1)
        if unknown := tokens[self.ids[found] != tokens].tolist():
            raise ValueError(f"expected texts of the vocabulary's {len(self.ids)} token ids, got {unknown[:5]} besides")
        return found.int()


def narrow(model: CLIP, words: Vocabulary) -> Tensor:
    """Leaves `model` the embeddings of `words` alone, in their order; returns the whole table [vocab_size, C]."""
    table = model.token_embedding.weight.detach()
    _embed(model, table[words.ids])
    return table


def widen(model: CLIP, words: Vocabulary, table: Tensor, decayed: float) -> None:
    """Undoes `narrow` after a training: `model` has its embeddings in the whole `table`, which is changed.

    decayed: the product of 1 - rate · weight decay over all updates. To an embedding that never had a gradient AdamW does
        this and nothing else, so that the model is the one which a training of the whole table would have made.
    """
    own = model.token_embedding.weight.detach()
    table = table.to(own.device).mul_(decayed)
    table[words.ids.to(own.device)] = own
    _embed(model, table)


def _embed(model: CLIP, weight: Tensor) -> None:
    model.token_embedding = nn.Embedding.from_pretrained(weight, freeze=False).train(model.training)
    model.vocab_size = len(weight)

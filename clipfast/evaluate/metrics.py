"""Ranks and shares, in blocks: the full matrix of scores never exists."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 1 << 24  # elements of a block of scores: 64 MB in float32, whatever the size of the data set


@torch.no_grad()
def best_ranks(queries: Tensor, others: Tensor, query_ids: Tensor, other_ids: Tensor) -> Tensor:
    """[queries] int64 on the CPU: how many of `others` score higher than the best of those that share the query's id."""
    others, other_ids = others.to(queries.device), other_ids.to(queries.device)
    index, ranks = torch.arange(len(others), device=queries.device), []
    rows = max(1, SCORES // max(1, len(others)))
    for block, ids in zip(queries.split(rows), query_ids.to(queries.device).split(rows), strict=True):
        scores = block @ others.T
        right = ids[:, None] == other_ids
        if not scores.isfinite().all() or not right.any(1).all():
            raise ValueError("expected finite features and a right answer for every query; check the model and the ids")
        best, _ = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True)
        first = index.where(right & (scores == best), len(others)).amin(1, keepdim=True)
        ranks.append(((scores > best) | ((scores == best) & (index < first))).sum(1).cpu())
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.long)


def share(hits: Tensor) -> float:
    if not len(hits):
        raise ValueError("expected images to evaluate on, got none")
    return hits.double().mean().item()

"""The numbers that the paper and its followers report, of scores, predictions and labels.

N examples, C classes, Q queries, G things to find. What scikit-learn has is scikit-learn's (`pip install clipfast[eval]`); what
compares features is ours, in blocks: the full matrix of scores never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

SCORES = 1 << 24  # elements of a block of scores: 64 MB in float32, whatever the size of the data set
Array: TypeAlias = "Tensor | np.ndarray | Sequence[Any]"


def needed(name: str) -> ModuleType:
    """A module of scikit-learn or scipy, which only the evaluation uses."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"expected {name}, which this number is computed with: pip install 'clipfast[eval]'") from error


# ---- what came in ------------------------------------------------------------------------------------------------------------


def array(values: ArrayLike | Tensor, what: str, dimensions: int) -> np.ndarray:
    """A finite array on the CPU, with at least one row."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.ndim != dimensions or not found.size:
        raise ValueError(f"expected {what} with {dimensions} dimension(s) and at least one row, got shape {found.shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise ValueError(f"expected finite {what}, got {int((~np.isfinite(found)).sum())} NaN or infinite; check the model")
    return found


def paired(first: np.ndarray, second: np.ndarray, what: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"expected as many {what}, got {len(first)} and {len(second)}")


def scored(scores: Array, targets: Array) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, C] and the index of each row's class [N]."""
    table, right = array(scores, "scores", 2), array(targets, "targets", 1)
    paired(table, right, "rows of scores as targets")
    if right.dtype.kind not in "iu" or right.min() < 0 or right.max() >= table.shape[1]:
        raise ValueError(
            f"expected targets as whole numbers from 0 to {table.shape[1] - 1}, "
            f"got {right.dtype} from {right.min()} to {right.max()}"
        )
    return table, right


# ---- one class an example ----------------------------------------------------------------------------------------------------


def top_k(scores: Array, targets: Array, k: int = 1) -> float:
    """Share of rows whose class is among the k of highest score; scores [N, C]. Equal scores: the smaller index first."""
    if k < 1:
        raise ValueError(f"expected k of 1 or more, got {k}")
    table, right = scored(scores, targets)
    own = table[np.arange(len(right)), right][:, None]
    before = (table > own) | ((table == own) & (np.arange(table.shape[1]) < right[:, None]))
    return float((before.sum(1) < k).mean())


def mean_top1_top5(scores: Array, targets: Array) -> float:
    """Kinetics' measure: the mean of top-1 and top-5."""
    return (top_k(scores, targets, 1) + top_k(scores, targets, 5)) / 2


def mean_per_class(predictions: Array, targets: Array) -> float:
    """Accuracy within each class, averaged over the classes that have examples."""
    predicted, right = array(predictions, "predictions", 1), array(targets, "targets", 1)
    paired(predicted, right, "predictions as targets")
    return float(
        needed("sklearn.metrics").recall_score(right, predicted, labels=np.unique(right), average="macro", zero_division=0)
    )


def f1(predictions: Array, targets: Array, average: str = "binary") -> float:
    """F1 of class 1 ("binary"), or over all classes ("macro", "micro", "weighted"). Nothing found and nothing there: 0."""
    predicted, right = array(predictions, "predictions", 1), array(targets, "targets", 1)
    paired(predicted, right, "predictions as targets")
    return float(needed("sklearn.metrics").f1_score(right, predicted, average=average, zero_division=0))


def roc_auc(scores: Array, relevant: Array) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counted half; scores [N], relevant [N]."""
    values, right = array(scores, "scores", 1), array(relevant, "labels", 1)
    paired(values, right, "scores as labels")
    if set(np.unique(right).tolist()) != {0, 1}:
        raise ValueError(f"expected labels 0 and 1, both of them, got {np.unique(right)[:5].tolist()}")
    return float(needed("sklearn.metrics").roc_auc_score(right, values))


def confusion(predictions: Array, targets: Array, classes: int) -> np.ndarray:
    """Counts [C, C]: row the right class, column the predicted one."""
    predicted, right = array(predictions, "predictions", 1), array(targets, "targets", 1)
    paired(predicted, right, "predictions as targets")
    if outside := sorted(set(np.unique([predicted, right]).tolist()) - set(range(classes))):
        raise ValueError(f"expected classes from 0 to {classes - 1}, got {outside[:5]}")
    return needed("sklearn.metrics").confusion_matrix(right, predicted, labels=np.arange(classes))


def calibration_error(probabilities: Array, targets: Array, bins: int = 15) -> float:
    """ECE: |accuracy - confidence| in bins of equal width of the highest probability, weighted by their rows; [N, C]."""
    table, right = scored(probabilities, targets)
    if table.min() < 0 or table.max() > 1 + 1e-4:
        raise ValueError(f"expected probabilities from 0 to 1, got {table.min():.3g} to {table.max():.3g}; apply a softmax")
    confidence, hits = table.max(1).astype(np.float64), table.argmax(1) == right
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # a bin holds its upper edge
    gaps = np.bincount(place, hits - confidence, bins)
    return float(np.abs(gaps).sum() / len(right))


def base_to_new(scores: Array, targets: Array) -> dict[str, float]:
    """Accuracy on the first half of the labels (⌈C/2⌉) and on the rest, each among its own half, and their harmonic mean."""
    table, right = scored(scores, targets)
    half = -(-table.shape[1] // 2)
    base = right < half
    if base.all() or not base.any():
        rest = table.shape[1] - half
        raise ValueError(f"expected examples of the first {half} classes and of the other {rest}, one half has none")
    accuracy = {"base": top_k(table[base, :half], right[base]), "new": top_k(table[~base, half:], right[~base] - half)}
    return accuracy | {"harmonic_mean": harmonic_mean(accuracy["base"], accuracy["new"])}


def harmonic_mean(base: float, new: float) -> float:
    return 2 * base * new / (base + new) if base + new else 0.0


def group_scores(scores: Array, groups: Sequence[Sequence[int]], by: str = "mean") -> np.ndarray:
    """Scores [N, groups]: the mean (ImageNet's 1,000 classes as 16 shapes) or the max (synonyms) of each group's columns."""
    if by not in ("mean", "max"):
        raise ValueError(f"expected by as mean or max, got {by!r}")
    table = array(scores, "scores", 2)
    for number, columns in enumerate(groups):
        if not len(columns) or min(columns) < 0 or max(columns) >= table.shape[1]:
            raise ValueError(f"expected columns from 0 to {table.shape[1] - 1} in group {number}, got {list(columns)[:5]}")
    return np.stack([getattr(table[:, list(columns)], by)(1) for columns in groups], 1)


def shape_bias(predictions: Array, shapes: Array, textures: Array) -> float:
    """Cue conflicts: of the images read by their shape or by their texture, the share read by shape. All three [N]."""
    predicted, shape, texture = (
        array(values, what, 1) for values, what in ((predictions, "predictions"), (shapes, "shapes"), (textures, "textures"))
    )
    paired(predicted, shape, "predictions as shapes")
    paired(predicted, texture, "predictions as textures")
    conflict = shape != texture
    by_shape, by_texture = ((predicted == cue)[conflict].sum() for cue in (shape, texture))
    if not by_shape + by_texture:
        raise ValueError(f"expected some of {int(conflict.sum())} images in conflict to be read by shape or texture, got none")
    return float(by_shape / (by_shape + by_texture))


# ---- several labels an example -----------------------------------------------------------------------------------------------


def average_precision(scores: Array, relevant: Array, weights: Array | None = None, points: int | None = None) -> float:
    """Average precision of one class; scores [N], relevant [N] of 0 and 1, at least one of them 1.

    `weights`: of each row. `points=11`: VOC2007's interpolation, the mean over recalls 0, 0.1, ... 1 of the best precision
    that is reached at that recall or above.
    """
    values, right = array(scores, "scores", 1), array(relevant, "labels", 1)
    paired(values, right, "scores as labels")
    weigh = None if weights is None else array(weights, "weights", 1)
    if not np.isin(right, (0, 1)).all() or not right.any():
        raise ValueError(f"expected labels 0 and 1 and at least one 1, got {np.unique(right)[:5].tolist()}")
    if points is None:
        return float(needed("sklearn.metrics").average_precision_score(right, values, sample_weight=weigh))
    precision, recall, _ = needed("sklearn.metrics").precision_recall_curve(right, values, sample_weight=weigh)
    precision, recall = precision[:-1], recall[:-1]  # the last is scikit-learn's (1, 0), which no threshold reaches
    grid = np.arange(points) / (points - 1)
    return float(np.mean([precision[recall >= level - 1e-12].max() for level in grid]))


def average_precisions(scores: Array, relevant: Array, points: int | None = None) -> np.ndarray:
    """Average precision of each class [C], NaN where it has no positive; [N, C], labels 1, 0, and -1 for rows left out."""
    table, right = array(scores, "scores", 2), array(relevant, "labels", 2)
    if table.shape != right.shape:
        raise ValueError(f"expected labels of the scores' shape {table.shape}, got {right.shape}")
    if not np.isin(right, (-1, 0, 1)).all():
        raise ValueError(f"expected labels 1, 0 and -1, got {np.unique(right)[:5].tolist()}")
    known = right >= 0
    return np.array(
        [
            average_precision(table[rows, c], right[rows, c], points=points) if (right[:, c] == 1).any() else np.nan
            for c, rows in enumerate(known.T)
        ]
    )


def mean_average_precision(scores: Array, relevant: Array, points: int | None = None) -> float:
    """Mean of `average_precisions` over the classes that have a positive; at least one must."""
    return mean_of_found(average_precisions(scores, relevant, points), "classes with a positive")


def mean_of_found(values: np.ndarray, what: str) -> float:
    if np.isnan(values).all():
        raise ValueError(f"expected {what}, got none")
    return float(np.nanmean(values))


def long_tail(scores: Array, relevant: Array, train_counts: Array) -> dict[str, float]:
    """mAP of all classes, and of head (100 training images or more), medium (20 to 99) and tail; NaN for a part without any."""
    precisions, counts = average_precisions(scores, relevant), array(train_counts, "counts of training images", 1)
    paired(precisions, counts, "classes as counts of training images")
    parts = {"all": counts >= 0, "head": counts >= 100, "medium": (counts >= 20) & (counts < 100), "tail": counts < 20}
    mean_of_found(precisions, "classes with a positive")
    found = ~np.isnan(precisions)
    return {name: float(precisions[part & found].mean()) if (part & found).any() else np.nan for name, part in parts.items()}


def weighted_mean_average_precision(scores: Array, groups: Array, videos: Array) -> float:
    """RareAct's mWAP: average precision where a video's segments of one group share a weight of 1; mean over the classes.

    scores [N, C]; groups [N, C]: 1 positive, 0 negative, 2 hard negative (or any other kind), -1 left out; videos [N].
    """
    table, kinds = array(scores, "scores", 2), array(groups, "groups", 2)
    _, video = np.unique(array(videos, "videos", 1), return_inverse=True)
    paired(table, video, "rows of scores as videos")
    if table.shape != kinds.shape:
        raise ValueError(f"expected groups of the scores' shape {table.shape}, got {kinds.shape}")
    found = []
    for values, kind in zip(table.T, kinds.T, strict=True):
        known = kind >= 0
        _, own, segments = np.unique(np.stack([video[known], kind[known]]), axis=1, return_inverse=True, return_counts=True)
        positive = kind[known] == 1
        weights = 1.0 / segments[own.reshape(-1)]
        found.append(average_precision(values[known], positive.astype(int), weights) if positive.any() else np.nan)
    return mean_of_found(np.array(found), "classes with a positive")


# ---- features against features, in blocks ------------------------------------------------------------------------------------


@torch.no_grad()
def best_ranks(queries: Tensor, others: Tensor, query_ids: Tensor, other_ids: Tensor) -> Tensor:
    """[queries] int64 on the CPU: how many of `others` score higher than the best of those that share the query's id.

    Equal scores: the smaller index first. A block of scores is made once, and read by two comparisons in place; only rows in
    which the best is tied are looked at again. (Sorting out the right answers and the ties by masks over the whole block took
    twice the time of its product.)
    """
    others, device = others.to(queries.device), queries.device
    right = _Right(query_ids, other_ids)
    if not _finite_products(queries, others) or not right.every_query:
        raise ValueError("expected finite features and a right answer for every query; check the model and the ids")
    rows = max(1, SCORES // max(1, len(others)))
    scores, over = (
        torch.empty(min(rows, len(queries)), len(others), device=device, dtype=kind) for kind in (queries.dtype, torch.float32)
    )
    ranks = []
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        row, column = (own.to(device) for own in right.pairs(start, len(block)))
        values, beyond = torch.mm(block, others.T, out=scores[: len(block)]), over[: len(block)]
        own = values[row, column]
        best = own.new_full((len(block),), -torch.inf).scatter_reduce_(0, row, own, "amax")
        rank = _count(torch.gt(values, best[:, None], out=beyond))
        tied = (_count(torch.ge(values, best[:, None], out=beyond)) - rank > 1).nonzero()[:, 0]
        if len(tied):
            hits = own == best[row]
            first = rank.new_full((len(block),), len(others)).scatter_reduce_(0, row[hits], column[hits], "amin")
            for some in tied.split(max(1, rows // 4)):  # the comparison of indices takes eight bytes a score
                before = torch.arange(len(others), device=device) < first[some, None]
                rank[some] += ((values[some] == best[some, None]) & before).sum(1)
        ranks.append(rank.cpu())
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.long)


class _Right:
    """Which of the others are right answers of which query: those with its id."""

    def __init__(self, query_ids: Tensor, other_ids: Tensor) -> None:
        ids, self.order = other_ids.cpu().sort(stable=True)
        self.first = torch.searchsorted(ids, query_ids.cpu().contiguous())
        self.count = torch.searchsorted(ids, query_ids.cpu().contiguous(), right=True) - self.first
        self.every_query = bool((self.count > 0).all())

    def pairs(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """(query within the block, other) of every right answer of a block of queries."""
        first, count = self.first[start : start + rows], self.count[start : start + rows]
        row = torch.repeat_interleave(torch.arange(rows), count)
        place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        return row, self.order[first[row] + place]


def _finite_products(queries: Tensor, others: Tensor) -> bool:
    """Whether no score can be NaN or infinite: |q · o| is at most the product of their lengths."""
    if not len(queries) or not len(others):
        return True
    longest = [max(part.float().norm(dim=1).max() for part in own.split(1 << 16)) for own in (queries, others)]
    return bool((longest[0] * longest[1]).isfinite())


def _count(flags: Tensor) -> Tensor:
    """Ones in each row [N, M] of 0 and 1 as floating-point numbers, whose sum is exact up to 2^24 in float32."""
    return sum(part.sum(1).long() for part in flags.split(1 << 23, dim=1))  # type: ignore[return-value]


def share(hits: Tensor) -> float:
    if not len(hits):
        raise ValueError("expected images to evaluate on, got none")
    return hits.double().mean().item()


@torch.no_grad()
def person_retrieval(
    queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Rank-k (any hit among the k nearest), mAP and mINP of queries [Q, D] in a gallery [G, D].

    Rows with equal ids belong together, and every query needs a right answer. mINP: the mean of (right answers / rank of the
    last of them). Equal scores: the smaller index first.
    """
    gallery, gallery_ids = gallery.to(queries.device), gallery_ids.to(queries.device)
    places = torch.arange(1, len(gallery) + 1, device=queries.device)
    firsts, precisions, penalties = [], [], []
    rows = max(1, SCORES // 4 // max(1, len(gallery)))  # a sort's indices take twice the room of its scores
    for block, ids in zip(queries.split(rows), query_ids.to(queries.device).split(rows), strict=True):
        scores = block @ gallery.T
        right = ids[:, None] == gallery_ids
        if not scores.isfinite().all() or not right.any(1).all():
            raise ValueError("expected finite features and a right answer for every query; check the model and the ids")
        hits = right.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        answers = hits.sum(1)
        precision = (hits.cumsum(1) / places.double()).masked_fill(~hits, 0)
        precisions.append((precision.sum(1) / answers).cpu())
        penalties.append((answers / (places * hits).amax(1).double()).cpu())
        firsts.append(hits.int().argmax(1).cpu())
    first = torch.cat(firsts) if firsts else torch.zeros(0)
    results = {f"Rank-{k}": share(first < k) for k in ks}
    return results | {"mAP": torch.cat(precisions).mean().item(), "mINP": torch.cat(penalties).mean().item()}

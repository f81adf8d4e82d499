"""Few-shot probes, and how many examples a class the zero-shot classifier is worth (paper, figures 6 to 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from clipfast.evaluate import metrics
from clipfast.evaluate.metrics import Array, array
from clipfast.evaluate.probe import README_PENALTY, Score, linear_probe

SHOTS = (1, 2, 4, 8, 16)


class Worth(NamedTuple):
    """Examples a class; `bound`: "" where the probes enclose it, "<" or ">" where all are better or all are worse."""

    examples: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound} {self.examples:.3g}".strip()


class FewShot(NamedTuple):
    """`scores`: examples a class -> the score of each seed. The whole set stands at its mean number of examples a class."""

    scores: dict[float, list[float]]
    whole: float | None
    zero_shot: float | None
    worth: Worth | None

    def summary(self) -> dict[str, Any]:
        worth = None if self.worth is None else self.worth._asdict()
        scores = [{"examples": shots, "scores": found} for shots, found in self.scores.items()]
        return {"scores": scores, "whole": self.whole, "zero_shot": self.zero_shot, "worth": worth}

    def table(self) -> str:
        lines = [f"{'examples a class':>16} {'mean':>8} {'deviation':>9} {'seeds':>5}"]
        for shots, found in self.scores.items():
            name = f"all ({shots:.4g})" if shots == self.whole else f"{shots:g}"
            deviation = f"{np.std(found, ddof=1):9.4f}" if len(found) > 1 else f"{'':9}"
            lines.append(f"{name:>16} {np.mean(found):8.4f} {deviation} {len(found):5}")
        if self.zero_shot is not None:
            lines.append(f"{'zero-shot':>16} {self.zero_shot:8.4f}, worth {self.worth} examples a class")
        return "\n".join(lines)


def few_shot(
    train: tuple[np.ndarray | Tensor, Array],
    test: tuple[np.ndarray | Tensor, Array],
    *,
    validation: tuple[np.ndarray | Tensor, Array] | None = None,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    whole: bool = True,
    zero_shot: float | None = None,
    names: Sequence[str] | None = None,
    penalty: float | None = None,
    score: Score = metrics.top_k,
    solver: str = "auto",
    max_iterations: int = 1000,
    device: str = "cpu",
) -> FewShot:
    """Scores on test of probes of `shots` examples a class, of each of `seeds` draws, and of the whole of train.

    With `validation` each probe's penalty is chosen on it (which the head is not fitted on: it would be more examples), else
    it is `penalty`, by default the one of OpenAI's README. A draw of few is part of the draw of more, of the same seed.
    `zero_shot`: the zero-shot score on the same test, whose worth in examples is then found. `names`: of classes 0, 1, ...
    """
    labels = array(train[1], "labels of train", 1)
    classes, counts = np.unique(labels, return_counts=True)
    if not shots or min(shots) < 1 or seeds < 1:
        raise ValueError(f"expected one shot or more and one seed or more, got shots {list(shots)} and {seeds} seeds")
    if counts.min() < max(shots):
        least = classes[counts.argmin()].item()
        told = f"expected {max(shots)} examples or more of every class, got {counts.min()} of "
        raise ValueError(f"{told}{least if names is None else names[least]!r}; give fewer shots")
    options: dict[str, Any] = {"score": score, "solver": solver, "max_iterations": max_iterations, "device": device}

    def probe(rows: np.ndarray | slice) -> float:
        few, chosen = (train[0][rows], labels[rows]), penalty
        if chosen is None:
            chosen = README_PENALTY
            if validation is not None:
                trials = linear_probe(few, validation, **options).trials
                chosen = max(trials, key=lambda trial: (trial.score, trial.penalty)).penalty
        found = linear_probe(few, test=test, penalty=chosen, **options).score
        assert found is not None
        return found

    order = [np.random.default_rng(seed).permutation(len(labels)) for seed in range(seeds)]
    scores: dict[float, list[float]] = {
        float(number): [probe(first_of_each(labels, own, number)) for own in order] for number in sorted(set(shots))
    }
    mean = len(labels) / len(classes)
    if whole and mean not in scores:
        scores[mean] = [probe(slice(None))]
    worth = None
    if zero_shot is not None:
        worth = examples_worth([*scores], [float(np.mean(found)) for found in scores.values()], zero_shot)
    return FewShot(scores, mean if whole else None, zero_shot, worth)


def first_of_each(labels: np.ndarray, order: np.ndarray, number: int) -> np.ndarray:
    """Sorted rows: the first `number` of each class in this order."""
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.r_[True, labels[by_class][1:] != labels[by_class][:-1]])
    return np.sort(np.concatenate([by_class[start : start + number] for start in starts]))


def examples_worth(shots: Sequence[float], scores: Sequence[float], zero_shot: float) -> Worth:
    """Where the curve of scores over log(examples a class) first reaches the zero-shot score: log-linear interpolation."""
    points, values = array(shots, "shots", 1), array(scores, "scores", 1)
    if len(points) != len(values) or (np.diff(points) <= 0).any() or points[0] <= 0:
        raise ValueError(f"expected shots that rise, each with a score, got {list(shots)} and {len(values)} scores")
    if not np.isfinite(zero_shot):
        raise ValueError(f"expected a finite zero-shot score, got {zero_shot}")
    reached = np.flatnonzero(values >= zero_shot)
    if not len(reached):
        return Worth(float(points[-1]), ">")
    if (after := reached[0]) == 0:
        return Worth(float(points[0]), "" if values[0] == zero_shot else "<")
    share = (zero_shot - values[after - 1]) / (values[after] - values[after - 1])
    return Worth(float(points[after - 1] * (points[after] / points[after - 1]) ** share))

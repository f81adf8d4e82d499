"""The probe of images with several labels (VOC2007): a logistic regression for each class, one penalty for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clipfast.evaluate.lbfgs import Fit, Rows
from clipfast.evaluate.metrics import array
from clipfast.evaluate.probe import Head, Probe, Score, by_scikit_learn, search

Split = tuple[np.ndarray, np.ndarray]


class OneAgainstRest:
    """Fits all classes with one penalty; labels [N, C] of 1, 0, and -1 for rows that a class leaves out."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, names: Sequence[str], max_iterations: int) -> None:
        self.features, self.labels, self.names, self.max_iterations = features, labels, list(names), max_iterations

    def __call__(self, penalty: float) -> tuple[Head, Fit]:
        fits = []
        for own in self.labels.T:
            kept = np.flatnonzero(own >= 0)
            rows = Rows([(self.features, kept, own[kept])], torch.device("cpu"), torch.float32)
            fits.append(by_scikit_learn(rows, penalty, self.max_iterations))
        weight, bias = (torch.cat([getattr(fit, part) for fit in fits]) for part in ("weight", "bias"))
        loss, steps = float(np.mean([fit.loss for fit in fits])), max(fit.iterations for fit in fits)
        fit = Fit(weight, bias, loss, steps, all(fit.converged for fit in fits))
        return Head(weight, bias, self.names, {}), fit


def multilabel_probe(
    train: Split,
    test: Split,
    validation: Split | None = None,
    *,
    penalty: float | None = None,
    score: Score,
    names: Sequence[str],
    max_iterations: int = 1000,
    seed: int = 0,
) -> Probe:
    """As `linear_probe`, of labels [N, C] of 0 and 1, and -1 where a class is not known; `score(logits, labels)`.

    Without `validation` a fifth of train, drawn at random, chooses the penalty. Each class needs images with and without it.
    """
    features, labels = train[0], array(train[1], "labels of train", 2)
    _both(labels, names, "train")
    fitted, held = (features, labels), validation
    if penalty is None:
        if held is None:
            order = np.random.default_rng(seed).permutation(len(labels))
            out, kept = np.split(order, [max(1, len(labels) // 5)])
            fitted, held = (features[kept], labels[kept]), (features[out], labels[out])
            _both(labels[kept], names, "the four fifths of train that a penalty is tried on")
        relevant = held[1]
        rows = Rows([(held[0], None, np.arange(len(relevant)))], torch.device("cpu"), torch.float32)
        trials = search(
            OneAgainstRest(*fitted, names, max_iterations), rows, lambda logits, numbers: score(logits, relevant[numbers])
        )
        penalty = max(trials, key=lambda trial: (trial.score, trial.penalty)).penalty
    else:
        trials = []
    if validation is not None:
        features, labels = (np.concatenate(own) for own in zip(train, validation, strict=True))
    head, fit = OneAgainstRest(features, labels, names, max_iterations)(penalty)
    about = {"penalty": float(penalty), "rows": len(labels), "solver": "sklearn", "loss": fit.loss, "multilabel": True}
    head = head._replace(about=about | {"iterations": fit.iterations, "converged": fit.converged})
    return Probe(head, trials, score(head.logits(test[0]).numpy(), test[1]))


def _both(labels: np.ndarray, names: Sequence[str], where: str) -> None:
    for name, own in zip(names, labels.T, strict=True):
        if not {0, 1} <= set(own.tolist()):
            raise ValueError(f"expected images with and without {name} in {where}, got only one kind; leave the class out")

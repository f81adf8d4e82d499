"""Multinomial logistic regression by full-batch L-BFGS, in blocks of rows: the logits of all rows never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipfast.evaluate import metrics

HISTORY = 10  # pairs that L-BFGS remembers, as scipy's
ENOUGH = 1e-4  # share of the decrease that the slope promises which a step must reach (Armijo)


class Rows(NamedTuple):
    """Rows of features: `parts` of (features [N, D], which rows of them or None for all, index of each row's class)."""

    parts: list[tuple[np.ndarray | Tensor, np.ndarray | None, np.ndarray]]
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return sum(len(labels) for _, _, labels in self.parts)

    @property
    def width(self) -> int:
        return self.parts[0][0].shape[1]

    def blocks(self, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features [B, D], class indices [B]) on the device, B so that a block's features and logits stay small."""
        rows = max(1, metrics.SCORES // max(self.width, classes))
        for features, chosen, labels in self.parts:
            for start in range(0, len(labels), rows):
                own = slice(start, start + rows)
                block = features[own if chosen is None else chosen[own]]
                # np.array: torch warns of a memory map that cannot be written to
                tensor = block if isinstance(block, Tensor) else torch.from_numpy(np.array(block))
                yield tensor.to(self.device, self.dtype), torch.as_tensor(labels[own], device=self.device)

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything in float64, for a set that is small."""
        features = [
            np.asarray(torch.as_tensor(f).cpu() if isinstance(f, Tensor) else f, dtype=np.float64)[
                slice(None) if chosen is None else chosen
            ]
            for f, chosen, _ in self.parts
        ]
        return np.concatenate(features), np.concatenate([labels for _, _, labels in self.parts])


class Moments(NamedTuple):
    """Mean [D] of the rows, and eigenvalues [D] and eigenvectors [D, D] of their covariance."""

    mean: Tensor
    values: Tensor
    vectors: Tensor


def moments(rows: Rows) -> Moments:
    total = torch.zeros(rows.width, dtype=torch.float64, device=rows.device)
    square = torch.zeros(rows.width, rows.width, dtype=torch.float64, device=rows.device)
    origin = next(rows.blocks(1))[0][0]  # near the mean: squares of what is left lose fewer digits
    for block, _ in rows.blocks(1):
        block = block - origin
        total += block.sum(0, dtype=torch.float64)
        square += block.T @ block
    if not square.isfinite().all():
        raise ValueError("expected finite features, got NaN or infinite ones; check the model and the images")
    mean = total / len(rows)
    values, vectors = torch.linalg.eigh(square / len(rows) - mean[:, None] * mean)
    return Moments((mean + origin).to(rows.dtype), values.clamp_min(0), vectors.to(rows.dtype))


class Fit(NamedTuple):
    """Weight [K, D] and bias [K], K = 1 for two classes (the logit of the second); mean loss with the penalty."""

    weight: Tensor
    bias: Tensor
    loss: float
    iterations: int
    converged: bool


@torch.no_grad()
def logistic(rows: Rows, classes: int, penalty: float, about: Moments, start: Fit | None, max_iterations: int) -> Fit:
    """The least mean cross entropy + penalty / (2 N) · |weight|², scikit-learn's objective with C = 1 / penalty.

    The features of a CLIP are far from round, so L-BFGS runs in coordinates where the Hessian at zero is nearly the identity:
    weight = a · whiten, with features about their mean. The optimum is the same.
    """
    outputs, count = 1 if classes == 2 else classes, len(rows)
    curvature = 1 / classes if classes > 2 else 0.25  # p (1 - p) at equal probabilities
    scale = curvature * about.values + penalty / count
    root = scale.clamp_min(1e-7 * float(scale.max())).sqrt().to(rows.dtype)
    whiten = about.vectors.T / root[:, None]

    def split(point: Tensor) -> tuple[Tensor, Tensor]:
        weight = point[:-1].view(about.mean.numel(), outputs).T @ whiten
        return weight, point[-1] / curvature**0.5

    def objective(point: Tensor) -> tuple[float, Tensor]:
        weight, bias = split(point)
        shift, loss = bias - weight @ about.mean, torch.zeros((), dtype=torch.float64, device=rows.device)
        slope, sums = torch.zeros_like(weight), torch.zeros_like(bias)
        for block, labels in rows.blocks(classes):
            part, error = entropy(torch.addmm(shift, block, weight.T), labels)
            loss += part
            slope.addmm_(error.T, block)
            sums += error.sum(0)
        slope = (slope - sums[:, None] * about.mean + penalty * weight) / count
        value = loss / count + penalty / (2 * count) * weight.double().square().sum()
        gradient = torch.empty_like(point)
        gradient[:-1] = (whiten @ slope.T).reshape(point[:-1].shape)
        gradient[-1] = sums / count / curvature**0.5
        return float(value), gradient

    point = torch.zeros(about.mean.numel() + 1, outputs, dtype=rows.dtype, device=rows.device)
    if start is not None:
        point[:-1] = (start.weight @ (about.vectors * root)).T
        point[-1] = (start.bias + start.weight @ about.mean) * curvature**0.5
    point, loss, iterations, converged = minimise(objective, point, max_iterations)
    weight, bias = split(point)
    return Fit(weight, bias - weight @ about.mean, loss, iterations, converged)


def entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the rows' cross entropies, and its gradient by the logits, in their place; one column: two classes."""
    if logits.shape[1] == 1:
        sign = (2 * labels - 1).to(logits.dtype)[:, None]
        loss = torch.nn.functional.softplus(-sign * logits).sum(dtype=torch.float64)
        return loss, -sign * torch.sigmoid(-sign * logits)
    logits -= logits.amax(1, keepdim=True)
    own = logits.gather(1, labels[:, None])
    # A probability below e-40 adds nothing, but as a denormal number it makes the product with the features 4 times slower.
    total = logits.clamp_min_(-40).exp_().sum(1, keepdim=True)
    logits /= total
    logits.scatter_add_(1, labels[:, None], torch.full_like(own, -1))
    return (total.log() - own).sum(dtype=torch.float64), logits


def minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]], point: Tensor, max_iterations: int, tolerance: float = 1e-6
) -> tuple[Tensor, float, int, bool]:
    """L-BFGS with backtracking for a convex objective; -> point, value, iterations, converged.

    Converged: no entry of the gradient above `tolerance`, or three steps in a row that win less than a 1e-8th of the value.
    """
    value, gradient = objective(point)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    idle = 0
    for iteration in range(max_iterations):
        if float(gradient.abs().max()) <= tolerance or idle == 3:
            return point, value, iteration, True
        direction = -descent(gradient, pairs)
        slope = float((direction.double() * gradient).sum())
        step = 1.0
        while True:
            candidate = torch.add(point, direction, alpha=step)
            found, next_gradient = objective(candidate)
            if found <= value + ENOUGH * step * slope:
                break
            bent = -slope * step / (2 * (found - value - slope * step))  # least of the parabola through both values
            step *= min(0.5, max(0.1, bent))
            if step < 1e-8:  # rounding hides what is left to win
                return point, value, iteration, True
        moved, turned = candidate - point, next_gradient - gradient
        if (product := float((moved.double() * turned).sum())) > 0:
            pairs = [*pairs, (moved, turned, product)][-HISTORY:]
        idle = idle + 1 if value - found <= 1e-8 * max(1.0, abs(found)) else 0
        point, value, gradient = candidate, found, next_gradient
    return point, value, max_iterations, False


def descent(gradient: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The inverse Hessian that the pairs of (moves, turns of the gradient) tell of, times the gradient (two loops)."""
    direction, shares = gradient.clone(), []
    for moved, turned, product in reversed(pairs):
        shares.append(float((moved * direction).sum()) / product)
        direction.sub_(turned, alpha=shares[-1])
    if pairs:
        _, turned, product = pairs[-1]
        direction *= product / float((turned * turned).sum())
    for (moved, turned, product), share in zip(pairs, reversed(shares), strict=True):
        direction.add_(moved, alpha=share - float((turned * direction).sum()) / product)
    return direction

"""Robustness to natural shifts (paper, figure 13): what accuracy in distribution promises, and what more a model has.

A line through standard models in logit space tells the accuracy under shift that one in distribution promises. Effective
robustness: accuracy under shift above that line. Relative robustness: accuracy under shift above a baseline's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipfast.evaluate.intervals import Interval, at
from clipfast.evaluate.metrics import array, needed, paired


class Line(NamedTuple):
    """y = slope · x + intercept in transformed coordinates; r: the correlation there."""

    slope: float
    intercept: float
    r: float


class Robust(NamedTuple):
    """One model: accuracies in distribution and under shift, robustness with its bootstrap interval."""

    name: str
    accuracy: float
    shifted: float
    effective: float
    interval: Interval
    relative: float | None


class Robustness(NamedTuple):
    """The line, and its band: the interval of the promised accuracy `band[i]` at the accuracy `grid[i]`."""

    line: Line
    models: list[Robust]
    grid: list[float]
    band: list[Interval]

    def summary(self) -> dict[str, Any]:
        models = [model._asdict() | {"interval": list(model.interval)} for model in self.models]
        return {"line": self.line._asdict(), "models": models, "grid": self.grid, "band": [list(own) for own in self.band]}

    def table(self) -> str:
        width = max(5, *(len(model.name) for model in self.models))
        lines = [f"{'model':{width}} {'accuracy':>8} {'shifted':>8} {'effective':>9} {'interval':>18} {'relative':>8}"]
        for model in self.models:
            interval = f"{model.interval.low:+.4f} {model.interval.high:+.4f}"
            relative = "" if model.relative is None else f"{model.relative:+.4f}"
            lines.append(
                f"{model.name:{width}} {model.accuracy:8.4f} {model.shifted:8.4f} {model.effective:+9.4f} "
                f"{interval:>18} {relative:>8}"
            )
        line = self.line
        return "\n".join([*lines, f"logit(shifted) = {line.slope:.3f} logit(accuracy) {line.intercept:+.3f}, r = {line.r:.3f}"])


def robustness(
    names: Sequence[str],
    accuracy: Sequence[float],
    shifted: Sequence[float],
    standard: Sequence[str],
    *,
    baseline: str | None = None,
    images: tuple[int, int] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Robustness:
    """Robustness of each model, given its accuracy in distribution and its mean accuracy under shift.

    `standard`: the names of the models that the line is fitted through, three or more. `baseline`: what relative robustness is
    measured against. `images` in and out of distribution: lets an accuracy of 0 or 1, whose logit is infinite, count as half an
    image. Intervals and band: standard models drawn again with replacement.
    """
    at(level)
    known, shift = (array(values, "accuracies", 1).astype(np.float64) for values in (accuracy, shifted))
    paired(known, shift, "accuracies in distribution as under shift")
    if len(names) != len(known) or len(set(names)) != len(names):
        raise ValueError(f"expected {len(known)} names, each once, got {list(names)}")
    if unknown := [name for name in [*standard, *([baseline] if baseline is not None else [])] if name not in names]:
        raise ValueError(f"expected standard models and baseline among {list(names)}, got {unknown}")
    x, y = (logit(values, names, None if images is None else images[place]) for place, values in enumerate((known, shift)))
    rows = np.array([place for place, name in enumerate(names) if name in set(standard)])
    line = fit(x[rows], y[rows])
    grid = np.linspace(x.min(), x.max(), 41)
    promised = again(x[rows], y[rows], np.r_[x, grid], draws, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = np.quantile(expit(promised), tails, axis=0)
    effective = shift - expit(line.slope * x + line.intercept)
    base = None if baseline is None else shift[list(names).index(baseline)]
    models = []
    for i, name in enumerate(names):
        interval = Interval(float(shift[i] - ends[1, i]), float(shift[i] - ends[0, i]))
        relative = None if base is None else float(shift[i] - base)
        models.append(Robust(name, float(known[i]), float(shift[i]), float(effective[i]), interval, relative))
    band = [Interval(float(low), float(high)) for low, high in ends[:, len(x) :].T]
    return Robustness(line, models, expit(grid).tolist(), band)


def log_log_fit(compute: Sequence[float], error: Sequence[float]) -> Line:
    """log10(error) over log10(compute): how the mean zero-shot error falls with compute (figure 9)."""
    x, y = array(compute, "compute", 1).astype(np.float64), array(error, "errors", 1).astype(np.float64)
    paired(x, y, "amounts of compute as errors")
    if (x <= 0).any() or (y <= 0).any():
        raise ValueError(f"expected compute and errors above 0, got {x.min():.3g} and {y.min():.3g}")
    return fit(np.log10(x), np.log10(y))


def fit(x: np.ndarray, y: np.ndarray) -> Line:
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(f"expected three models or more, of different accuracy, to fit a line through, got {len(x)}")
    found = needed("scipy.stats").linregress(x, y)
    return Line(float(found.slope), float(found.intercept), float(found.rvalue))


def again(x: np.ndarray, y: np.ndarray, at: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws, len(at)]: the lines of resampled models at these places; a draw of equal x has no line and is drawn again."""
    rng = np.random.default_rng(seed)
    lines: list[np.ndarray] = []
    while len(lines) < draws:
        rows = rng.integers(0, len(x), len(x))
        if np.ptp(x[rows]):
            slope, intercept = np.polyfit(x[rows], y[rows], 1)
            lines.append(slope * at + intercept)
    return np.array(lines)


def logit(values: np.ndarray, names: Sequence[str], images: int | None) -> np.ndarray:
    if images is not None:
        values = values.clip(0.5 / images, 1 - 0.5 / images)
    if (outside := (values <= 0) | (values >= 1)).any():
        place = int(outside.argmax())
        raise ValueError(
            f"expected accuracies between 0 and 1 (shares, not per cent), got {values[place]} of {names[place]}; "
            f"give the numbers of images if it is that"
        )
    return np.log(values) - np.log1p(-values)


def expit(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))

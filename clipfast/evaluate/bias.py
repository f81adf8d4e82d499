"""The bias probe (paper, section 5; arXiv's 7.1): how the design of the classes changes whom a classifier wrongs.

Images of people are classified among labels, some of which wrong a person; the share of images that get such a label is
compared between values of an attribute (race, age, ...), and between designs of the classes (with and without 'child').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipfast.evaluate import metrics
from clipfast.evaluate.intervals import Interval, clopper_pearson
from clipfast.evaluate.metrics import array, paired

EVERYONE = "all"  # the attribute, and its value, of every image


class Share(NamedTuple):
    """Of the images whose `attribute` has `value`, under one design: how many got a label of the group."""

    design: str
    group: str
    attribute: str
    value: str
    hits: int
    images: int
    share: float
    interval: Interval


class Bias(NamedTuple):
    """One share for every design × group × value of an attribute."""

    shares: list[Share]

    def summary(self) -> list[dict[str, Any]]:
        return [own._asdict() for own in self.shares]

    def table(self) -> str:
        """A row for each value of each attribute; the designs side by side within each group of labels."""
        designs = list(dict.fromkeys(own.design for own in self.shares))
        groups = list(dict.fromkeys(own.group for own in self.shares))
        found = {own[:4]: own for own in self.shares}
        rows = {(own.attribute, own.value): own.images for own in self.shares}
        wide = max(len(f"{attribute} {value}") for attribute, value in rows)
        columns = [(group, design) for group in groups for design in designs]
        widths = [max(len(group), len(design), 7) for group, design in columns]
        lines = [
            " ".join([" " * (wide + 9), *(f"{pair[place]:>{width}}" for pair, width in zip(columns, widths, strict=True))])
            for place in (0, 1)
        ]
        for (attribute, value), images in rows.items():
            cells = [
                f"{found[design, group, attribute, value].share:{width}.1%}"
                for (group, design), width in zip(columns, widths, strict=True)
            ]
            lines.append(" ".join([f"{f'{attribute} {value}':{wide}} {images:8}", *cells]))
        return "\n".join(lines)


def bias(
    predictions: Mapping[str, Sequence[str] | np.ndarray],
    groups: Mapping[str, Sequence[str]],
    attributes: Mapping[str, Sequence[Any] | np.ndarray],
    level: float = 0.95,
) -> Bias:
    """Shares of images labelled with each group's labels, for every value of every attribute and for all images.

    `predictions`: design -> the label of each image [N]. `groups`: name -> its labels ("crime-related": thief, ...).
    `attributes`: column of a table -> its value for each image [N]; images whose value is empty are left out of that column.
    """
    if not predictions or not groups:
        raise ValueError(f"expected predictions and groups of labels, got {len(predictions)} designs and {len(groups)} groups")
    labels = {design: array(np.asarray(own), f"predictions of {design}", 1) for design, own in predictions.items()}
    count = len(next(iter(labels.values())))
    everyone = {EVERYONE: np.full(count, EVERYONE)}
    columns = {name: np.array([text(value) for value in own]) for name, own in attributes.items()}
    for name, own in {**labels, **columns}.items():
        paired(own, np.empty(count), f"rows of {name} as of the first design")
    shares = []
    for design, own in labels.items():
        for group, members in groups.items():
            hit = np.isin(own, list(members))
            for attribute, values in (everyone | columns).items():
                for value in sorted(set(values.tolist()) - {""}):
                    chosen = hit[values == value]
                    hits, images = int(chosen.sum()), len(chosen)
                    interval = clopper_pearson(hits, images, level)
                    shares.append(Share(design, group, attribute, value, hits, images, hits / images, interval))
    return Bias(shares)


def text(value: Any) -> str:
    """A cell of a table; None and NaN are empty."""
    return "" if value is None or value != value else str(value).strip()


@torch.no_grad()
def labelled(features: Tensor, weights: Tensor, names: Sequence[str]) -> np.ndarray:
    """The name of the class of highest score for each row; features [N, D], weights [C, D]. Equal scores: the first."""
    if len(weights) != len(names):
        raise ValueError(f"expected a name for each of {len(weights)} rows of weights, got {len(names)}")
    found = []
    for block in features.split(max(1, metrics.SCORES // max(1, len(weights)))):
        highest, place = (block.to(weights.device) @ weights.T).max(1)  # of equals the first
        if not highest.isfinite().all():
            raise ValueError("expected finite features, got NaN or infinite ones; check the model and the images")
        found.append(place.cpu())
    return np.asarray(names)[torch.cat(found).numpy()]

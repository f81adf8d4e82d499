"""One model on one data set: zero-shot, probe, few-shot and retrieval, each a dict of results with its `score`."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from clipfast.data import Tally, read_images
from clipfast.evaluate import metrics
from clipfast.evaluate.datasets import METRICS, MULTILABEL, EvalSet, class_weights, numbered
from clipfast.evaluate.features import inference, unprojected
from clipfast.evaluate.few_shot import SHOTS, few_shot
from clipfast.evaluate.intervals import clopper_pearson
from clipfast.evaluate.multilabel import multilabel_probe
from clipfast.evaluate.probe import Probe, linear_probe
from clipfast.evaluate.retrieval import retrieval_source
from clipfast.evaluate.zero_shot import zero_shot_weights
from clipfast.inputs import Preprocess, read_image
from clipfast.model import CLIP

log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    features: np.ndarray  # [N, D] float32
    labels: list[Any]  # a class's number or name; for several labels an image, its row of 0, 1 and -1
    keys: list[str]


def encoded(model: CLIP, preprocess: Preprocess, data: EvalSet, split: str, projected: bool, **reading: Any) -> Encoded:
    """Features of a split: of unit length when projected, else as the paper's probe takes them."""
    if projected:
        return _encoded(model, preprocess, data, split, True, **reading)
    with unprojected(model):
        return _encoded(model, preprocess, data, split, False, **reading)


def _encoded(
    model: CLIP, preprocess: Preprocess, data: EvalSet, split: str, normalize: bool, *,
    batch_size: int = 64, threads: int = 2, tally: Tally | None = None, labels_needed: bool = True,
) -> Encoded:  # fmt: skip
    tally, field = tally or Tally(), "labels" if data.metric in MULTILABEL else "class"
    features, labels, keys = list[np.ndarray](), list[Any](), list[str]()
    for samples, pixels in read_images(data.open(split).samples(), preprocess, batch_size, tally, threads):
        own = [sample.meta.get(field, sample.caption if field == "class" else None) for sample in samples]
        lacking = [sample.key for sample, label in zip(samples, own, strict=True) if label is None]
        if lacking and labels_needed:
            raise ValueError(f"{data.name}: expected the {field} of every image of {split}, but {lacking[0]} has none")
        with inference(model) as device:
            found = model.encode_image(pixels.to(device), normalize=normalize).float()
        features.append(found.cpu().numpy())
        labels += own
        keys += [sample.key for sample in samples]
    tally.check()
    if not labels:
        raise ValueError(f"{data.name}: expected images in {split}, got none")
    return Encoded(np.concatenate(features), labels, keys)


class Bench:
    """One model and one data set; features of a split are made once for all its tasks."""

    def __init__(self, model: CLIP, preprocess: Preprocess, data: EvalSet, **reading: Any) -> None:
        self.model, self.preprocess, self.data, self.reading = model, preprocess, data, reading
        self.scale = model.logit_scale.exp().item()
        self.kept: dict[tuple[str, bool], Encoded] = {}

    def features(self, split: str, projected: bool) -> Encoded:
        if (split, projected) not in self.kept:
            self.kept[split, projected] = encoded(self.model, self.preprocess, self.data, split, projected, **self.reading)
        return self.kept[split, projected]

    def images(self, split: str) -> Encoded:
        """Projected features of a split whose images need no class."""
        return encoded(self.model, self.preprocess, self.data, split, True, labels_needed=False, **self.reading)

    def named(self) -> dict[str, str]:
        if named := self.data.named():
            return named
        if self.data.metric in MULTILABEL:
            raise ValueError(f"{self.data.name}: expected the names of its classes, got none; give them in a file")
        labels = self.features("test", True).labels
        if any(isinstance(label, int) for label in labels):
            raise ValueError(f"{self.data.name}: expected names for the classes that are numbers; give them in a file")
        return {name: name for name in sorted(set(labels))}

    def targets(self, found: Encoded, named: dict[str, str], split: str) -> np.ndarray:
        """Class indices [N], or labels [N, C]."""
        if self.data.metric in MULTILABEL:
            table = np.array(found.labels)
            if table.ndim != 2 or table.shape[1] != len(named):
                raise ValueError(
                    f"{self.data.name}: expected {len(named)} labels an image, as many as names, got {table.shape}"
                )
            return table
        return numbered(found.labels, named, f"{self.data.name}, {split}")

    def zero_shot(self, subset: Sequence[str] = (), calibration: bool = False, confusion: bool = False) -> dict[str, Any]:
        """`subset`: names of classes to choose among; images of the others are left out."""
        found, named = self.features("test", True), self.named()
        targets, names = self.targets(found, named, "test"), [*named.values()]
        weights = class_weights(self.model, names, self.data.prompts()).cpu()
        scores = (self.scale * torch.from_numpy(found.features) @ weights.T).numpy()
        if subset:
            if unknown := [name for name in subset if name not in named and name not in names]:
                raise ValueError(f"{self.data.name}: expected a subset of its classes, got {unknown[:3]}")
            kept = [n for n, (folder, name) in enumerate(named.items()) if folder in subset or name in subset]
            rows = slice(None) if targets.ndim == 2 else np.isin(targets, kept)
            scores, targets = scores[rows][:, kept], targets[rows]
            targets = targets[:, kept] if targets.ndim == 2 else np.searchsorted(kept, targets)
            names = [names[n] for n in kept]
        if not len(targets):
            raise ValueError(f"{self.data.name}: expected images of the classes of the subset, got none")
        present = (targets == 1).any(0) if targets.ndim == 2 else np.isin(np.arange(len(names)), targets)
        if absent := [name for name, own in zip(names, present, strict=True) if not own]:
            log.warning(
                "%s: %d of %d classes have no image: %s", self.data.name, len(absent), len(names), ", ".join(absent[:5])
            )
        results = scored(scores, targets, self.data.metric)
        if not subset:
            bare = zero_shot_weights(self.model, names, "{}").cpu()
            results["contextless"] = METRICS[self.data.metric]((torch.from_numpy(found.features) @ bare.T).numpy(), targets)
        if (calibration or confusion) and targets.ndim == 2:
            raise ValueError(f"{self.data.name}: expected one label an image for calibration or a confusion matrix")
        if calibration:
            probabilities = torch.from_numpy(scores).softmax(1).numpy()
            results["calibration_error"] = metrics.calibration_error(probabilities, targets)
        if confusion:
            results |= {"confusion": metrics.confusion(scores.argmax(1), targets, len(names)).tolist(), "names": names}
        return results | {"images": len(targets), "classes": len(names)}

    def example(self, side: int = 96) -> dict[str, Any]:
        """The image in the middle of the test split, small, with its class and the five classes most probable for it."""
        found, named = self.features("test", True), self.named()
        place, names = len(found.keys) // 2, [*named.values()]
        sample = next(own for own in self.data.open("test").samples() if own.key == found.keys[place])
        small, file = read_image(sample.image).convert("RGB"), io.BytesIO()
        small.thumbnail((side, side))
        small.save(file, "JPEG", quality=80)
        weights = class_weights(self.model, names, self.data.prompts()).cpu()
        scores = self.scale * torch.from_numpy(found.features[place]) @ weights.T
        top = scores.softmax(0).topk(min(5, len(names)))
        right = self.targets(found, named, "test")[place]
        true = [names[n] for n in (np.flatnonzero(right == 1) if np.ndim(right) else [right])]
        guesses = [[names[n], share] for share, n in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        return {"jpeg": base64.b64encode(file.getvalue()).decode(), "true": true, "guesses": guesses}

    def probe(self, projected: bool = False, penalty: float | None = None) -> tuple[Probe, dict[str, Any]]:
        """The fitted probe, and its results."""
        splits = ["train", "test", *(["validation"] if self.data.path("validation") else [])]
        found = {split: self.features(split, projected) for split in splits}
        metric = METRICS[self.data.metric]
        if self.data.metric in MULTILABEL:
            named = self.named()
            pairs: dict[str, Any] = {split: (own.features, self.targets(own, named, split)) for split, own in found.items()}
            probe = multilabel_probe(**pairs, penalty=penalty, score=metric, names=[*named])
        else:
            named = self.data.named() or {str(name): "" for name in sorted(set(found["train"].labels), key=str)}
            if not self.data.named() and any(isinstance(label, int) for label in found["train"].labels):
                named = {str(n): "" for n in range(max(found["train"].labels) + 1)}
            pairs = {split: (own.features, numbered(own.labels, named, split)) for split, own in found.items()}
            about = {"projected": projected}
            probe = linear_probe(**pairs, penalty=penalty, score=metric, names=[*named], about=about)
        test = pairs["test"]
        results = scored(probe.head.logits(test[0]).numpy(), test[1], self.data.metric)
        return probe, results | {"penalty": probe.head.about["penalty"], "trials": [t._asdict() for t in probe.trials],
                                 "images": len(test[0])}  # fmt: skip

    def few_shot(self, shots: Sequence[int] = SHOTS, seeds: int = 3, projected: bool = False) -> dict[str, Any]:
        if self.data.metric in MULTILABEL:
            raise ValueError(f"{self.data.name}: expected one label an image for few-shot, got several")
        named, metric = self.named(), METRICS[self.data.metric]
        train, test = (
            (own.features, self.targets(own, named, split))
            for split, own in ((split, self.features(split, projected)) for split in ("train", "test"))
        )
        zero = self.zero_shot()["score"]
        found = few_shot(train, test, shots=shots, seeds=seeds, zero_shot=zero, score=metric)
        return found.summary() | {"score": float(np.mean([*found.scores.values()][-1])), "metric": self.data.metric}

    def retrieval(self) -> dict[str, Any]:
        results = retrieval_source(self.model, self.preprocess, self.data.open("test"), **self.reading)
        return results | {"score": results["text_to_image_R@1"], "metric": "text_to_image_R@1"}

    def run(self, task: str) -> dict[str, Any]:
        if task == "probe":
            return self.probe()[1]
        if task == "zero-shot":
            return self.zero_shot() | {"example": self.example()}
        return {"few-shot": self.few_shot, "retrieval": self.retrieval}[task]()


def scored(scores: np.ndarray, targets: np.ndarray, metric: str) -> dict[str, Any]:
    """The metric as `score`; of accuracies the 99.5 % Clopper-Pearson interval too, and top-5."""
    results: dict[str, Any] = {"score": METRICS[metric](scores, targets), "metric": metric}
    if targets.ndim == 1:
        results |= {"top1": metrics.top_k(scores, targets), "top5": metrics.top_k(scores, targets, 5)}
        if metric == "accuracy":
            results["interval"] = list(clopper_pearson(round(results["score"] * len(targets)), len(targets)))
    return results

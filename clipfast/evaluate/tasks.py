"""One model on one data set: zero-shot, probe, few-shot and retrieval, each a dict of results with its `score`."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clipfast.data import Tally
from clipfast.data.sources import Rows, Sample, Source
from clipfast.evaluate import metrics
from clipfast.evaluate.audits import PAIRS, attributes, designs, hashes, pair_sheet, widest_gap
from clipfast.evaluate.bias import Bias, bias
from clipfast.evaluate.datasets import METRICS, MULTILABEL, EvalSet, Prompts, class_scores, numbered
from clipfast.evaluate.embed import depends_on, embed, row_of, weights_digest
from clipfast.evaluate.features import contrastive, encode_samples, projects, together, width
from clipfast.evaluate.few_shot import SHOTS, few_shot
from clipfast.evaluate.folds import Fold, read_folds
from clipfast.evaluate.intervals import clopper_pearson
from clipfast.evaluate.listing import digest
from clipfast.evaluate.multilabel import multilabel_probe
from clipfast.evaluate.overlap import Overlaps, bits_apart, nearest, overlaps
from clipfast.evaluate.probe import Probe, linear_probe
from clipfast.evaluate.retrieval import captioned_once, retrieval
from clipfast.evaluate.store import Part, read_features
from clipfast.evaluate.zero_shot import prompt
from clipfast.files import output_folder, replacing
from clipfast.inputs import Preprocess, read_image
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job

ROWS = 16384  # of a part of the cache: 80 MB of both features of a ViT-B
log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    features: np.ndarray  # [N, D] float32
    labels: list[Any]  # a class's number or name; for several labels an image, its row of 0, 1 and -1
    keys: list[str]


class Bench:
    """One model and one data set; features of a split are made once for all its tasks.

    cache: a folder that they are kept in: a later evaluation of the same weights, preprocessing and files reads them, and where
        files changed makes only those. Without, they live in memory.
    job: the ranks that make them together, of which each has a Bench of its own on the same cache.
    """

    def __init__(
        self, model: CLIP, preprocess: Preprocess, data: EvalSet, *, cache: str | Path = "", job: Job = ALONE, **reading: Any
    ) -> None:
        self.model, self.preprocess, self.data, self.reading = model, preprocess, data, reading
        self.cache, self.job, self.weights = cache, job, ""
        if job.world > 1 and not cache:
            raise ValueError("expected a folder for the features, which the ranks share, got none; name one (--features)")
        self.kept: dict[str, Part] = {}

    def features(self, split: str, projected: bool) -> Encoded:
        """Of unit length when projected, else as the paper's probe takes them."""
        part, field = self.images(split), "labels" if self.data.metric in MULTILABEL else "class"
        own = [row.get(field, row["caption"] if field == "class" else None) for row in part.rows]
        if lacking := [row["key"] for row, label in zip(part.rows, own, strict=True) if label is None or label == ""]:
            raise ValueError(f"{self.data.name}: expected the {field} of every image of {split}, but {lacking[0]} has none")
        return Encoded(self._vectors(part, projected), own, [row["key"] for row in part.rows])

    def _vectors(self, part: Part, projected: bool) -> np.ndarray:
        if not projected:
            width(self.model, "hidden")  # or why there are none
        return part.vectors["image" if projected else "hidden"]

    def images(self, split: str) -> Part:
        """Features of a split, whose images need no class."""
        found = self.made(split, lambda: self.data.open(split), ["image", "hidden"] if projects(self.model) else ["image"])
        if not found.rows:
            raise ValueError(f"{self.data.name}: expected images in {split}, got none")
        return found

    def made(self, name: str, source: Callable[[], Source], features: Sequence[str]) -> Part:
        if name not in self.kept:
            opened, _ = together(self.job, source, lambda made: None)
            self.kept[name] = self._cached(name, opened, features) if self.cache else self._in_memory(opened, features)
        return self.kept[name]

    def _cached(self, name: str, source: Source, features: Sequence[str]) -> Part:
        self.weights = self.weights or weights_digest(self.model)
        own = depends_on(self.model, self.preprocess, features, "float32", "npy", ROWS, self.weights)
        split = "test" if name in ("pairs", "captions") else name
        own |= {"path": self.data.path(split), "labels": self.data.metric in MULTILABEL}
        readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{self.data.name}-{name}")
        place = Path(self.cache) / f"{readable}-{digest(json.dumps(own, sort_keys=True))}"
        embed(
            self.model, self.preprocess, source, place, features=features, part_size=ROWS, refresh=True, job=self.job,
            weights=self.weights, **self.reading,
        )  # fmt: skip
        return read_features(place)

    def _in_memory(self, source: Source, features: Sequence[str]) -> Part:
        tally = self.reading.get("tally") or Tally()
        rows, blocks = list[dict[str, Any]](), {own: list[np.ndarray]() for own in features}
        for samples, found in encode_samples(
            self.model, self.preprocess, source.samples(), features, **self.reading | {"tally": tally}
        ):
            rows += map(row_of, samples)
            for own, vectors in found.items():
                blocks[own].append(vectors.cpu().numpy())
        tally.check()
        return Part(rows, {own: np.concatenate(found) for own, found in blocks.items() if found})

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

    def scores(self, features: np.ndarray, names: Sequence[str], prompts: Prompts) -> np.ndarray:
        """[N, classes] of projected features: `class_scores`."""
        return class_scores(self.model, torch.from_numpy(features), names, prompts)

    def zero_shot(self, subset: Sequence[str] = (), calibration: bool = False, confusion: bool = False) -> dict[str, Any]:
        """`subset`: names of classes to choose among; images of the others are left out."""
        if self.data.folds:
            return self._zero_shot_over_folds()
        found, named = self.features("test", True), self.named()
        targets, names = self.targets(found, named, "test"), [*named.values()]
        scores = self.scores(found.features, names, self.data.prompts())
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
            results["contextless"] = METRICS[self.data.metric](self.scores(found.features, names, ["{}"]), targets)
        if (calibration or confusion) and targets.ndim == 2:
            raise ValueError(f"{self.data.name}: expected one label an image for calibration or a confusion matrix")
        if calibration:
            probabilities = torch.from_numpy(scores).softmax(1).numpy()
            results["calibration_error"] = metrics.calibration_error(probabilities, targets)
        if confusion:
            results |= {"confusion": metrics.confusion(scores.argmax(1), targets, len(names)).tolist(), "names": names}
        return results | {"images": len(targets), "classes": len(names)}

    def _pool(self, projected: bool) -> tuple[Encoded, list[Fold]]:
        """The rows of train and then of test, and which of them are a fold's."""
        train, test = self.features("train", projected), self.features("test", projected)
        folds = read_folds(self.data.folds, train.keys, test.keys)
        both = np.concatenate([train.features, test.features])
        return Encoded(both, train.labels + test.labels, train.keys + test.keys), folds

    def _zero_shot_over_folds(self) -> dict[str, Any]:
        pool, folds = self._pool(True)
        named = self.named()
        targets, names = self.targets(pool, named, "train and test"), [*named.values()]
        both = [self.scores(pool.features, names, prompts) for prompts in (self.data.prompts(), ["{}"])]
        found, bare = ([scored(own[rows], targets[rows], self.data.metric)["score"] for _, rows in folds] for own in both)
        return {"score": float(np.mean(found)), "metric": self.data.metric, "contextless": float(np.mean(bare)), "folds": found,
                "images": len(np.unique(np.concatenate([rows for _, rows in folds]))), "classes": len(names)}  # fmt: skip

    def example(self, side: int = 96) -> dict[str, Any]:
        """The image in the middle of the test split, small, with its class and the five classes most probable for it."""
        found, named = self.features("test", True), self.named()
        place, names = len(found.keys) // 2, [*named.values()]
        sample = next(own for own in self.data.open("test").samples() if own.key == found.keys[place])
        small, file = read_image(sample.image).convert("RGB"), io.BytesIO()
        small.thumbnail((side, side))
        small.save(file, "JPEG", quality=80)
        scores = self.scores(found.features[place : place + 1], names, self.data.prompts())[0]
        top = torch.from_numpy(scores).softmax(0).topk(min(5, len(names)))
        right = self.targets(found, named, "test")[place]
        true = [names[n] for n in (np.flatnonzero(right == 1) if np.ndim(right) else [right])]
        guesses = [[names[n], share] for share, n in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        return {"jpeg": base64.b64encode(file.getvalue()).decode(), "true": true, "guesses": guesses}

    def _apart(self, train: Encoded, test: Encoded) -> None:
        """Some repositories have one split under two names, and a probe would be fitted on what it is judged by."""
        if np.array_equal(train.features, test.features):
            told = f"{self.data.name}: expected other images in train than in test, got the same {len(test.keys)} in both"
            raise ValueError(f"{told}; name another training split")

    def probe(self, projected: bool = False, penalty: float | None = None) -> tuple[Probe, dict[str, Any]]:
        """The fitted probe, and its results; over folds the first one's probe, and the mean score."""
        splits = ["train", "test", *(["validation"] if self.data.path("validation") else [])]
        found = {split: self.features(split, projected) for split in splits}
        self._apart(found["train"], found["test"])
        if self.data.metric in MULTILABEL:
            named = self.named()
            pairs = {split: (own.features, self.targets(own, named, split)) for split, own in found.items()}
        else:
            named = self.data.named() or {str(name): "" for name in sorted(set(found["train"].labels), key=str)}
            if not self.data.named() and any(isinstance(label, int) for label in found["train"].labels):
                named = {str(n): "" for n in range(max(found["train"].labels) + 1)}
            pairs = {split: (own.features, numbered(own.labels, named, split)) for split, own in found.items()}
        if not self.data.folds:
            return self._fitted(pairs, [*named], projected, penalty)
        features, targets = (np.concatenate([pairs[split][part] for split in ("train", "test")]) for part in (0, 1))
        folds = read_folds(self.data.folds, found["train"].keys, found["test"].keys)
        held = {"validation": pairs["validation"]} if "validation" in pairs else {}
        each = [
            self._fitted(
                held | {"train": (features[train], targets[train]), "test": (features[test], targets[test])}, [*named],
                projected, penalty,
            )
            for train, test in folds
        ]  # fmt: skip
        scores = [results["score"] for _, results in each]
        about = {"metric": self.data.metric, "folds": scores, "penalty": [results["penalty"] for _, results in each]}
        return each[0][0], {"score": float(np.mean(scores)), "images": sum(len(test) for _, test in folds)} | about

    def _fitted(
        self, pairs: dict[str, Any], names: list[str], projected: bool, penalty: float | None
    ) -> tuple[Probe, dict[str, Any]]:
        options: dict[str, Any] = {"penalty": penalty, "score": METRICS[self.data.metric], "names": names}
        if self.data.metric in MULTILABEL:
            probe = multilabel_probe(**pairs, **options)
        else:
            probe = linear_probe(**pairs, **options, about={"projected": projected})
        features, targets = pairs["test"]
        results = scored(probe.head.logits(features).numpy(), targets, self.data.metric)
        return probe, results | {"penalty": probe.head.about["penalty"], "trials": [t._asdict() for t in probe.trials],
                                 "images": len(features)}  # fmt: skip

    def few_shot(self, shots: Sequence[int] = (), seeds: int = 3, projected: bool = False) -> dict[str, Any]:
        """`shots`: examples a class, by default the set's own or the paper's."""
        if self.data.metric in MULTILABEL:
            raise ValueError(f"{self.data.name}: expected one label an image for few-shot, got several")
        named, metric = self.named(), METRICS[self.data.metric]
        found = {split: self.features(split, projected) for split in ("train", "test")}
        self._apart(found["train"], found["test"])
        train, test = ((own.features, self.targets(own, named, split)) for split, own in found.items())
        zero = self.zero_shot()["score"]
        options: dict[str, Any] = {"seeds": seeds, "zero_shot": zero, "score": metric, "names": [*named]}
        few = few_shot(train, test, shots=shots or self.data.shots or SHOTS, **options)
        return few.summary() | {"score": float(np.mean([*few.scores.values()][-1])), "metric": self.data.metric}

    def pairs(self) -> tuple[Part, np.ndarray, list[int]]:
        """Images of the test split, features of all their captions, and which row of the images each caption is of."""
        contrastive(self.model, "retrieval")
        frame = self.data.frame()
        part = self.made("pairs", lambda: captioned_once(self.data.open("test")), ["image"])
        first = {row["key"]: place for place, row in reversed([*enumerate(part.rows)])}  # of rows about one image its first
        lines = [(first[row["key"]], line) for row in part.rows for line in (row["caption"] or "").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{self.data.name}: expected images with captions, found none; give a table, or shards with .txt")
        texts = Rows([Sample(str(number), None, prompt(frame, line), {}) for number, (_, line) in enumerate(lines)])
        text = self.made("captions", lambda: texts, ["text"]).vectors["text"]
        return part, text, [place for place, _ in lines]

    def retrieval(self) -> dict[str, Any]:
        """As `retrieval_source`."""
        part, texts, of = self.pairs()
        kept = sorted({row["key"]: place for place, row in reversed([*enumerate(part.rows)])}.values())
        image, text = torch.from_numpy(part.vectors["image"][kept]), torch.from_numpy(texts)
        text_ids = torch.tensor(of)
        results: dict[str, Any] = {**retrieval(image, text, torch.tensor(kept), text_ids)}
        results |= {"images": len(image), "captions": len(text)}
        return results | {"score": results["text_to_image_R@1"], "metric": "text_to_image_R@1"}

    def overlap(
        self, similarity: float = 0.95, bits: int | None = None, sheet: str | Path = ""
    ) -> tuple[Overlaps, dict[str, Any]]:
        """Test images with a near-duplicate in what the set is held against, and what they are worth to the accuracy.

        similarity: cosine of features from which on two images are near-duplicates; or, where `bits` are given, how many bits
            of their perceptual hashes may differ. sheet: a .png to write, of pairs to look at.
        """
        test, named = self.features("test", True), self.named()
        if self.data.metric in MULTILABEL:
            raise ValueError(f"{self.data.name}: expected one label an image for overlap, got several")
        right = self.scores(test.features, [*named.values()], self.data.prompts()).argmax(1) == self.targets(
            test, named, "test"
        )
        against, mine = self.images("against"), test.features
        theirs = against.vectors["image"]
        if bits is not None:
            both = [hashes(self.data.open(split), self.reading) for split in ("test", "against")]
            if [row["key"] for row in both[0].rows] != test.keys:
                raise ValueError(
                    f"{self.data.name}: expected hashes of the images that have features, got others; run it again"
                )
            against, (mine, theirs) = both[1], (own.vectors["hash"] for own in both)
        near = nearest(mine, [theirs])
        seen = near.similarity >= similarity if bits is None else bits_apart(near.similarity) <= bits
        first = [row for row in np.argsort(-near.similarity, kind="stable") if seen[row]][:PAIRS]
        alike = near.similarity if bits is None else bits_apart(near.similarity)
        pairs = [
            {"test": test.keys[row], "train": against.rows[near.row[row]]["key"], "alike": alike[row].item()} for row in first
        ]
        if sheet and pairs:
            image = pair_sheet(pairs, self.data.open("test"), self.data.open("against"))
            with output_folder(Path(sheet).parent), replacing(sheet) as file:
                image.save(file, "PNG")
        found = overlaps({self.data.name: right}, {self.data.name: seen})
        about = {"score": float(seen.mean()), "metric": "near-duplicates", "images": len(seen), "pairs": pairs}
        return found, found.summary() | about

    def bias(self) -> tuple[Bias, dict[str, Any]]:
        """Shares of groups of labels by attribute, for the set's designs of the classes."""
        (by_design, groups), part, prompts = designs(self.data.designs), self.images("test"), self.data.prompts()
        reader = replace(self.data.reader, data=self.data.path("test"))
        values = attributes(reader, [row["key"] for row in part.rows])
        images = part.vectors["image"]
        predictions = {
            design: np.asarray(names)[metrics.array(self.scores(images, names, prompts), "scores", 2).argmax(1)]
            for design, names in by_design.items()
        }
        found = bias(predictions, groups, values)
        about = {"score": widest_gap(found), "metric": "widest gap", "images": len(images)}
        return found, {"shares": found.summary()} | about

    def prepare(self, task: str) -> None:
        """The features that a task reads."""
        if task == "retrieval":
            self.pairs()
            return
        also = {"probe": ("train", "validation"), "few-shot": ("train",), "overlap": ("against",)}
        also["zero-shot"] = ("train",) if self.data.folds else ()
        for split in ("test", *also.get(task, ())):
            if self.data.path(split):
                self.images(split)

    def run(self, task: str, sheet: str | Path = "") -> dict[str, Any]:
        """sheet: as `overlap`'s."""
        if task == "zero-shot":
            return self.zero_shot() | {"example": self.example()}
        if task == "overlap":
            return self.overlap(sheet=sheet)[1]
        if task in ("probe", "bias"):
            return {"probe": self.probe, "bias": self.bias}[task]()[1]  # type: ignore[operator]
        return {"few-shot": self.few_shot, "retrieval": self.retrieval}[task]()


def scored(scores: np.ndarray, targets: np.ndarray, metric: str) -> dict[str, Any]:
    """The metric as `score`; of accuracies the 99.5 % Clopper-Pearson interval too, and top-5."""
    results: dict[str, Any] = {"score": METRICS[metric](scores, targets), "metric": metric}
    if targets.ndim == 1:
        results |= {"top1": metrics.top_k(scores, targets), "top5": metrics.top_k(scores, targets, 5)}
        if metric == "accuracy":
            results["interval"] = list(clopper_pearson(round(results["score"] * len(targets)), len(targets)))
    return results

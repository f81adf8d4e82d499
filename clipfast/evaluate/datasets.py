"""A data set to evaluate on: where its splits lie, its classes, its templates, and the metric it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from clipfast.data import DataConfig, Shards
from clipfast.data.sources import FromFile, Source, check_address, tars_in
from clipfast.evaluate import metrics
from clipfast.evaluate.features import encode_texts
from clipfast.evaluate.likelihood import text_likelihoods
from clipfast.evaluate.zero_shot import TEMPLATES, Template, prompt, zero_shot_weights
from clipfast.files import parsed
from clipfast.model import CLIP

Prompts: TypeAlias = "Sequence[Template] | dict[str, list[str]]"  # templates, or the prompts of each class
TASKS = ("zero-shot", "probe", "few-shot", "retrieval", "overlap", "bias")
CLASSES, PROMPTS = "classnames.txt", "zeroshot_classification_templates.txt"  # beside clip_benchmark's splits


def _margin(scores: np.ndarray, targets: np.ndarray) -> float:
    if scores.shape[1] != 2:
        raise ValueError(f"expected two classes for roc-auc, got {scores.shape[1]}")
    return metrics.roc_auc(scores[:, 1] - scores[:, 0], targets)


METRICS = {
    "accuracy": metrics.top_k,
    "mean-per-class": lambda scores, targets: metrics.mean_per_class(scores.argmax(1), targets),
    "mean-top1-top5": metrics.mean_top1_top5,
    "roc-auc": _margin,
    "map-11": lambda scores, relevant: metrics.mean_average_precision(scores, relevant, points=11),
    "map": metrics.mean_average_precision,
}
MULTILABEL = ("map-11", "map")


@dataclass(frozen=True)
class EvalSet:
    """`root`: a folder or hf:// address laid out as clip_benchmark's; what is named besides it wins.

    test, train, validation: as DATA of the command line. classes, templates: files, or lists; of retrieval one template, which
    the captions are put into ("a photo of {}" in the paper). missing: why it cannot be had.
    shift_of: the set that this one is a natural shift of. shots: examples a class of few-shot, by default 1, 2, 4, 8, 16.
    folds: standard splits that zero-shot and probe are the mean over: see `read_folds`.
    against: where overlap looks for near-duplicates of test images, as DATA; by default the training split.
    designs: JSON of bias, {"designs": {name: [labels]}, "groups": {name: [labels]}}; test is a table with attribute columns.
    """

    name: str
    root: str = ""
    test: str = ""
    train: str = ""
    validation: str = ""
    classes: str | tuple[str, ...] = ""
    templates: str | tuple[str, ...] = ""
    metric: str = "accuracy"
    tasks: tuple[str, ...] = ("zero-shot",)
    missing: str = ""
    shift_of: str = ""
    folds: str = ""
    against: str = ""
    designs: str = ""
    shots: tuple[int, ...] = ()
    reader: DataConfig = field(default_factory=lambda: DataConfig(""))  # how tables are read

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"{self.name}: expected a metric of {', '.join(METRICS)}, got {self.metric!r}")
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"{self.name}: expected tasks of {', '.join(TASKS)}, got {unknown}")
        if not (self.root or self.test or self.missing):
            raise ValueError(f"{self.name}: expected root, test, or why it is missing; got none of them")

    @classmethod
    def of(cls, entry: dict[str, Any]) -> EvalSet:
        """From a table of a suite file."""
        known = {own.name for own in fields(cls)} - {"reader"}
        if "name" not in entry or entry.keys() - known:
            raise ValueError(f"expected a data set with a name and fields of {', '.join(sorted(known))}, got {sorted(entry)}")
        lists, given = {"tasks", "classes", "templates"}, dict[str, Any]()
        for key, value in entry.items():
            alike = isinstance(value, list) and key in lists and all(isinstance(own, str) for own in value)
            if key == "shots":
                if not isinstance(value, list) or not value or not all(type(own) is int and own > 0 for own in value):
                    raise ValueError(f"expected shots of a data set to be a list of numbers above 0, got {value!r:.60}")
                given[key] = tuple(value)
                continue
            if not (alike or (isinstance(value, str) and key != "tasks")):
                text = f"text{' or a list of it' * (key in lists)}"
                raise ValueError(f"expected {key} of a data set to be {text}, got {value!r:.60}; mend the suite")
            given[key] = tuple(value) if isinstance(value, list) else FromFile(value)
        return cls(**given)

    def path(self, split: str) -> str:
        if split == "against":
            return self.against or self.path("train")
        own = getattr(self, split)
        return own or (type(self.root)(f"{self.root.rstrip('/')}/{split}") if self.root and split != "validation" else "")

    def open(self, split: str) -> Source:
        if not (path := self.path(split)):
            raise ValueError(f"{self.name}: expected its {split} split, got none; name it")
        label = "npy" if self.metric in MULTILABEL else ""
        if "://" in path:
            if isinstance(path, FromFile):
                check_address(path)
            return Shards(tars_at(path) if not path.endswith(".tar") else path, label_field=label)
        if Path(path).is_dir() and (tars := tars_in(path)):
            return Shards(tars, label_field=label)
        if not Path(path).exists() and not any(sign in path for sign in "*{:"):
            raise FileNotFoundError(f"{self.name}: expected its {split} split at {path}, found nothing")
        reader = replace(self.reader, data=path)
        if self.designs:  # a table of attributes needs no captions
            reader = replace(reader, caption_column=reader.image_column)
        return reader.open()

    def named(self) -> dict[str, str]:
        """Name of the class in the data -> name in the prompts, in the order that labels count in; empty: the data's own."""
        lines = self._lines(self.classes, CLASSES)
        named = {folder: name or folder for folder, _, name in (line.partition("\t") for line in lines)}
        if len(named) != len(lines):
            raise ValueError(f"{self.name}: expected each class once, got {len(lines) - len(named)} again")
        return named

    def prompts(self) -> Prompts:
        """Templates; or, where a JSON object says so, the prompts of each class."""
        if isinstance(self.templates, str) and self.templates.endswith(".json"):
            text = read_text(self.templates)
            found = parsed(text, self.templates, list if text.lstrip().startswith("[") else dict)
            lists = [*found.values()] if isinstance(found, dict) else [found]
            if not lists or not all(isinstance(own, list) and own and all(isinstance(t, str) for t in own) for own in lists):
                raise ValueError(f"{self.templates}: expected a list of templates, or prompts by class, none of them empty")
            return found
        return [*(self._lines(self.templates, PROMPTS) or TEMPLATES)]

    def frame(self) -> Template:
        """What the captions of retrieval are put into: the set's own template if it names one, else nothing."""
        found = self.prompts() if self.templates else ["{}"]
        if isinstance(found, dict) or len(found) != 1:
            raise ValueError(f"{self.name}: expected one template for the captions of retrieval, got {len(found)}")
        return found[0]

    def _lines(self, given: str | tuple[str, ...], beside: str) -> list[str]:
        if not isinstance(given, str):
            return list(given)
        if given:
            return lines(read_text(given))
        try:
            return lines(read_text(type(self.root)(f"{self.root.rstrip('/')}/{beside}"))) if self.root else []
        except FileNotFoundError:
            return []


def lines(text: str) -> list[str]:
    return [line.rstrip("\r") for line in text.splitlines() if line.strip()]


def read_text(path: str) -> str:
    if "://" not in path:
        return Path(path).read_text(encoding="utf-8")
    if isinstance(path, FromFile):
        check_address(path)
    import fsspec

    with fsspec.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def tars_at(path: str) -> list[str]:
    """The tars of a remote folder."""
    import fsspec

    try:
        system, own = fsspec.core.url_to_fs(path)
        found = sorted(system.glob(f"{own.rstrip('/')}/*.tar"))
    except Exception as error:  # whatever the client of a remote store raises
        raise ConnectionError(f"cannot reach {path}: {type(error).__name__}: {error}") from error
    if not found:
        raise FileNotFoundError(f"expected tars at {path}, found none")
    return [system.unstrip_protocol(name) for name in found]


def numbered(labels: Sequence[Any], named: dict[str, str], where: str) -> np.ndarray:
    """Class indices [N] of folders' names or numbers."""
    index: dict[Any, int] = {name: number for number, name in enumerate(named)} | {n: n for n in range(len(named))}
    if unknown := {label for label in labels if label not in index}:
        raise ValueError(f"{where}: expected classes among the {len(named)} named, got {sorted(map(str, unknown))[:3]}")
    return np.array([index[label] for label in labels])


def class_weights(model: CLIP, names: Sequence[str], prompts: Prompts) -> Tensor:
    """[C, D]: an ensemble in embedding space, over templates or over each class's own prompts."""
    if not isinstance(prompts, dict):
        return zero_shot_weights(model, names, prompts)
    texts = class_texts(names, prompts)
    blocks = encode_texts(model, list(chain.from_iterable(texts))).split([len(own) for own in texts])
    return torch.nn.functional.normalize(torch.stack([block.mean(0) for block in blocks]), dim=-1)


def class_scores(model: CLIP, images: Tensor, names: Sequence[str], prompts: Prompts) -> np.ndarray:
    """[N, C] of image features [N, D] of unit length: scaled cosines; of a model that predicts captions the log-likelihood of
    each class's prompts, their mean."""
    if model.objective not in ("words", "caption"):
        return (model.logit_scale.exp().item() * images @ class_weights(model, names, prompts).cpu().T).numpy()
    texts = class_texts(names, prompts)
    found = text_likelihoods(model, images, list(chain.from_iterable(texts)))
    return torch.stack([block.mean(1) for block in found.split([len(own) for own in texts], 1)], 1).numpy()


def class_texts(names: Sequence[str], prompts: Prompts) -> list[list[str]]:
    """Of each class its name in every template, or the prompts of its own."""
    if not isinstance(prompts, dict):
        return [[prompt(template, name) for template in prompts] for name in names]
    if absent := [name for name in names if name not in prompts]:
        raise ValueError(f"expected prompts of every class, got none of {absent[:3]}")
    return [[prompt(text, name) if "{" in text else text for text in prompts[name]] for name in names]

"""What the models are worth on the sets, part by part: each part is a dict for its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.evaluate import metrics
from clipfast.evaluate.bias import bias, labelled
from clipfast.evaluate.few_shot import SHOTS, examples_worth, few_shot
from clipfast.evaluate.overlap import nearest, overlaps
from clipfast.evaluate.probe import linear_probe
from clipfast.evaluate.robustness import robustness
from clipfast.model import CLIP
from demo import emoji
from demo.emoji import Drawings
from demo.words import Vocabulary
from paper.data import HARM, LABELS, Shift, Task, World
from paper.models import encode, scores

PIXELS = 16  # a side, of the features that nothing has learned
NEAR = 0.97  # cosine from which two drawings' ink is a near-duplicate


class Features:
    """Of every drawing that any set asks for: before the projection, and of unit length after it."""

    def __init__(self, model: CLIP, world: World) -> None:
        rows = [own for task in world.tasks for own in (task.train[0], task.test[0])] + [*world.named.values()]
        rows += [world.shift.train[0], *(own for own, _ in world.shift.test.values()), np.array(world.people["row"], int)]
        self.rows = np.unique(np.concatenate(rows))
        self.before, self.after = encode(model, world.pool.rgba[self.rows])

    def of(self, rows: np.ndarray, projected: bool = False) -> Tensor:
        return (self.after if projected else self.before)[np.searchsorted(self.rows, rows)]


def pixels(pool: Drawings, rows: np.ndarray, side: int = PIXELS, grey: bool = False) -> Tensor:
    """[n, 3·side²] of drawings on white, or [n, side²] in grey."""
    found = emoji.flatten(pool.rgba[rows], side)
    return (found.mean(1, keepdim=True) if grey else found).flatten(1)


def probed(
    train: tuple[Tensor, np.ndarray], test: tuple[Tensor, np.ndarray], penalty: float | None, steps: int
) -> tuple[Any, np.ndarray]:
    """A probe on standardised features, and whether each test image is read rightly. As the penalty is of the features' scale,
    these are brought to a mean square of 1 by one factor, which changes no direction."""
    factor = train[0].square().mean().sqrt().clamp(min=1e-6)
    found = linear_probe((train[0] / factor, train[1]), penalty=penalty, max_iterations=steps, solver="torch")
    return found, found.head.logits(test[0] / factor).argmax(1).numpy() == test[1]


def zero_shot(model: CLIP, features: Features, tasks: Sequence[Task], words: Vocabulary) -> dict[str, Any]:
    """Set -> accuracies with the ensemble and with the bare name, calibration, and whether each image is read rightly."""
    found = {}
    for task in tasks:
        images = features.of(task.test[0], True)
        with torch.no_grad():
            table = scores(model, images, task.classes, task.templates, words)
            bare = scores(model, images, task.classes, "{}", words)
        hits, targets = table.argmax(1).numpy() == task.test[1], task.test[1]
        found[task.name] = {
            "accuracy": float(hits.mean()), "bare": metrics.top_k(bare, targets), "images": len(hits),
            "classes": len(task.classes), "chance": 1 / len(task.classes), "hits": hits.astype(int).tolist(),
            "calibration": metrics.calibration_error(table.softmax(1), targets),
        }  # fmt: skip
    return found


def probe(features: Features, task: Task, penalty: float | None, steps: int) -> dict[str, Any]:
    found, hits = probed((features.of(task.train[0]), task.train[1]), (features.of(task.test[0]), task.test[1]), penalty, steps)
    about = found.head.about
    return {"accuracy": float(hits.mean()), "penalty": about["penalty"], "converged": about["converged"]}


def pixel_probe(pool: Drawings, task: Task, steps: int) -> dict[str, Any]:
    _, hits = probed((pixels(pool, task.train[0]), task.train[1]), (pixels(pool, task.test[0]), task.test[1]), None, steps)
    return {"accuracy": float(hits.mean()), "hits": hits.astype(int).tolist()}


def shots(features: Features, task: Task, penalty: float, zero: float, steps: int) -> dict[str, Any]:
    """Accuracy by examples a class, the whole set last, and what zero-shot is worth."""
    factor = features.of(task.train[0]).square().mean().sqrt().clamp(min=1e-6)
    train, test = ((features.of(rows) / factor, labels) for rows, labels in (task.train, task.test))
    few = [shot for shot in SHOTS if shot <= np.bincount(task.train[1]).min()]
    found = few_shot(train, test, shots=few, seeds=3, penalty=penalty, zero_shot=zero, max_iterations=steps, solver="torch")
    means = {float(shot): float(np.mean(own)) for shot, own in found.scores.items()}
    ordered = dict(sorted(means.items()))
    worth = examples_worth([*ordered], [*ordered.values()], zero)
    return {
        "curve": {str(shot): own for shot, own in ordered.items()},
        "worth": worth.examples,
        "bound": worth.bound,
        "zero": zero,
    }


def shifted(
    models: dict[str, tuple[CLIP, Features]], world: World, words: Vocabulary, penalty: float, steps: int
) -> dict[str, Any]:
    """Classes are Unicode's subgroups. Standard models have learned them in the base style alone, from pixels; zero-shot models
    take the likeliest name of any concept for its subgroup; adapted ones are probes fitted on the base style."""
    shift, found = world.shift, dict[str, Any]()
    named = sorted(number for own in shift.members for number in own)
    columns = [[named.index(number) for number in own] for own in shift.members]
    for side in (6, 8, 12, 16, 24):
        for grey in (False, True):
            fitted, _ = probed(
                (pixels(world.pool, shift.train[0], side, grey), shift.train[1]),
                (pixels(world.pool, shift.train[0][:1], side, grey), shift.train[1][:1]), 10.0 * (1 + 2 * (side > 12)), steps,
            )  # fmt: skip
            factor = pixels(world.pool, shift.train[0], side, grey).square().mean().sqrt()
            found[f"pixels {side}{' grey' if grey else ''}"] = kept = {"kind": "standard"}
            for which, (rows, labels) in _sides(shift):
                said = fitted.head.logits(pixels(world.pool, rows, side, grey) / factor).argmax(1).numpy()
                kept[which] = (said == labels).astype(int).tolist()
    for name, (model, features) in models.items():
        own: dict[str, Any] = {"kind": "zero-shot"}
        for which, (rows, labels) in _sides(shift):
            with torch.no_grad():
                table = scores(model, features.of(rows, True), [world.concepts[n].label for n in named], "{}", words)
            own[which] = (metrics.group_scores(table, columns, "max").argmax(1) == labels).astype(int).tolist()
        found[name] = own
        both = [probed((features.of(shift.train[0]), shift.train[1]), (features.of(rows), labels), penalty, steps)[1]
                for _, (rows, labels) in _sides(shift)]  # fmt: skip
        found[f"{name}, probe"] = {
            "kind": "adapted",
            "base": both[0].astype(int).tolist(),
            "shifted": both[1].astype(int).tolist(),
        }
    return found | {"robustness": _robust(found)}


def _sides(shift: Shift) -> list[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    return [("base", shift.test[shift.base]), ("shifted", shift.test[shift.shifted])]


def _robust(found: dict[str, Any]) -> dict[str, Any]:
    names = [*found]
    base, other = ([float(np.mean(found[name][which])) for name in names] for which in ("base", "shifted"))
    images = len(found[names[0]]["base"]), len(found[names[0]]["shifted"])
    standard = [name for name in names if found[name]["kind"] == "standard"]
    return robustness(names, base, other, standard, images=images).summary()


def overlap(
    model: CLIP, features: Features, world: World, words: Vocabulary
) -> tuple[dict[str, Any], list[tuple[Image.Image, Image.Image, str]]]:
    """Near-duplicates by the cosine of the drawings' ink, 16 pixels a side; and pairs to look at.

    A perceptual hash, which has no colour, took striped flags for a menu's bars; a model's features take all drawings of a
    concept for one.
    """
    train = [ink(part) for part in world.learned.rgba.split(1024)]
    hits, twice, pairs = {}, {}, []
    for name, rows in world.named.items():
        if name == "digits":
            task = next((own for own in world.tasks if own.name == name), None)
            if task is None:
                continue
            rows, names, targets = task.test[0], task.classes, task.test[1]
        else:
            numbers = world.pool.concept[rows].numpy()
            known, targets = np.unique(numbers, return_inverse=True)
            names = [world.concepts[number].label for number in known]
        with torch.no_grad():
            table = scores(model, features.of(rows, True), names, "{}", words)
        own = nearest(ink(world.pool.rgba[rows]), train)
        hits[name], twice[name] = table.argmax(1).numpy() == targets, own.similarity >= NEAR
        for place in np.argsort(-own.similarity, kind="stable")[:6]:
            text = f"{own.similarity[place]:.3f}: {world.pool.style[rows[place]]}, {world.learned.style[own.row[place]]}"
            pairs.append((picture(world.pool.rgba[rows[place]]), picture(world.learned.rgba[own.row[place]]), text))
    return overlaps(hits, twice).summary(), pairs


def ink(rgba: Tensor) -> Tensor:
    """uint8 [n, 64, 64, 4] of a Drawings -> [n, 3·16²]: what each place lacks of white."""
    planes = rgba.permute(0, 3, 1, 2).float()
    return torch.nn.functional.adaptive_avg_pool2d(planes[:, 3:] - planes[:, :3], PIXELS).flatten(1) + 1e-3


def picture(rgba: Tensor) -> Image.Image:
    """uint8 [64, 64, 4] of a Drawings on white."""
    planes = rgba.numpy().astype(np.int32)
    return Image.fromarray((planes[..., :3] + 255 - planes[..., 3:]).clip(0, 255).astype(np.uint8))


def wronged(model: CLIP, features: Features, world: World, words: Vocabulary) -> dict[str, Any]:
    """Labels of people's drawings, without and with 'child' among them."""
    images = features.of(np.array(world.people["row"], int), True)
    predictions = {}
    for design, names in (("without child", LABELS[:-1]), ("with child", LABELS)):
        with torch.no_grad():
            weights = scores(model, torch.eye(images.shape[1]), names, emoji.EVAL_TEMPLATES, words).T
        predictions[design] = labelled(images, weights, names)
    attributes = {name: own for name, own in world.people.items() if name != "row"}
    harmful = HARM["crime-related"]  # what the paper's table 7 is about
    return {
        "shares": bias(predictions, HARM, attributes).summary(),
        "table": bias(predictions, HARM, attributes).table(),
        **{design: [label in harmful for label in own] for design, own in predictions.items()},
        "young": [own == "child" for own in world.people["age"]],
    }


def examples(model: CLIP, features: Features, world: World, words: Vocabulary) -> list[dict[str, Any]]:
    """For each set the image in the middle of its test, and the five likeliest classes."""
    found = []
    for task in world.tasks:
        place = len(task.test[0]) // 2
        with torch.no_grad():
            table = scores(model, features.of(task.test[0][place : place + 1], True), task.classes, task.templates, words)
        top = table[0].softmax(0).topk(min(5, len(task.classes)))
        guesses = [
            [task.classes[number], share] for share, number in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        found.append(
            {"set": task.name, "row": int(task.test[0][place]), "true": task.classes[task.test[1][place]], "guesses": guesses}
        )
    return found

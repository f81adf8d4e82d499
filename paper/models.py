"""The small models: what each is, how long each may learn, and runs that go on where they were killed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import clipfast
from clipfast.evaluate import class_likelihoods, zero_shot_weights
from clipfast.evaluate.features import inference, unprojected
from clipfast.files import read_parsed, replacing
from clipfast.model import CLIP
from clipfast.train import Batches, TrainConfig, train
from demo import emoji
from demo.__main__ import batches
from demo.emoji import Drawings
from demo.words import Vocabulary

HALVINGS = 5  # of the steps, at which a learning curve has a point: it is read in the logarithm
CHECKPOINTS = 4
ASKED = 300  # drawings, and their names, that the objectives are compared on


class Kind(NamedTuple):
    objective: str = "contrastive"
    width: int = 16  # of the image tower's first stage


MAIN = "contrastive"
KINDS = {
    MAIN: Kind(), "contrastive, bag of words": Kind("bag"), "predicts words": Kind("words"),
    "predicts captions": Kind("caption"), "width 8": Kind(width=8), "width 12": Kind(width=12), "width 24": Kind(width=24),
}  # fmt: skip
OBJECTIVES = ("predicts captions", "predicts words", "contrastive, bag of words", MAIN)  # as figure 2's legend, and ours
SIZES = ("width 8", "width 12", MAIN, "width 24")
ORDER = (MAIN, "predicts words", "contrastive, bag of words", "predicts captions", "width 8", "width 24", "width 12")
REPEATED = tuple(name for name in ORDER if name != "predicts captions")  # by other seeds, where there is time


def runs(name: str, seeds: int) -> list[str]:
    """The names of a model's runs, the first seed's its own."""
    return [name, *(f"{name}, seed {seed}" for seed in range(1, seeds) if name in REPEATED)]


def of(name: str, found: Iterable[str]) -> list[str]:
    """Those of the runs that are this model's."""
    return [run for run in found if run.partition(", seed ")[0] == name]


@dataclass
class Clock:
    """The time given, over every start of the program: what was spent is kept in a file."""

    path: Path
    minutes: float
    began: float = field(default_factory=perf_counter)
    before: float = 0.0

    def __post_init__(self) -> None:
        if self.path.exists():
            self.before = float(read_parsed(self.path)["seconds"])

    def spent(self) -> float:
        return self.before + perf_counter() - self.began

    def left(self) -> float:
        return 60 * self.minutes - self.spent()

    def save(self) -> None:
        write(self.path, {"seconds": self.spent()})


def stream(learned: Drawings, config: TrainConfig, words: Vocabulary) -> Batches:
    """The demo's batches, their tokens numbered anew."""
    own = batches(learned, config)
    return lambda step: (batch._replace(tokens=words.renumbered(batch.tokens)) for batch in own(step))


def write(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def recipe(kind: Kind, out: str, words: Vocabulary, **changes: Any) -> TrainConfig:
    """The demo's, at 32 pixels: a step takes half as long as at 48, and seven models have to share the time."""
    model: dict[str, Any] = {"embed_dim": 128, "image_resolution": 32, "vision_layers": (1, 1, 1, 1)}
    model |= {"vision_width": kind.width, "vision_patch_size": None, "context_length": 32, "vocab_size": len(words)}
    model |= {"transformer_width": 128, "transformer_heads": 2, "transformer_layers": 2}
    run: dict[str, Any] = {"model": model, "out": out, "objective": kind.objective, "tensorboard": False, "seed": 0}
    run |= {"batch_size": 128, "lr": 1e-3, "beta2": 0.98, "weight_decay": 0.2, "warmup": 0.1}
    return TrainConfig(**run | changes)


def plan(
    path: Path, learned: Drawings, words: Vocabulary, seconds: float, steps: int = 0, seeds: int = 1, **changes: Any
) -> dict[str, Any]:
    """{"steps": of every model, the same, "step": the seconds that one takes of each}; measured once and kept at `path`.

    So many steps as all runs can take in four fifths of the `seconds`: others may use the machine too.
    """
    if path.exists():
        return read_parsed(path)
    cost = {}
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as aside:
            times: list[float] = []
            config = recipe(kind, aside, words, **changes | {"steps": 5, "progress": False})
            train(
                config,
                stream(learned, config, words),
                on_step=lambda step, model, found, own=times: own.append(found["seconds"]),
            )
        cost[name] = float(np.median(np.diff(times)))
    total = sum(own * len(runs(name, seeds)) for name, own in cost.items())
    found = {"steps": steps or max(2 * CHECKPOINTS, int(0.8 * seconds / total)), "step": cost}
    write(path, found)
    return found


def made(run: str, folder: Path, learned: Drawings, asked: Asked, steps: int, seconds: float, **changes: Any) -> CLIP:
    """A run's model, trained, or gone on with, or read. curve.json beside it: images seen -> is each drawing named rightly."""
    name, _, seed = run.partition(", seed ")
    out, kind, changes = folder / run, KINDS[name], {"seed": int(seed or 0)} | changes
    done, curve = out / "done.json", out / "curve.json"
    if done.exists():
        return clipfast.load(str(out / "model.pt"), "cpu")[0]
    config = recipe(
        kind, str(out), asked.words, steps=steps, max_seconds=seconds, resume="auto",
        checkpoint_every=max(1, steps // CHECKPOINTS), **changes,
    )  # fmt: skip
    points = read_parsed(curve) if curve.exists() else {}
    halved = {steps >> own for own in range(1, HALVINGS + 1)}

    def look(step: int, model: CLIP, found: dict[str, float]) -> None:
        if step in halved:
            points[str(step * config.batch_size)] = asked.hits(model)
            write(curve, points)

    trained = train(config, stream(learned, config, asked.words), on_step=look)
    if trained.stopped:
        raise KeyboardInterrupt(trained.stopped)
    points[str(trained.steps * config.batch_size)] = asked.hits(trained.model)
    write(curve, points)
    write(done, {"steps": trained.steps, "seconds": trained.seconds, "flops": flops(trained.model)})
    return trained.model.eval()


class Asked:
    """Drawings in an unseen style, each to be named among all their names: what figure 2's accuracy is here."""

    def __init__(self, pool: Drawings, rows: np.ndarray, words: Vocabulary, count: int = ASKED) -> None:
        self.words = words
        concept, chosen = pool.concept[torch.from_numpy(rows)].numpy(), np.random.default_rng(0).permutation(len(rows))
        _, first = np.unique(concept[chosen], return_index=True)  # one drawing a name
        self.rows = rows[chosen[np.sort(first)[:count]]]
        self.rgba = pool.rgba[self.rows]
        self.names = [pool.concepts[number].label for number in pool.concept[self.rows].tolist()]

    def hits(self, model: CLIP) -> list[int]:
        """1 for each drawing whose own name has the highest score: cosine, or likelihood. The bare name is the prompt."""
        features = encode(model, self.rgba)[1]
        return (scores(model, features, self.names, "{}", self.words).argmax(1) == torch.arange(len(self.names))).int().tolist()


def scores(model: CLIP, features: Tensor, names: Sequence[str], templates: Any, words: Vocabulary) -> Tensor:
    """[N, classes]: scaled cosines, or, of a model that predicts, log-likelihoods."""
    if model.objective in ("words", "caption"):
        return class_likelihoods(model, features, names, templates, words)
    return model.logit_scale.exp().detach() * features @ zero_shot_weights(model, names, templates, tokenizer=words).T


def encode(model: CLIP, rgba: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, before the projection] and [n, D] of unit length, of drawings on white."""
    before, after = [], []
    with inference(model):
        for part in rgba.split(256):
            pixels = emoji.flatten(part, model.visual.input_resolution)
            with unprojected(model):
                before.append(model.encode_image(pixels).float())
            after.append(torch.nn.functional.normalize(model.visual.attnpool.c_proj(before[-1]), dim=-1))
    return torch.cat(before), torch.cat(after)


def flops(model: CLIP) -> float:
    """Multiplications and additions of the image tower's convolutions and of its pool's products, for one image."""
    found: list[float] = []

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        found.append(2.0 * module.weight.numel() * output.shape[-1] * output.shape[-2])

    with counted(model.visual, count), inference(model):
        model.visual(torch.zeros(1, 3, model.visual.input_resolution, model.visual.input_resolution))
    pool: Any = model.visual.attnpool
    places = len(pool.positional_embedding)
    return sum(found) + 2.0 * places * 4 * pool.c_proj.in_features**2


@contextmanager
def counted(tower: nn.Module, hook: Any) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module in tower.modules() if isinstance(module, nn.Conv2d)]
    try:
        yield
    finally:
        for own in hooks:
            own.remove()

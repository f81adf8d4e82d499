"""What `make demo` runs: a CLIP learns seven vendors' emoji and their names, then names the drawings of an eighth vendor.

Leaves report.html with its figures, results.json (every number), model.pt (for clipfast.load) and log.jsonl in `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipfast
from clipfast.cli import exit_code
from clipfast.data import Batch
from clipfast.evaluate import encode_texts, retrieval, zero_shot, zero_shot_weights
from clipfast.files import output_folder, replacing
from clipfast.model import CLIP
from clipfast.train import Batches, TrainConfig, new_model, train
from clipfast.weights import beyond_shapes
from demo import emoji, report
from demo.emoji import Drawings
from demo.settings import LARGE, SMALL, WHITE, described, settings, speed
from demo.words import Vocabulary, narrow, widen

QUERIES = (
    "a red heart", "a smiling face", "a sad cat", "a clock", "a train", "a fish", "a woman cooking", "the moon",
    "a green leaf", "an arrow to the left",
)  # fmt: skip


def recipe(out: str, seconds: float) -> TrainConfig:
    """The largest settings: a ResNet of four bottlenecks at 48 pixels beside a text transformer of two blocks.

    Chosen by what two cores reach in five minutes: ViTs of the same cost learn too slowly (43.7 % top-5 after 2,500 steps,
    this one 63.4 % after 2,300), and 64 pixels are no better, as they allow fewer steps (2,600 for 3,800: 70.7 and 71.0 %).
    A CPU computes it in fp32 (precision "auto"): a step takes 57 ms on two cores; in bf16 it took half as long again.
    """
    model: dict[str, Any] = {"embed_dim": 128, "image_resolution": LARGE, "vision_layers": (1, 1, 1, 1), "vision_width": 16}
    model |= {"vision_patch_size": None, "context_length": 32, "vocab_size": 49408}
    model |= {"transformer_width": 128, "transformer_heads": 2, "transformer_layers": 2}
    run: dict[str, Any] = {"model": model, "out": out, "max_seconds": seconds, "tensorboard": False}
    return TrainConfig(**run, batch_size=128, lr=1e-3, beta2=0.98, weight_decay=0.2, warmup=0.1, seed=0)


def batches(drawings: Drawings, config: TrainConfig, side: Callable[[], int] | None = None, white: float = 0.5) -> Batches:
    """Batches of distinct concepts, so that no other caption fits a drawing: the concepts of `drawings` are dealt out anew in
    each epoch, each with one of its drawings, varied, and its label in a random template. A batch depends on its step alone,
    but for the pixels a side that `side` gives; by default the model's. white: the share of them on white.

    Made when asked for, in 6 of a step's 63 ms: on two cores a thread that works ahead only took from the others.
    """
    of_concept: dict[int, list[int]] = {}
    for row, concept in enumerate(drawings.concept.tolist()):
        of_concept.setdefault(concept, []).append(row)
    concepts, sizes = np.array(list(of_concept)), config.model
    assert isinstance(sizes, dict)
    if len(concepts) < config.batch_size:
        raise ValueError(f"expected at least {config.batch_size} concepts for a batch of distinct ones, got {len(concepts)}")
    a_pass = len(concepts) // config.batch_size  # batches

    def batch(step: int) -> Batch:
        epoch, place = divmod(step, a_pass)
        dealt = np.random.default_rng([config.seed, epoch]).permutation(concepts)
        rng = np.random.default_rng([config.seed, epoch, 1 + place])
        rows = [int(rng.choice(of_concept[concept])) for concept in dealt[place * config.batch_size :][: config.batch_size]]
        varied = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pixels = emoji.augment(drawings.rgba[rows], side() if side else sizes["image_resolution"], varied, white=white)
        texts = [emoji.caption(drawings.concepts[drawings.concept[row]], rng) for row in rows]
        tokens, lengths = clipfast.tokenize(texts, sizes["context_length"], truncate=True, return_lengths=True)
        return Batch(pixels, tokens, lengths)

    return lambda step: map(batch, count(step))


@torch.no_grad()
def encode(model: CLIP, drawings: Drawings, side: int = 0) -> Tensor:
    """Normalised image features [n, D], float32 on the CPU, of drawings on white; side: in pixels, 0 for the model's."""
    was_training, device = model.training, model.logit_scale.device
    model.eval()
    side = side or model.visual.input_resolution
    parts = [emoji.flatten(part, side).to(device) for part in drawings.rgba.split(256)]
    features = torch.cat([model.encode_image(part, normalize=True).float().cpu() for part in parts])
    model.train(was_training)
    return features


class Watch:
    """The learning curve: the loss of each step and, about twenty times in a run, zero-shot accuracy on `held_out`.

    The accuracies are for the eye alone: the run does not depend on them, and their time does not count.
    """

    def __init__(self, held_out: Drawings, seconds: float, words: Vocabulary, small: float) -> None:
        """seconds: of the whole run; small: the share of them with fewer pixels."""
        self.held_out, self.every, self.next, self.words, self.until = held_out, seconds / 20, 0.0, words, small * seconds
        self.seconds = 0.0
        self.rates: list[float] = []
        self.losses: list[tuple[float, float]] = []  # seconds, loss
        self.accuracies: list[tuple[float, float, float]] = []  # seconds, top-1, top-5

    def __call__(self, step: int, model: CLIP, metrics: dict[str, float]) -> None:
        self.seconds = seconds = metrics["seconds"]
        self.rates.append(metrics["lr"])
        self.losses.append((seconds, metrics["loss"]))
        if seconds >= self.next:
            self.next = seconds + self.every
            self.look(seconds, model)

    def side(self) -> int:
        """Pixels a side of the drawings at this time of the run."""
        return SMALL if self.seconds < self.until else LARGE

    def look(self, seconds: float, model: CLIP) -> None:
        labels = [concept.label for concept in self.held_out.concepts]
        names = zero_shot_weights(model, labels, ["{}"], tokenizer=self.words).cpu()
        scores = zero_shot(encode(model, self.held_out, self.side()), names, self.held_out.concept)
        self.accuracies.append((seconds, scores["top1"], scores["top5"]))


def without_flags(drawings: Drawings) -> Drawings:
    flags = torch.tensor([concept.group == "flags" for concept in drawings.concepts])
    return pick(drawings, ~flags[drawings.concept])


def pick(drawings: Drawings, keep: Tensor) -> Drawings:
    """The drawings where `keep`, bool [n], is true; the classes stay."""
    styles = [style for style, kept in zip(drawings.style, keep.tolist(), strict=True) if kept]
    return replace(drawings, rgba=drawings.rgba[keep], concept=drawings.concept[keep], style=styles)


def measure(model: CLIP, names: Tensor, train_split: Drawings, tests: dict[str, Drawings]) -> list[dict[str, Any]]:
    """One row per test and choice of flags: accuracies of the model (`names`: its classifier [classes, D]), of the nearest
    neighbour on pixels, and of chance. Drawings of unseen concepts are named among the unseen concepts' names."""
    rows = []
    for kind, test in tests.items():
        for flags in (True, False):
            asked, known = (test, train_split) if flags else (without_flags(test), without_flags(train_split))
            among = [
                index
                for index, concept in enumerate(test.concepts)
                if (kind == "seen" or concept.unseen) and (flags or concept.group != "flags")
            ]
            row: dict[str, Any] = {"concepts": kind, "flags": flags, "drawings": len(asked.concept), "names": len(among)}
            row |= zero_shot(encode(model, asked), names, asked.concept, subset=torch.tensor(among))
            nearest = emoji.pixel_baseline(known, asked) == asked.concept[:, None]
            row |= {f"pixels_top{k}": nearest[:, :k].any(1).double().mean().item() for k in (1, 5)}
            rows.append(row | {f"chance_top{k}": min(1.0, k / len(among)) for k in (1, 5)})
    return rows


def versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    software = {"python": platform.python_version(), "torch": torch.__version__, "clipfast": clipfast.__version__}
    return software | {"machine": platform.machine(), "device": device}


def run(config: TrainConfig, data: Path, out: Path) -> dict[str, Any]:
    """Measures, trains, evaluates and writes everything into `out`, which exists; returns what results.json holds.

    `config`, of the largest settings, is made to fit the machine. Its `out` is a folder for the time of the training only.
    """
    splits = {split: emoji.load(split, data) for split in emoji.SPLITS}
    drawings, sizes = splits["train"], config.model
    assert isinstance(sizes, dict)
    words = Vocabulary(form.format(concept.label) for concept in drawings.concepts for form in emoji.TRAIN_TEMPLATES)

    def renumbered(**how: Any) -> Batches:
        own = batches(drawings, config, **how)
        return lambda step: (batch._replace(tokens=words.renumbered(batch.tokens)) for batch in own(step))

    print("measuring this machine", flush=True)
    measured = speed(replace(config, model=sizes | {"vocab_size": len(words)}), renumbered())
    chosen = settings(measured)
    print(described(chosen, measured), flush=True)
    config = replace(config, model=sizes | {"transformer_layers": chosen.blocks})
    watch = Watch(splits["seen"], config.max_seconds, words, chosen.small)
    model = new_model(config)
    table = narrow(model, words)
    trained = train(config, renumbered(side=watch.side, white=WHITE), model, watch)
    Path(config.out, "log.jsonl").replace(out / "log.jsonl")

    print("evaluating", flush=True)
    watch.look(trained.seconds, model.eval())
    widen(model, words, table, math.prod(1 - config.weight_decay * rate for rate in watch.rates))
    with replacing(out / "model.pt") as file:
        torch.save({"state_dict": model.state_dict(), "model_config": beyond_shapes(model)}, file)
    concepts, tests = splits["train"].concepts, {kind: splits[kind] for kind in ("seen", "unseen")}
    names = zero_shot_weights(model, [concept.label for concept in concepts], emoji.EVAL_TEMPLATES).cpu()
    rgba, concept = (torch.cat([getattr(test, field) for test in tests.values()]) for field in ("rgba", "concept"))
    both = Drawings(rgba, concept, sum((test.style for test in tests.values()), []), concepts)
    features = encode(model, both)
    scale = model.logit_scale.exp().item()
    asked = encode_texts(model, QUERIES).cpu()
    results: dict[str, Any] = {
        "seconds": trained.seconds,
        "steps": trained.steps,
        "settings": chosen._asdict() | {"measured_pairs_per_second": measured, "told": described(chosen, measured)},
        "pairs_per_second": trained.steps * config.batch_size / trained.seconds,
        "weights": sum(p.numel() for p in model.parameters()),
        "accuracy": measure(model, names, splits["train"], tests),
        "retrieval": retrieval(features, names[concept.unique()], concept, concept.unique()),
        "training_drawings": len(splits["train"].concept),
        "training_concepts": len(splits["train"].concept.unique()),
        "config": asdict(replace(config, out=out.name)),
        "versions": versions(),
    }
    shown = report.Shown(both, scale * features @ names.T, dict(zip(QUERIES, asked @ features.T, strict=True)))
    report.write(out, results, watch.losses, watch.accuracies, shown, (data / "shards" / "ATTRIBUTION.txt").read_text())
    with replacing(out / "results.json") as file:
        file.write(json.dumps(results | {"curve": watch.accuracies}, indent=1).encode())
    return results


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can put right (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser("python -m demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of training (default: %(default)s)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "out"), help="folder of the report (default: demo/out)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)

    def work() -> None:
        if not given.seconds > 0:
            raise ValueError(f"expected --seconds above 0, got {given.seconds}")
        with output_folder(given.out) as out, TemporaryDirectory(dir=out, prefix="training-") as aside:
            emoji.prepare(emoji.DATA)
            results = run(recipe(aside, given.seconds), emoji.DATA, out)
        print(report.table(results))
        print(f"\nreport: {Path(given.out, 'report.html')}")

    return exit_code("demo", given.debug, work)


if __name__ == "__main__":
    sys.exit(main())

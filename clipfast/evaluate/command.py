"""The tasks of `clipfast eval` beyond plain zero-shot and retrieval, and a whole suite."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from clipfast.data import DataConfig
from clipfast.evaluate.datasets import EvalSet, lines, read_text
from clipfast.evaluate.features import unprojected
from clipfast.evaluate.figures import page
from clipfast.evaluate.plots import shares_plot
from clipfast.evaluate.probe import README_PENALTY, Head
from clipfast.evaluate.robustness import robustness
from clipfast.evaluate.suite import Suite, identity, run_suite, table
from clipfast.evaluate.tasks import Bench
from clipfast.files import output_folder, replacing, shown
from clipfast.inputs import Preprocess, read_image
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job

Load = Callable[[str], tuple[CLIP, Preprocess]]


@dataclass
class Measure:
    train: Annotated[str, "training split, as DATA, for probe, few-shot and overlap"] = ""
    validation: Annotated[str, "split that the probe's penalty is chosen on; default: a fifth of train"] = ""
    metric: Annotated[str, "accuracy, mean-per-class, mean-top1-top5, roc-auc, map-11 or map"] = "accuracy"
    readme: Annotated[bool, "probe as OpenAI's README: projected features, C = 0.316"] = False
    shots: Annotated[str, "examples a class, joined by commas"] = "1,2,4,8,16"
    seeds: Annotated[int, "draws of each number of examples"] = 3
    subset: Annotated[str, "file of the classes to choose among, a line each"] = ""
    calibration: Annotated[bool, "also the expected calibration error"] = False
    confusion: Annotated[bool, "also the confusion matrix, in results.json"] = False
    similarity: Annotated[float, "cosine from which an image counts as a near-duplicate"] = 0.95
    hash_bits: Annotated[int, "in place of features, perceptual hashes: bits of 64 that may differ"] = -1
    features: Annotated[str, "folder that features are kept in: a later evaluation reads them"] = ""
    designs: Annotated[str, 'JSON of bias: {"designs": {name: [labels]}, "groups": {name: [labels]}}'] = ""


@dataclass
class SuiteOptions:
    models: Annotated[list[str], "published models, hf-hub:... or paths of checkpoints"]
    suite: Annotated[str, "TOML file of data sets, or paper: the paper's 27 + 2 + 7"] = "paper"
    out: Annotated[str, "folder for cells, results.json and report.html; a second run goes on there"] = "suite"
    features: Annotated[str, "folder that features are kept in; default: features in the other one"] = ""
    batch_size: Annotated[int, "images at a time"] = 64
    device: Annotated[str, "cpu, cuda, ...; default: cuda if there is one"] = ""


def measure(
    name: str, task: str, data: DataConfig, options: Measure, load: Load, classes: str, templates: str, out: str, reading: Any,
    job: Job = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """The results of one task; every rank of a job has them."""
    if task == "robustness":
        return _robustness(data.data)
    entry = EvalSet(
        Path(data.data).name, test=data.data, train=options.train, validation=options.validation, classes=classes,
        templates=templates, metric=options.metric, reader=data, designs=options.designs if task == "bias" else "",
    )  # fmt: skip
    if task in ("probe", "few-shot", "overlap") and not options.train:
        raise ValueError(f"expected --train, the training split, for {task}")
    bench = Bench(*load(name), entry, cache=options.features, job=job, **reading)
    if task == "zero-shot":
        subset = lines(read_text(options.subset)) if options.subset else []
        return bench.zero_shot(subset, options.calibration, options.confusion)
    if task == "retrieval":
        return bench.retrieval()
    if task == "few-shot":
        return bench.few_shot([int(own) for own in options.shots.split(",")], options.seeds)
    if task in ("overlap", "bias"):
        return _audited(bench, task, options, out if job.rank == 0 else "")
    if task != "probe":
        raise ValueError(
            f"expected --task zero-shot, probe, few-shot, retrieval, robustness, overlap, bias or classify, got {task!r}"
        )
    probe, results = bench.probe(options.readme, README_PENALTY if options.readme else None)
    if out and job.rank == 0:
        about = probe.head.about | {"projected": options.readme, "model": name, "identity": identity(name)}
        probe.head._replace(about=about).save(out)
    return results


def _robustness(path: str) -> dict[str, Any]:
    """From a table with the columns model, accuracy, shifted and, for the models of the line, standard (1)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"model", "accuracy", "shifted"} <= rows[0].keys():
        raise ValueError(f"{path}: expected a table with the columns model, accuracy, shifted and, if not all, standard")
    names = [row["model"] for row in rows]
    standard = [row["model"] for row in rows if row.get("standard", "1").strip().lower() in ("1", "true", "yes")]
    accuracy, shifted = ([float(row[own]) for row in rows] for own in ("accuracy", "shifted"))
    found = robustness(names, accuracy, shifted, standard)
    _print(found.table())
    return found.summary()


def _audited(bench: Bench, task: str, options: Measure, out: str) -> dict[str, Any]:
    """Overlap or bias, printed as a table, and beside results.json what is to be looked at."""
    if task == "overlap":
        bits = None if options.hash_bits < 0 else options.hash_bits
        found, results = bench.overlap(options.similarity, bits, Path(out, "duplicates.png") if out else "")
        _print(found.table())
        return results
    shares, results = bench.bias()
    _print(shares.table())
    if out:
        with output_folder(out) as folder, replacing(folder / "bias.svg") as file:
            file.write(shares_plot(results["shares"]).encode())
    return results


def by_head(path: str, name: str, image: str, load: Load) -> list[tuple[float, str]]:
    """(probability, class) of an image by a saved probe, the most probable first."""
    head = Head.load(Path(path).parent if Path(path).is_file() else path)
    if (own := head.about.get("identity", identity(name))) != identity(name):
        raise ValueError(f"{path}: expected the model that the head was fitted on, {head.about.get('model', own)}, got {name}")
    model, preprocess = load(name)
    pixels = preprocess(read_image(image))[None]
    projected = head.about.get("projected", False)
    with torch.no_grad():
        pixels = pixels.to(model.logit_scale.device)
        if projected:
            features = model.encode_image(pixels, normalize=True)
        else:
            with unprojected(model):
                features = model.encode_image(pixels)
    names = head.about.get("names") or head.classes
    shares = head.probabilities(features.float().cpu())[0].tolist()
    pairs = [(share, str(names[own] if isinstance(own, int) else own)) for share, own in zip(shares, head.classes, strict=True)]
    return sorted(pairs, reverse=True)


def suite_of(options: SuiteOptions, load: Load, reading: Any, job: Job = ALONE) -> None:
    """Measure models on a suite of data sets; the ranks of a job make the features together, the first one the rest."""
    suite = Suite.read(options.suite)
    rows = run_suite(options.models, suite, options.out, load, _tell, cache=options.features, job=job, **reading)
    if job.rank:
        return
    _print(table(rows))
    with output_folder(options.out) as folder, replacing(folder / "report.html") as file:
        file.write(page(rows, suite).encode())
    print(Path(options.out, "report.html"))


def _tell(row: dict[str, Any]) -> None:
    _print(f"{row['model']}, {row['dataset']}, {row['task']}: {row.get('reason') or format(row['score'], '.2%')}")


def _print(table: str) -> None:
    """With the names of a stranger's classes and sets in it."""
    print("\n".join(map(shown, table.split("\n"))), flush=True)

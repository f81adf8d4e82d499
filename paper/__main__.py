"""What `make paper` runs: the figures of the CLIP paper on real drawings and their names, in the minutes given.

Fetches emoji and icons, trains seven small models (three objectives and a bag of words, four sizes), measures them as the paper
did, and writes paper.html into `--out`. What is done is kept: killed and started again, it goes on.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clipfast
from clipfast.cli import exit_code
from clipfast.evaluate.few_shot import Worth
from clipfast.evaluate.intervals import Interval
from clipfast.evaluate.overlap import Overlap, sheet
from clipfast.files import locked, output_folder, read_parsed, replacing
from demo import emoji
from demo.words import Vocabulary
from paper import data, icons, measure, models, page, verdicts
from paper.data import World
from paper.models import KINDS, MAIN, OBJECTIVES, ORDER, SIZES, Clock, of, runs, write
from paper.verdicts import Verdict

MEASURING = 180  # seconds for all that follows the training: 65 on two free cores, and some more on busy ones
RESERVE = 20  # seconds below which no further part is begun; the longest takes 9 on two free cores
LONG, SEEDS = 40, 2  # minutes from which on most models are trained by so many seeds
SHORT, OFTEN = 20, 5  # minutes below which only concepts of so many drawings are learned: few are learned well, or many not
STEPS = 300  # of L-BFGS for a probe
WORDS, BAG = "predicts words", "contrastive, bag of words"


class Parts:
    """Results kept part by part in a folder. A part that has no time left is left out, and says so."""

    def __init__(self, folder: Path, clock: Clock, reserve: float) -> None:
        self.folder, self.clock, self.reserve = folder, clock, reserve
        self.left_out: list[str] = []
        folder.mkdir(exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.json"
        if not path.exists():
            if self.clock.left() < self.reserve:
                self.left_out.append(name)
                return None
            print(f"measuring: {name}", flush=True)
            write(path, {"result": make()})
            self.clock.save()
        return read_parsed(path)["result"]


def trained(world: World, words: Vocabulary, work: Path, clock: Clock, seeds: int, **changes: Any) -> dict[str, clipfast.CLIP]:
    """The model of each run."""
    asked = models.Asked(world.pool, world.named["emoji, a new style"], words, changes.pop("asked", models.ASKED))
    learning = max(clock.left() - MEASURING, clock.left() / 2)
    limits = models.plan(work / "plan.json", world.learned, words, learning, changes.pop("steps", 0), seeds, **changes)
    found, steps = {}, limits["steps"]
    # The first seed of all before any other: where time runs out every model is there.
    due = [(run, limits["step"][name]) for seed in range(seeds) for name in ORDER for run in runs(name, seeds)[seed : seed + 1]]
    for place, (run, cost) in enumerate(due):
        # What one has not used the others have: who is cut short has seen fewer images than the rest.
        share = cost / sum(own for _, own in due[place:])
        seconds = max(1.0, share * max(clock.left() - MEASURING, clock.left() / 2))
        print(f"training: {run}, {steps} steps, at most {seconds:.0f} s", flush=True)
        found[run] = models.made(run, work / "models", world.learned, asked, steps, seconds, **changes).eval()
        clock.save()
    return found


def measured(
    world: World, words: Vocabulary, work: Path, clock: Clock, found: dict[str, clipfast.CLIP]
) -> tuple[Parts, dict[str, Any]]:
    """Every result, by part; one that is None was left out."""
    part, kept = Parts(work / "results", clock, RESERVE), dict[str, measure.Features]()

    def features(name: str) -> measure.Features:
        if name not in kept:
            kept[name] = measure.Features(found[name], world)
        return kept[name]

    results: dict[str, Any] = {"zero": {}, "probe": {}, "pixels": {}, "words": {}, "shots": {}}
    contrastive = dict.fromkeys((MAIN, *SIZES, BAG, *(run for name in SIZES for run in of(name, found))))
    for name in contrastive:
        results["zero"][name] = part(
            f"zero-shot, {name}", lambda n=name: measure.zero_shot(found[n], features(n), world.tasks, words)
        )
    both = (MAIN, BAG)
    results["shift"] = part(
        "shift", lambda: measure.shifted({name: (found[name], features(name)) for name in both}, world, words, 0.01, STEPS)
    )
    results["bias"] = part("bias", lambda: measure.wronged(found[MAIN], features(MAIN), world, words))
    results["examples"] = part("examples", lambda: measure.examples(found[MAIN], features(MAIN), world, words))

    def overlap() -> Any:
        told, pairs = measure.overlap(found[MAIN], features(MAIN), world, words)
        with replacing(work / "pairs.png") as file:
            sheet(pairs, side=64).save(file, "PNG")
        return told

    results["overlap"] = part("overlap", overlap)
    # The small sets first: where time runs out, most sets are there.
    tasks = sorted(world.tasks, key=lambda task: len(task.classes) * len(task.train[1]))
    for task in tasks:
        own = part(f"probe, {task.name}", lambda t=task: measure.probe(features(MAIN), t, None, STEPS))
        if not own:
            break
        results["probe"][task.name], penalty = own, own["penalty"]
        results["words"][task.name] = part(
            f"probe of the words' tower, {task.name}", lambda t=task, p=penalty: measure.probe(features(WORDS), t, p, STEPS)
        )
        zero = results["zero"][MAIN][task.name]["accuracy"]
        results["shots"][task.name] = part(
            f"few-shot, {task.name}", lambda t=task, p=penalty, z=zero: measure.shots(features(MAIN), t, p, z, STEPS)
        )
        if task.name == "digits":
            results["pixels"] = part("pixels, digits", lambda t=task: measure.pixel_probe(world.pool, t, STEPS))
    return part, results


def judged(results: dict[str, Any], curves: dict[str, list[verdicts.Curve]], compute: dict[str, float]) -> list[Verdict]:
    """A verdict for each figure whose numbers are there. curves: model -> that of each seed."""
    found = [
        verdicts.efficiency("predicts captions", WORDS, 3, curves),
        verdicts.efficiency(WORDS, BAG, 4, curves),
        verdicts.efficiency(WORDS, MAIN, 4, curves, " (there with a bag of words, here with the text transformer)"),
    ]
    own = results["zero"].get(MAIN)
    if not own:
        return found
    zero = {name: row["accuracy"] for name, row in own.items()}
    probe, other = ({name: row["accuracy"] for name, row in results[kind].items() if row} for kind in ("probe", "words"))
    shots = {name: row for name, row in results["shots"].items() if row}
    found.append(verdicts.ensembling({name: row["accuracy"] - row["bare"] for name, row in own.items()}))
    if len(other) > 1:
        found.append(verdicts.against_supervised(zero, other))
    if len(shots) > 1:
        found.append(verdicts.few_shots_worth(curves_of(shots), zero))
        found.append(verdicts.examples_needed({name: Worth(row["worth"], row["bound"]) for name, row in shots.items()}))
    if len(probe) > 2:
        found.append(verdicts.correlation(zero, probe))
    errors = errors_of(results)
    if len(errors) > 2:
        found.append(verdicts.scaling({name: compute[name] for name in errors}, errors))
    if len(probe) > 1 and len(other) > 1:
        found.append(verdicts.representation(probe, other))
    if shift := results["shift"]:
        found.append(verdicts.robust({name: own for name, own in shift.items() if name != "robustness"}))
        found.append(verdicts.adapted(shift[MAIN], shift[f"{MAIN}, probe"]))
    if results["overlap"]:
        sets = [
            Overlap(**row | {"interval": row["interval"] and Interval(*row["interval"])}) for row in results["overlap"]["sets"]
        ]
        found.append(verdicts.overlapping(sets))
    if told := results["bias"]:
        found.append(verdicts.added_class(told["without child"], told["with child"], told["young"]))
    if results["pixels"] and "digits" in own:
        found.append(verdicts.handwriting(results["pixels"]["hits"], own["digits"]["hits"]))
    return found


def errors_of(results: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Size -> of each seed, set -> error."""
    found = {name: [results["zero"][run] for run in of(name, results["zero"])] for name in SIZES}
    errors = {
        name: [{task: 1 - row["accuracy"] for task, row in rows.items()} for rows in own if rows] for name, own in found.items()
    }
    return {name: own for name, own in errors.items() if own}


def curves_of(shots: dict[str, Any]) -> dict[str, dict[float, float]]:
    return {name: {float(shot): value for shot, value in row["curve"].items()} for name, row in shots.items()}


def sections(
    results: dict[str, Any], curves: Any, compute: dict[str, float], world: World, work: Path
) -> list[tuple[str, str, str]]:
    """Figure, title, and what is drawn of it; a figure whose numbers were left out is not there."""
    own = results["zero"].get(MAIN) or {}
    zero = {name: row["accuracy"] for name, row in own.items()}
    probe, other = ({name: row["accuracy"] for name, row in results[kind].items() if row} for kind in ("probe", "words"))
    shots = {name: row for name, row in results["shots"].items() if row}
    parts = [("2", "Figure 2: accuracy over images seen, for four objectives", page.learning(curves))]
    if own:
        rows = [
            (name, f"{row['images']:,}", f"{row['classes']}", f"{row['accuracy']:.1%}", f"{row['bare']:.1%}",
             f"{row['chance']:.1%}",
             f"{probe[name]:.1%}" if name in probe else "", f"{other[name]:.1%}" if name in other else "",
             f"{row['calibration']:.1%}")
            for name, row in own.items()
        ]  # fmt: skip
        head = (
            "set",
            "images",
            "classes",
            "zero-shot",
            "bare names",
            "chance",
            "probe",
            "probe, words' tower",
            "calibration error",
        )
        parts.append(("", "The sets", page.table(head, rows)))
        gains = page.differences(
            zero, {name: row["bare"] for name, row in own.items()}, "ensemble less bare name, points of per cent"
        )
        parts.append(("4", "Figure 4: templates and their ensemble", gains))
    if other:
        drawn = page.differences(zero, other, "zero-shot less probe on the words' tower, points of per cent")
        parts.append(("5", "Figure 5: zero-shot against a probe on supervised features", drawn))
    if shots:
        parts.append(("6", "Figure 6: zero-shot against few-shot probes", page.few(curves_of(shots), zero)))
        rows = [(name, f"{row['bound']} {row['worth']:.1f}") for name, row in shots.items()]
        parts.append(("7", "Figure 7: how many examples a class zero-shot is worth", page.table(("set", "examples"), rows)))
    if probe:
        parts.append(("8", "Figure 8: zero-shot over the probe on all examples", page.pairs(zero, probe, "probe", "zero-shot")))
    if len(errors := errors_of(results)) > 2:
        parts.append(("9", "Figure 9: zero-shot error over compute", page.scaled(compute, errors)))
    if probe and other:
        drawn = page.differences(probe, other, "probe on the contrastive tower less the words', points of per cent")
        parts.append(("10", "Figure 10: probes on the features of two towers", drawn))
    if shift := results["shift"]:
        parts.append(("13", "Figure 13: robustness to a natural shift", page.robustness(shift)))
        parts.append(("14", "Figure 14: adapting to the base style", ""))
    if told := results["overlap"]:
        head = ("set", "images", "overlapping", "all", "overlap", "clean", "adjusted p")
        shown = [
            (row["name"], f"{row['images']:,}", f"{row['overlapping']}", *(
                "-" if row[key] is None else f"{row[key]:.1%}" for key in ("all", "overlap", "clean")
            ), "-" if row["adjusted"] is None else f"{row['adjusted']:.2g}")
            for row in told["sets"]
        ]  # fmt: skip
        with measure.Image.open(work / "pairs.png") as picture:
            parts.append(
                ("17", "Figure 17: test drawings that training has seen", page.table(head, shown) + page.image(picture))
            )
    if told := results["bias"]:
        parts.append(("table 7", "Bias: labels that wrong people, by the design of the classes", f"<pre>{told['table']}</pre>"))
    if results["pixels"]:
        parts.append(("MNIST", "Handwritten digits", ""))
    if told := results["examples"]:
        pictures = [measure.picture(world.pool.rgba[row["row"]]) for row in told]
        parts.append(("", "Figure 21: what the zero-shot classifier says of one image of each set", page.cards(told, pictures)))
    return parts


def run(world: World, work: Path, out: Path, clock: Clock, attribution: str, **changes: Any) -> list[Verdict]:
    """Trains, measures and writes paper.html; `work` holds what a second start goes on from."""
    words = Vocabulary(data.texts(world))
    found = trained(world, words, work, clock, SEEDS if clock.minutes >= LONG else 1, **changes)
    part, results = measured(world, words, work, clock, found)
    about = {run: read_parsed(work / "models" / run / "done.json") for run in found}
    curves = {
        name: [
            {int(images): hits for images, hits in read_parsed(work / "models" / run / "curve.json").items()}
            for run in of(name, found)
        ]
        for name in OBJECTIVES
    }  # fmt: skip
    compute = {name: row["flops"] for name, row in about.items()}
    told, end = judged(results, curves, compute), curves[MAIN][0][max(curves[MAIN][0])]
    if not verdicts.learned(end):  # what it cannot do says nothing of what the paper found
        told = [own._replace(agrees=verdicts.OPEN) for own in told]
    text = page.page(
        introduction(world, about, part, clock, verdicts.learned(end)), told, sections(results, curves, compute, world, work),
        f"<h2>Sources</h2><pre>{page.escape(attribution)}</pre><p>{page.escape(machine())}</p>",
    )  # fmt: skip
    with replacing(out / "paper.html") as file:
        file.write(text.encode())
    write(
        out / "paper.json",
        {"verdicts": [own._asdict() for own in told], "models": about, "left_out": part.left_out, "results": results},
    )
    return told


def introduction(world: World, about: dict[str, Any], part: Parts, clock: Clock, learned: bool) -> str:
    steps = {name: row["steps"] for name, row in about.items()}
    cut = [f"{name} after {own:,}" for name, own in steps.items() if own < max(steps.values())]
    seeds = "there is one run of each model, so they do not hold what another seed would change"
    if len(about) > len(KINDS):
        seeds = "in figures 2 and 9 over seeds too; elsewhere they do not hold what another seed would change"
    text = (
        f"{len(world.learned.concept):,} drawings of {len(world.learned.concept.unique()):,} concepts (emoji of six vendors, "
        "icons of fifteen sets) to learn from; two vendors, one icon set and all digits are seen in no training. "
        f"{len(KINDS)} models in {len(about)} runs, up to {max(steps.values()):,} steps of 128 pairs each. "
        f"Intervals are of 95 %, over images or over sets; {seeds}. "
        f"{clock.spent() / 60:.1f} of {clock.minutes:g} minutes."
    )
    text += "" if learned else " The time was too short to learn anything: nothing is decided by what follows."
    text += f" Stopped by their time: {', '.join(cut)}." if cut else ""
    text += f" Left out for want of time: {', '.join(part.left_out)}." if part.left_out else ""
    return f'<p class="soft">{page.escape(text)}</p>'


def machine() -> str:
    return (
        f"clipfast {clipfast.__version__}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    )


def prepared(minutes: float) -> tuple[World, str]:
    shards, drawn = emoji.prepare(emoji.DATA), icons.prepare(emoji.DATA)
    attribution = "\n".join((folder / "ATTRIBUTION.txt").read_text(encoding="utf-8") for folder in (shards, drawn))
    return data.load(emoji.DATA, 1 if minutes >= SHORT else OFTEN), attribution


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can put right (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser("python -m paper", description=__doc__)
    parser.add_argument("--minutes", type=float, default=45.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "out"), help="folder of paper.html (default: paper/out)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args(arguments)

    def work() -> None:
        if not given.minutes > 0:
            raise ValueError(f"expected --minutes above 0, got {given.minutes}")
        with output_folder(given.out) as out, locked(out):
            folder = out / f"work-{given.minutes:g}"
            folder.mkdir(exist_ok=True)
            clock = Clock(folder / "clock.json", given.minutes)
            world, attribution = prepared(given.minutes)
            told = run(world, folder, out, clock, attribution)
        for own in told:
            print(f"figure {own.figure}: {own.agrees}: {own.here}")
        print(f"\nreport: {Path(given.out, 'paper.html')}")

    return exit_code("paper", given.debug, work)


if __name__ == "__main__":
    sys.exit(main())

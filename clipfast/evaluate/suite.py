"""Models × data sets × tasks in one go, each cell kept as soon as it exists; a second run makes only what is not there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipfast.evaluate.datasets import TASKS, EvalSet
from clipfast.evaluate.features import together
from clipfast.evaluate.robustness import robustness
from clipfast.evaluate.tasks import Bench
from clipfast.files import locked, output_folder, read_parsed, replacing
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job

PATHS = ("root", "test", "train", "validation", "classes", "templates", "folds", "against", "designs")
PAPER = Path(__file__).with_name("paper.toml")
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """standard: models that the line of robustness goes through. compute: model -> GFLOPs an image (figure 9).

    points: rows that were measured elsewhere: model, dataset, task, score.
    """

    datasets: list[EvalSet]
    standard: list[str] = field(default_factory=list)
    compute: dict[str, float] = field(default_factory=dict)
    points: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """A TOML file with [[dataset]] tables; "paper" is the paper's. Relative paths in it are relative to it."""
        file = PAPER if str(path) == "paper" else Path(path)
        given = read_parsed(file, form="TOML")
        known = {"dataset", "standard", "compute", "point"}
        tables = given.get("dataset")
        if not isinstance(tables, list) or not all(isinstance(own, dict) for own in tables) or given.keys() - known:
            raise ValueError(f"{file}: expected [[dataset]] tables, and of the rest {sorted(known)}; got {sorted(given)}")
        datasets = [EvalSet.of(_beside(entry, file.parent)) for entry in tables]
        if len({data.name for data in datasets}) != len(datasets):
            raise ValueError(f"{file}: expected each data set once, got {[data.name for data in datasets]}")
        points, standard, compute = given.get("point", []), given.get("standard", []), given.get("compute", {})
        if not isinstance(points, list) or not all(map(_is_point, points)):
            raise ValueError(f"{file}: expected points of model, dataset, task and score, got {points!r:.200}")
        if not isinstance(standard, list) or not all(isinstance(name, str) for name in standard):
            raise ValueError(f"{file}: expected standard to be a list of names, got {standard!r:.60}")
        if not isinstance(compute, dict) or not all(type(value) in (int, float) for value in compute.values()):
            raise ValueError(f"{file}: expected compute to be a number for each model, got {compute!r:.60}")
        return cls(datasets, standard, compute, points)


def _is_point(point: Any) -> bool:
    kinds = {"model": (str,), "dataset": (str,), "task": (str,), "score": (int, float)}
    return isinstance(point, dict) and point.keys() == kinds.keys() and all(type(v) in kinds[k] for k, v in point.items())


def _beside(entry: Row, folder: Path) -> Row:
    def placed(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) and value and "://" not in value else value

    return {key: placed(value) if key in PATHS else value
            for key, value in entry.items()}  # fmt: skip


def run_suite(
    models: Sequence[str],
    suite: Suite,
    out: str | Path,
    load: Callable[[str], tuple[CLIP, Preprocess]],
    tell: Callable[[Row], None] = lambda row: None,
    *,
    cache: str | Path = "",
    job: Job = ALONE,
    **reading: Any,
) -> list[Row]:
    """A row for each cell: model, dataset, task, and results or the reason why there are none; also out/results.json.

    Cells are kept in out/cells by what they depend on: weights, the files of the data, the entry of the suite; of overlap its
    sheet of pairs too, which the row's `sheet` names. `load`: by name.
    cache: folder of the features, which belong to no suite; by default out/features.
    job: its ranks make features together; the rest, and so the rows, the first one makes alone.
    """
    if not models or len(set(models)) != len(models):
        raise ValueError(f"expected models, each once, got {list(models)}")
    rows, reading = list[Row](), reading | {"cache": cache or Path(out, "features")}
    with ExitStack() as stack:

        def begin() -> None:
            if job.rank == 0:
                stack.enter_context(locked(stack.enter_context(output_folder(out))))
                (Path(out) / "cells").mkdir(exist_ok=True)

        together(job, begin, lambda made: made)
        folder = Path(out)
        for model in models if job.world > 1 else ():
            _make_features(model, suite, folder / "cells", load, reading, job)
        if job.rank:
            return []
        for model in models:
            for row in _of_model(model, suite, folder / "cells", load, reading):
                rows.append(row)
                tell(row)
        rows += [{"model": p["model"], "dataset": p["dataset"], "task": p["task"], "score": p["score"]} for p in suite.points]
        with replacing(folder / "results.json") as file:
            file.write(json.dumps({"rows": rows, "robustness": robust(rows, suite)}, indent=1).encode())
    return rows


def _make_features(model: str, suite: Suite, cells: Path, load: Callable[..., Any], reading: dict[str, Any], job: Job) -> None:
    """What the tasks of a model will read; what cannot be made is told by the tasks."""
    due = [
        (data, task) for data in suite.datasets for task in data.tasks
        if not data.missing and not (cells / f"{key(model, data, task)}.json").exists()
    ]  # fmt: skip
    due = job.share(due)
    try:
        network, preprocess = together(job, lambda: load(model) if due else (None, None), lambda made: None)[0]
    except Exception:  # on every rank; the rows say why
        return
    benches: dict[str, Bench] = {}
    for data, task in due:
        if data.name not in benches:
            benches[data.name] = Bench(network, preprocess, data, job=job, **reading)
        with suppress(Exception):
            benches[data.name].prepare(task)


def _of_model(model: str, suite: Suite, cells: Path, load: Callable[..., Any], reading: dict[str, Any]) -> Iterator[Row]:
    made: list[Any] = []

    def loaded() -> Any:
        if not made:
            try:
                made.append(load(model))
            except Exception as error:
                made.append(error)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    for data in suite.datasets:
        bench: Bench | None = None
        for task in data.tasks:
            row: Row = {"model": model, "dataset": data.name, "task": task}
            if data.missing:
                yield row | {"reason": data.missing}
                continue
            try:
                place = cells / f"{key(model, data, task)}.json"
                if not place.exists():
                    if bench is None:
                        network, preprocess = loaded()
                        bench = Bench(network, preprocess, data, **reading)
                    sheet = place.with_suffix(".png")
                    results = row | bench.run(task, sheet)
                    if sheet.exists():
                        results["sheet"] = f"{cells.name}/{sheet.name}"
                    with replacing(place) as file:
                        file.write(json.dumps(results).encode())
                yield read_parsed(place)
            except Exception as error:  # whatever it is, the other rows go on
                yield row | {"reason": " ".join(str(error).split())[:400] or type(error).__name__}


def key(model: str, data: EvalSet, task: str) -> str:
    """The digest of all that a cell depends on."""
    entry = {name: value for name, value in asdict(data).items() if name not in ("tasks", "reader", "shift_of", "missing")}
    paths = [data.path(split) for split in ("test", "train", "validation", "against")]
    paths += [own for own in (data.root, data.classes, data.templates, data.folds, data.designs) if isinstance(own, str)]
    told = [identity(model), entry, task, [stamps(path) for path in paths]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def identity(model: str) -> str:
    """The digest of a checkpoint's content; of a published model its name."""
    path = Path(model)
    files = [path] if path.is_file() else sorted(own for own in path.rglob("*") if own.is_file()) if path.is_dir() else []
    if not files:
        return model
    digest = hashlib.sha256()
    for own in files:
        digest.update(own.name.encode())
        with open(own, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def stamps(path: str) -> list[Any]:
    """Name, size and time of each file on this machine that the path means."""
    root = Path(path)
    if not path or not root.exists():
        return [path]
    files = [root] if root.is_file() else sorted(own for own in root.rglob("*") if own.is_file())
    return [(str(own), own.stat().st_size, own.stat().st_mtime_ns) for own in files]


def robust(rows: Sequence[Row], suite: Suite) -> Row | None:
    """Robustness of every model with zero-shot scores on a set and on its shifts; the reason where there is no line."""
    shifts = {data.name: data.shift_of for data in suite.datasets if data.shift_of}
    if not shifts:
        return None
    scores = {(row["model"], row["dataset"]): row["score"] for row in rows if row["task"] == "zero-shot" and "score" in row}
    base = next(iter(shifts.values()))
    names = [name for name in dict.fromkeys(row["model"] for row in rows) if (name, base) in scores]
    # Means over the same shifts: those that every model has.
    common = [own for own, of in shifts.items() if of == base and all((name, own) in scores for name in names)]
    if not common or not names:
        return {"reason": f"no model has scores on {base} and on a shift of it"}
    shifted = [math.fsum(scores[name, own] for own in common) / len(common) for name in names]
    try:
        standard = [name for name in suite.standard if name in names] or names
        found = robustness(names, [scores[name, base] for name in names], shifted, standard)
    except ValueError as error:
        return {"reason": str(error)}
    return found.summary() | {"base": base, "shifts": common, "through": standard}


def best(rows: Sequence[Row]) -> list[str]:
    """The models of some rows of one data set and task that count as best: the highest score, and all within its interval."""
    found = [row for row in rows if "score" in row]
    if len(found) < 2:
        return []
    highest = max(found, key=lambda row: row["score"])
    low = highest.get("interval", [highest["score"]])[0]
    return [row["model"] for row in found if row["score"] >= low]


def table(rows: Sequence[Row]) -> str:
    """A line for each data set and task, a column for each model, the best marked; what is missing with its reason, below."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["dataset"], row["task"], row["model"]): row for row in rows}
    names = list(dict.fromkeys((row["dataset"], row["task"]) for row in rows))
    wide, task_wide = max(7, *(len(name) for name, _ in names)), max(len(task) for task in TASKS)
    columns = [f"{model[-20:]:>20}" for model in models]
    lines = [f"{'dataset':{wide}} {'task':{task_wide}} {' '.join(columns)}"]
    for name, task in names:
        own = [cells.get((name, task, model), {"model": model}) for model in models]
        # Of overlap and bias the score is a share of images: less is not worse, nor more.
        marked = best(own) if task not in ("overlap", "bias") else []
        told = [f"{row['score']:.2%}" if "score" in row else "-" for row in own]
        shown = [f"{cell + ' *' if row['model'] in marked else cell:>20}" for row, cell in zip(own, told, strict=True)]
        lines.append(f"{name:{wide}} {task:{task_wide}} {' '.join(shown)}")
    if any("*" in line for line in lines[1:]):
        lines.append("* the highest, or within the 99.5 % Clopper-Pearson interval of the highest")
    reasons = dict.fromkeys(f"{row['dataset']}, {row['task']}: {row['reason']}" for row in rows if "reason" in row)
    return "\n".join([*lines, *reasons])

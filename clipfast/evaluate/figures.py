"""One page of a suite's results: the paper's figures 4, 5, 6, 8, 9, 13 and 21 as inline SVG, and links to sheets of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from clipfast.evaluate.intervals import Interval
from clipfast.evaluate.overlap import Overlap, Overlaps
from clipfast.evaluate.plots import COLOURS, GREY, Line, bars, plot, shares_plot
from clipfast.evaluate.robustness import log_log_fit
from clipfast.evaluate.suite import Row, Suite, robust, table

STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#222}pre{overflow-x:auto;"
    "font-size:12px}svg{max-width:100%}figure{margin:1em 0}.cards{display:flex;flex-wrap:wrap;gap:12px}"
    ".card{width:220px;font-size:12px}"
)


def page(rows: Sequence[Row], suite: Suite) -> str:
    """The report as HTML; a figure without what it needs says so."""
    figures = [
        ("Figure 4: templates and their ensemble against the bare class name", figure_4(rows)),
        ("Figure 5: zero-shot against the linear probe, set by set", figure_5(rows)),
        ("Figure 6: zero-shot against few-shot probes", figure_6(rows)),
        ("Figure 8: zero-shot over the linear probe on all examples", figure_8(rows)),
        ("Figure 9: zero-shot error over compute", figure_9(rows, suite)),
        ("Figure 13: robustness to natural shifts", figure_13(rows, suite)),
        ("Figure 21: what the zero-shot classifiers say of one image of each set", figure_21(rows)),
    ]
    figures += [
        (f"Bias: {name}, {model}", shares_plot(row["shares"])) for (model, name), row in _by(rows, "bias").items()
    ]  # fmt: skip
    if found := overlap_table(rows):
        sheets = [
            f'<p>{escape(model)}, {escape(name)}: <a href="{escape(row["sheet"])}">pairs to look at</a></p>'
            for (model, name), row in _by(rows, "overlap").items() if "sheet" in row
        ]  # fmt: skip
        figures.append(
            ("Overlap: near-duplicates of test images in training data", f"<pre>{escape(found)}</pre>{''.join(sheets)}")
        )
    body = "".join(f"<h2>{escape(name)}</h2><figure>{drawn}</figure>" for name, drawn in figures)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>clipfast eval</title><style>{STYLE}</style>'
        f"<h1>clipfast eval</h1><pre>{escape(table(rows))}</pre>{body}</html>\n"
    )


def _lacks(what: str) -> str:
    return f"<p>Not drawn: it needs {escape(what)}.</p>"


def _by(rows: Sequence[Row], task: str) -> dict[tuple[str, str], Row]:
    return {(row["model"], row["dataset"]): row for row in rows if row["task"] == task and "score" in row}


def figure_4(rows: Sequence[Row]) -> str:
    found = [row for row in _by(rows, "zero-shot").values() if "contextless" in row]
    models = list(dict.fromkeys(row["model"] for row in found))
    if not models:
        return _lacks("zero-shot scores")
    lines = []
    for name, which in (("templates", "score"), ("class names alone", "contextless")):
        means = [float(np.mean([row[which] for row in found if row["model"] == model])) for model in models]
        lines.append(Line(name, [(float(n + 1), mean) for n, mean in enumerate(means)], True))
    wide = max(5, 70 // len(models))  # characters of a name below the axis
    names = [name if len(name) <= wide else f"...{name[3 - wide :]}" for name in models]
    return plot(lines, "", "mean score", x_names=names)


def _pairs(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """(model, data set, zero-shot, probe)"""
    probes = _by(rows, "probe")
    return [(*key, row["score"], probes[key]["score"]) for key, row in _by(rows, "zero-shot").items() if key in probes]


def figure_5(rows: Sequence[Row]) -> str:
    pairs = _pairs(rows)
    models = list(dict.fromkeys(model for model, *_ in pairs))
    drawn = [
        f"<p>{escape(model)}</p>" + bars([(name, zero - probe) for own, name, zero, probe in pairs if own == model],
                                         "zero-shot less linear probe, points of per cent")
        for model in models
    ]  # fmt: skip
    return "".join(drawn) or _lacks("zero-shot and probe scores of the same sets")


def figure_6(rows: Sequence[Row]) -> str:
    found = _by(rows, "few-shot")
    models = list(dict.fromkeys(model for model, _ in found))
    lines = []
    for number, model in enumerate(models):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for (name, _), row in found.items() if name == model]
        curves = [{point["examples"]: float(np.mean(point["scores"])) for point in row["scores"]} for row in own]
        shots = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not shots:
            continue
        lines.append(
            Line(model, [(shot, float(np.mean([curve[shot] for curve in curves]))) for shot in shots], True, colour=colour)
        )
        zero = float(np.mean([row["zero_shot"] for row in own]))
        lines.append(Line("", [(shots[0], zero), (shots[-1], zero)], True, dashed=True, colour=colour))
    label = "examples a class of the probe; dashed: zero-shot"
    return plot(lines, label, "mean score", x_map=math.log10) if lines else _lacks("few-shot scores")


def figure_8(rows: Sequence[Row]) -> str:
    pairs = _pairs(rows)
    if not pairs:
        return _lacks("zero-shot and probe scores of the same sets")
    models = list(dict.fromkeys(model for model, *_ in pairs))
    lines = []
    for model in models:
        own = [(name, probe, zero) for which, name, zero, probe in pairs if which == model]
        lines.append(Line(model, [(probe, zero) for _, probe, zero in own], labels=[name for name, *_ in own]))
    probes, zeros = (np.array([pair[place] for pair in pairs]) for place in (3, 2))
    told = "too few points for a correlation"
    if len(pairs) > 2 and np.ptp(probes) and np.ptp(zeros):
        told = f"r = {np.corrcoef(probes, zeros)[0, 1]:.2f} (the paper: 0.82)"
    ends = [float(each([*probes, *zeros])) for each in (min, max)]
    lines.append(Line("equal", [(end, end) for end in ends], True, dashed=True, colour=GREY))
    return plot(lines, "linear probe", "zero-shot") + f"<p>{told}</p>"


def figure_9(rows: Sequence[Row], suite: Suite) -> str:
    found = _by(rows, "zero-shot")
    models = [model for model in suite.compute if any(model == own for own, _ in found)]
    sets = [name for name in dict.fromkeys(own for _, own in found) if all((model, name) in found for model in models)]
    if len(models) < 3 or not sets:
        return _lacks("zero-shot scores of three models or more whose compute the suite tells")
    errors = [1 - float(np.mean([found[model, name]["score"] for name in sets])) for model in models]
    compute = [suite.compute[model] for model in models]
    try:
        line = log_log_fit(compute, errors)
    except ValueError as error:
        return _lacks(f"other scores: {error}")
    fitted = [(x, 10 ** (line.slope * math.log10(x) + line.intercept)) for x in (min(compute), max(compute))]
    series = [
        Line("models", list(zip(compute, errors, strict=True)), labels=models),
        Line("fit", fitted, True, dashed=True, colour=GREY),
    ]
    drawn = plot(series, "GFLOPs an image", "mean zero-shot error", x_map=math.log10, y_map=math.log10)
    return f"{drawn}<p>error falls as compute to the power {line.slope:.3f}, r = {line.r:.2f}</p>"


def figure_13(rows: Sequence[Row], suite: Suite) -> str:
    found = robust(rows, suite)
    if found is None or "reason" in found:
        return _lacks("accuracies under shift: " + (found["reason"] if found else "no set of the suite is a shift of another"))
    standard = set(suite.standard)
    kinds = (("standard", True), ("others", False)) if standard else (("models", False),)
    lines = []
    for name, wanted in kinds:
        own = [model for model in found["models"] if (model["name"] in standard) == wanted]
        if own:
            points = [(model["accuracy"], model["shifted"]) for model in own]
            lines.append(Line(name, points, labels=[model["name"] for model in own]))
    band = [(x, low, high) for x, (low, high) in zip(found["grid"], found["band"], strict=True)]

    def logit(share: float) -> float:
        share = min(max(share, 1e-4), 1 - 1e-4)
        return math.log(share / (1 - share))

    ends = found["grid"][0], found["grid"][-1]
    slope, intercept = found["line"]["slope"], found["line"]["intercept"]
    promised = [(x, 1 / (1 + math.exp(-(slope * logit(x) + intercept)))) for x in ends]
    lines.append(Line("fit through the standard ones" if standard else "fit", promised, True, dashed=True, colour=COLOURS[4]))
    lines.append(Line("equal", [(x, x) for x in ends], True, dashed=True, colour=GREY))
    under = f"mean of {', '.join(found['shifts'])}"
    drawn = plot(lines, f"accuracy on {found['base']}", under, x_map=logit, y_map=logit, band=band)
    if not standard:
        drawn += "<p>The suite names no standard models: the line is through all that were measured, so being above it is no "
        drawn += "effective robustness in the paper's sense.</p>"
    return drawn


def overlap_table(rows: Sequence[Row]) -> str:
    """Of each model all sets together: Bonferroni's correction is for the number of sets."""
    told = []
    by_model: dict[str, list[Overlap]] = {}
    for (model, _), row in _by(rows, "overlap").items():
        by_model.setdefault(model, []).extend(Overlap(**own) for own in row["sets"])
    for model, sets in by_model.items():
        sets = [own._replace(interval=None if own.interval is None else Interval(*own.interval)) for own in sets]
        told.append(f"{model}\n{Overlaps(sets, 0.995).corrected().table()}")
    return "\n\n".join(told)


def figure_21(rows: Sequence[Row]) -> str:
    cards = []
    for row in _by(rows, "zero-shot").values():
        if own := row.get("example"):
            guesses = "<br>".join(
                f"{'<b>' if name in own['true'] else ''}{share:.1%} {escape(name)}{'</b>' if name in own['true'] else ''}"
                for name, share in own["guesses"]
            )
            image = f"data:image/jpeg;base64,{escape(own['jpeg'])}"
            cards.append(
                f'<div class="card"><img alt="" src="{image}"><br>{escape(row["dataset"])}, '
                f"{escape(row['model'])}: {escape(', '.join(own['true']))}<br>{guesses}</div>"
            )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else _lacks("zero-shot results")

"""One self-contained page of a suite's results, with the paper's figures 4, 5, 6, 8, 9, 13 and 21 as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from clipfast.evaluate.intervals import Interval
from clipfast.evaluate.overlap import Overlap, Overlaps
from clipfast.evaluate.robustness import log_log_fit
from clipfast.evaluate.suite import Row, Suite, robust, table

COLOURS = ("#d1495b", "#2e4057", "#66a182", "#edae49", "#7b5ea7", "#00798c", "#8d96a3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 380, 60, 50, 16, 16
STYLE = (
    "body{font:15px/1.45 sans-serif;max-width:980px;margin:2em auto;padding:0 1em;color:#222}pre{overflow-x:auto;"
    "font-size:12px}svg{max-width:100%;font:11px sans-serif}figure{margin:1em 0}.cards{display:flex;flex-wrap:wrap;gap:12px}"
    ".card{width:220px;font-size:12px}"
)


class Line(NamedTuple):
    """Points (x, y) with a name; joined or not; labels beside the points."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = False
    labels: Sequence[str] = ()
    dashed: bool = False


def plot(
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_map: Callable[[float], float] = float,
    y_map: Callable[[float], float] = float,
    band: Sequence[tuple[float, float, float]] = (),
) -> str:
    """SVG of points and lines; `x_map`, `y_map`: log10 or logit of an axis; `band`: (x, low, high)."""
    every = [(x_map(x), y_map(y)) for own in series for x, y in own.points]
    every += [(x_map(x), y_map(edge)) for x, low, high in band for edge in (low, high)]
    (x_low, x_high), (y_low, y_high) = (_ends([point[axis] for point in every]) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x_map(x) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y_map(y) - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP), 1)

    parts = [_frame(x_label, y_label)]
    for axis, values in ((0, [x for own in series for x, _ in own.points]), (1, [y for own in series for _, y in own.points])):
        for value in _ticks(values):
            x, y = at(value, series[0].points[0][1]) if axis == 0 else at(series[0].points[0][0], value)
            place = (
                f'x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle"'
                if axis == 0
                else f'x="{LEFT - 6}" y="{y + 4}" text-anchor="end"'
            )
            parts.append(f"<text {place}>{value:.3g}</text>")
    if band:
        edge = [at(x, low) for x, low, _ in band] + [at(x, high) for x, _, high in reversed(band)]
        parts.append(f'<polygon points="{_path(edge)}" fill="#8d96a3" opacity="0.25"/>')
    for number, own in enumerate(series):
        colour, places = COLOURS[number % len(COLOURS)], [at(x, y) for x, y in own.points]
        if own.joined:
            dash = ' stroke-dasharray="5 4"' if own.dashed else ""
            parts.append(f'<polyline points="{_path(places)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if not own.dashed:
            parts += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in places]
        parts += [
            f'<text x="{x + 6}" y="{y - 5}">{escape(name)}</text>' for (x, y), name in zip(places, own.labels, strict=False)
        ]
        parts.append(f'<text x="{LEFT + 8}" y="{TOP + 14 + 14 * number}" fill="{colour}">{escape(own.name)}</text>')
    return _svg(parts, HEIGHT)


def bars(values: Sequence[tuple[str, float]], label: str) -> str:
    """SVG of differences in points of per cent, the largest first."""
    ordered = sorted(values, key=lambda pair: -pair[1])
    most = max(abs(value) for _, value in ordered) or 1.0
    middle, height = WIDTH / 2 + 40, 18 * len(ordered) + 40
    parts = [f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(label)}</text>']
    for row, (name, value) in enumerate(ordered):
        length, y = abs(value) / most * 220, 18 * row + 8
        x = middle if value >= 0 else middle - length
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="13" fill="{COLOURS[0 if value >= 0 else 1]}"/>')
        parts.append(f'<text x="4" y="{y + 11}">{escape(name)}</text>')
        parts.append(f'<text x="{middle + (length + 4 if value >= 0 else 4):.1f}" y="{y + 11}">{100 * value:+.1f}</text>')
    return _svg(parts, height)


def shares_plot(shares: Sequence[Mapping[str, Any]]) -> str:
    """SVG of the bias probe: for each group of labels and value of an attribute a bar for each design, with its interval."""
    designs = list(dict.fromkeys(own["design"] for own in shares))
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for own in shares:
        rows.setdefault((own["group"], own["attribute"], own["value"]), {})[own["design"]] = own
    left, bar, gap = 220, 9, 8
    most = max(own["interval"][1] for own in shares) or 1.0
    scale, y, group, parts = (WIDTH - left - 70) / most, 14, "", list[str]()
    for number, design in enumerate(designs):
        parts.append(f'<rect x="{left + 150 * number}" y="{y - 9}" width="10" height="10" fill="{COLOURS[number % 7]}"/>')
        parts.append(f'<text x="{left + 150 * number + 15}" y="{y}">{escape(design[:22])}</text>')
    for (own_group, attribute, value), found in rows.items():
        if own_group != group:
            group, y = own_group, y + 26
            parts.append(f'<text x="4" y="{y}" font-weight="bold">{escape(group)}</text>')
            y += 8
        images = next(iter(found.values()))["images"]
        name = "all images" if attribute == value == "all" else f"{attribute} {value}"
        middle = y + bar * len(designs) / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(name[:28])} ({images})</text>')
        for number, design in enumerate(designs):
            if design not in found:
                continue
            share, (low, high), top = found[design]["share"], found[design]["interval"], y + bar * number
            colour, centre = COLOURS[number % 7], top + (bar - 1) / 2
            parts.append(f'<rect x="{left}" y="{top}" width="{share * scale:.1f}" height="{bar - 1}" fill="{colour}"/>')
            ends = f'x1="{left + low * scale:.1f}" x2="{left + high * scale:.1f}"'
            parts.append(f'<line {ends} y1="{centre}" y2="{centre}" stroke="#222" stroke-width="1"/>')
            parts.append(f'<text x="{left + high * scale + 5:.1f}" y="{top + bar - 1}" font-size="9">{share:.1%}</text>')
        y += bar * len(designs) + gap
    return _svg(parts, y + 6)


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{"".join(parts)}</svg>'


def _frame(x_label: str, y_label: str) -> str:
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    box = f'<rect x="{LEFT}" y="{TOP}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>'
    across = f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
    up = f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    return box + across + up


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(values: Sequence[float]) -> list[float]:
    """The lowest, the highest, and what was measured between, at most five."""
    different = sorted(set(values))
    return [different[place] for place in sorted(set(np.linspace(0, len(different) - 1, 5).round().astype(int).tolist()))]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


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
        figures.append(("Overlap: near-duplicates of test images in training data", f"<pre>{escape(found)}</pre>"))
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
        labels = models if which == "score" else ()
        lines.append(Line(name, [(float(n + 1), mean) for n, mean in enumerate(means)], True, labels))
    return plot(lines, "model", "mean score")


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
    for model in models:
        own = [row for (name, _), row in found.items() if name == model]
        curves = [{point["examples"]: float(np.mean(point["scores"])) for point in row["scores"]} for row in own]
        shots = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not shots:
            continue
        lines.append(
            Line(f"{model}, probe", [(shot, float(np.mean([curve[shot] for curve in curves]))) for shot in shots], True)
        )
        zero = float(np.mean([row["zero_shot"] for row in own]))
        lines.append(Line(f"{model}, zero-shot", [(shots[0], zero), (shots[-1], zero)], True, dashed=True))
    return plot(lines, "examples a class", "mean score", x_map=math.log10) if lines else _lacks("few-shot scores")


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
    series = [Line("models", list(zip(compute, errors, strict=True)), labels=models), Line("fit", fitted, True, dashed=True)]
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

    under = f"mean of {', '.join(found['shifts'])}"
    return plot(lines, f"accuracy on {found['base']}", under, x_map=logit, y_map=logit, band=band)


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
            cards.append(
                f'<div class="card"><img alt="" src="data:image/jpeg;base64,{own["jpeg"]}"><br>{escape(row["dataset"])}, '
                f"{escape(row['model'])}: {escape(', '.join(own['true']))}<br>{guesses}</div>"
            )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else _lacks("zero-shot results")

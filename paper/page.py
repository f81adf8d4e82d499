"""paper.html: for each figure of the paper its counterpart, what the paper found, what these data show, and if they agree."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from clipfast.evaluate.plots import COLOURS, Line, bars, plot
from demo.report import STYLE
from paper.models import MAIN, OBJECTIVES
from paper.verdicts import AGREES, NOT, Curve, Verdict

MORE = """
.badge { border-radius: 4px; padding: .1rem .5rem; font-size: .85rem; color: #fff; background: #8a6d1a; white-space: nowrap }
.badge.yes { background: #1d7f49 } .badge.no { background: #a8321e } td, th { white-space: normal }
svg { max-width: 46rem; width: 100%; background: #fff; font: 11px sans-serif; border: 1px solid var(--line) }
.cards { display: flex; flex-wrap: wrap; gap: 14px; font-size: .8rem } .cards img { width: 96px } .cards div { width: 150px }
"""
KIND = {AGREES: "yes", NOT: "no"}


def image(picture: Image.Image, small: bool = True) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    told = base64.b64encode(file.getvalue()).decode()
    return f'<img{" class=small" if small else ""} alt="" src="data:image/png;base64,{told}">'


def badge(agrees: str) -> str:
    return f'<span class="badge {KIND.get(agrees, "")}">{escape(agrees)}</span>'


def summary(verdicts: Sequence[Verdict]) -> str:
    rows = "".join(
        f"<tr><td>{escape(own.figure)}<td style='text-align:left'>{escape(own.paper)}<td style='text-align:left'>"
        f"{escape(own.here)}<td>{badge(own.agrees)}</tr>"
        for own in verdicts
    )
    return f"<table><tr><th>figure<th>the paper<th>these data<th></tr>{rows}</table>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{escape(cell)}" for cell in head)}</tr>{body}</table></div>'


def learning(curves: dict[str, list[Curve]]) -> str:
    """A line for each seed."""
    lines = [
        Line(name if seed == 0 else "", [(images, sum(hits) / len(hits)) for images, hits in sorted(own.items())], True,
             colour=COLOURS[place], dashed=seed > 0)
        for place, name in enumerate(OBJECTIVES) for seed, own in enumerate(curves[name])
    ]  # fmt: skip
    return plot(lines, "images seen", "named rightly", x_map=math.log10)


def pairs(ours: dict[str, float], other: dict[str, float], x: str, y: str) -> str:
    names = [name for name in ours if name in other]
    return plot([Line("sets", [(other[name], ours[name]) for name in names], labels=names)], x, y)


def differences(ours: dict[str, float], other: dict[str, float], label: str) -> str:
    return bars([(name, ours[name] - other[name]) for name in ours if name in other], label)


def few(curves: dict[str, dict[float, float]], zero: dict[str, float]) -> str:
    names = [name for name in curves if name in zero]
    shots = sorted(set.intersection(*(set(curves[name]) for name in names)))
    mean = [(shot, sum(curves[name][shot] for name in names) / len(names)) for shot in shots]
    level = sum(zero[name] for name in names) / len(names)
    lines = [Line("probe", mean, True), Line("zero-shot", [(shots[0], level), (shots[-1], level)], True, dashed=True)]
    return plot(lines, "examples a class", "mean accuracy", x_map=math.log10)


def scaled(compute: dict[str, float], errors: dict[str, list[dict[str, float]]]) -> str:
    """The mean of each size's seeds, and every run beside it."""
    means = {name: [sum(own.values()) / len(own) for own in each] for name, each in errors.items()}
    points = [(compute[name] / 1e6, sum(own) / len(own)) for name, own in means.items()]
    lines = [Line("models", points, True, [name if name != MAIN else "width 16" for name in means])]
    if any(len(own) > 1 for own in means.values()):
        lines.append(Line("each run", [(compute[name] / 1e6, value) for name, own in means.items() for value in own]))
    return plot(lines, "MFLOPs an image", "mean zero-shot error", x_map=math.log10, y_map=math.log10)


def robustness(found: dict[str, Any]) -> str:
    def logit(share: float) -> float:
        share = min(max(share, 1e-3), 1 - 1e-3)
        return math.log(share / (1 - share))

    told = found["robustness"]
    lines = []
    for kind in ("standard", "zero-shot", "adapted"):
        own = [model for model in told["models"] if found[model["name"]]["kind"] == kind]
        labels = [model["name"] for model in own] if kind != "standard" else ()
        lines.append(Line(kind, [(model["accuracy"], model["shifted"]) for model in own], labels=labels))
    band = [(x, low, high) for x, (low, high) in zip(told["grid"], told["band"], strict=True)]
    return plot(
        [own for own in lines if own.points],
        "accuracy in the base style",
        "in the shifted style",
        x_map=logit,
        y_map=logit,
        band=band,
    )


def cards(examples: Sequence[dict[str, Any]], pictures: Sequence[Image.Image]) -> str:
    parts = []
    for own, picture in zip(examples, pictures, strict=True):
        lines = "<br>".join(
            f"{'<b>' if n == own['true'] else ''}{p:.0%} {escape(n)}{'</b>' if n == own['true'] else ''}"
            for n, p in own["guesses"]
        )
        parts.append(f"<div>{image(picture)}{escape(own['set'])}: {escape(own['true'])}<br>{lines}</div>")
    return f'<div class="cards">{"".join(parts)}</div>'


def page(intro: str, verdicts: Sequence[Verdict], sections: Sequence[tuple[str, str, str]], foot: str) -> str:
    """sections: (figure of a verdict or "", title, HTML)."""
    parts = []
    for figure, title, body in sections:
        told = "".join(
            f"<p>The paper: {escape(own.paper)}.<br>Here: {escape(own.here)}. {badge(own.agrees)}</p>"
            for own in verdicts if own.figure == figure
        )  # fmt: skip
        parts.append(f"<h2>{escape(title)}</h2>{told}{body}")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>clipfast: the paper’s figures on drawings</title><style>{STYLE}{MORE}</style>"
        f"<h1>The figures of the CLIP paper, on drawings and their names</h1>{intro}{summary(verdicts)}"
        f"{''.join(parts)}<footer>{foot}</footer></html>\n"
    )

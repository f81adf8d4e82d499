"""Plots as SVG of our own: points and lines with round ticks, names beside the points where there is room, a legend above."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

COLOURS = ("#d1495b", "#2e4057", "#66a182", "#edae49", "#7b5ea7", "#00798c", "#8d96a3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 380, 60, 50, 12, 16
CHARACTER = 6.4  # pixels across, about, at 11 pixels of height
GREY = "#999"


class Line(NamedTuple):
    """Points (x, y) with a name; joined or not; labels beside the points. colour: by default that of its place."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = False
    labels: Sequence[str] = ()
    dashed: bool = False
    colour: str = ""


class _Axis:
    """Values -> pixels between `start` and `end`."""

    def __init__(self, values: Sequence[float], map_: Callable[[float], float], start: float, end: float) -> None:
        self.map, self.start, self.end = map_, start, end
        low, high = min(map(map_, values)), max(map(map_, values))
        whole = sorted(set(values)) if all(value == int(value) for value in values) else []
        self.whole = whole if len(whole) <= 8 else []
        margin = 0.06 * (high - low) or 0.5
        self.low, self.high, self.range = low - margin, high + margin, (min(values), max(values))

    def __call__(self, value: float) -> float:
        share = (self.map(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, room: float) -> list[float]:
        """Round values, the roundest first, as far apart as `room` pixels; whole numbers that are there as they are."""
        chosen = list[float]()
        if self.whole and all(self(b) - self(a) >= room for a, b in zip(self.whole, self.whole[1:], strict=False)):
            return self.whole
        for value in self._round():
            if self.low <= self.map(value) <= self.high and all(abs(self(value) - self(own)) >= room for own in chosen):
                chosen.append(value)
        return chosen

    def _round(self) -> list[float]:
        low, high = self.range
        if self.map is float:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next((own for own in (5, 2) if (self.high - self.low) / (own * step) >= 3), 1)
            return [round(n * step, 10) for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        if low <= 0:
            return [low, high]
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**power for digit in (1, 5, 2, 3, 7, 4, 6, 8, 9) for power in powers]
        shares = [0.5, 0.9, 0.1, 0.99, 0.01, *found, 0.95, 0.98, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85] if high <= 1 else found
        return [value for value in shares if high > 1 or value < 1]


def plot(
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_map: Callable[[float], float] = float,
    y_map: Callable[[float], float] = float,
    band: Sequence[tuple[float, float, float]] = (),
    x_names: Sequence[str] = (),
) -> str:
    """SVG of points and lines; `x_map`, `y_map`: log10 or logit of an axis; `band`: (x, low, high); `x_names`: of 1, 2, ..."""
    legend, top = _legend(series)
    points = [point for own in series for point in own.points]
    edges = [(x, edge) for x, low, high in band for edge in (low, high)]
    across = _Axis([x for x, _ in points + edges], x_map, LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in points + edges], y_map, HEIGHT - BOTTOM, top)
    parts = [legend, _frame(x_label, y_label, top)]
    for value in [float(n + 1) for n in range(len(x_names))] or across.ticks(46):
        name = x_names[int(value) - 1] if x_names else f"{value:.4g}"
        parts.append(f'<text x="{across(value)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(name)}</text>')
        parts.append(_line(across(value), top, across(value), HEIGHT - BOTTOM))
    for value in up.ticks(24):
        parts.append(f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        parts.append(_line(LEFT, up(value), WIDTH - RIGHT, up(value)))
    if band:
        edge = [(across(x), up(low)) for x, low, _ in band] + [(across(x), up(high)) for x, _, high in reversed(band)]
        parts.append(f'<polygon points="{_path(edge)}" fill="#8d96a3" opacity="0.25"/>')
    taken = [(across(x) - 4, up(y) - 4, across(x) + 4, up(y) + 4) for own in series if not own.dashed for x, y in own.points]
    for number, own in enumerate(series):
        colour, places = _colour(own, number), [(across(x), up(y)) for x, y in own.points]
        if own.joined:
            dash = ' stroke-dasharray="5 4"' if own.dashed else ""
            parts.append(f'<polyline points="{_path(places)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for (x, y), name in zip(places, [*own.labels, *[""] * len(places)], strict=False):
            if not own.dashed:
                told = f"<title>{escape(name)}</title>" if name else ""
                parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}">{told}</circle>')
            parts += _label(name, x, y, top, taken)
    return svg(parts, HEIGHT)


def _colour(own: Line, number: int) -> str:
    return own.colour or COLOURS[number % len(COLOURS)]


def _legend(series: Sequence[Line]) -> tuple[str, int]:
    """Names in rows above the frame, and where the frame begins."""
    parts, x, y = list[str](), float(LEFT), TOP + 2
    for number, own in enumerate(series):
        if not own.name or len(series) == 1:
            continue
        name = own.name if len(own.name) <= 40 else f"...{own.name[-37:]}"
        wide = 24 + CHARACTER * len(name) + 12
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + 15
        dash = ' stroke-dasharray="4 3"' if own.dashed else ""
        stroke = f'stroke="{_colour(own, number)}"'
        if own.joined:
            parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" {stroke} stroke-width="2"{dash}/>')
        else:
            parts.append(f'<circle cx="{x + 9}" cy="{y - 4}" r="4" fill="{_colour(own, number)}"/>')
        parts.append(f'<text x="{x + 23}" y="{y}">{escape(name)}</text>')
        x += wide
    return "".join(parts), y + 8 if parts else TOP


def _label(name: str, x: float, y: float, top: float, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """The name beside its point, on the side where there is room; none where there is none: it shows under the pointer."""
    name = name if len(name) <= 24 else f"...{name[-21:]}"
    wide = CHARACTER * len(name)
    sides = [(x + 6, y - 4), (x - 6 - wide, y - 4), (x + 6, y + 12), (x - 6 - wide, y + 12), (x - wide / 2, y - 8)]
    for left, base in sides if name else ():
        box = (left, base - 9, left + wide, base + 1)
        inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= top and box[3] <= HEIGHT - BOTTOM
        if inside and not any(_meet(box, own) for own in taken):
            taken.append(box)
            return [f'<text x="{left:.1f}" y="{base:.1f}">{escape(name)}</text>']
    return []


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def bars(values: Sequence[tuple[str, float]], label: str) -> str:
    """SVG of differences in points of per cent, the largest first."""
    ordered = sorted(values, key=lambda pair: -pair[1])
    most = max(abs(value) for _, value in ordered) or 1.0
    middle, height = WIDTH / 2 + 80, 18 * len(ordered) + 40
    parts = [f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(label)}</text>']
    for row, (name, value) in enumerate(ordered):
        length, y = abs(value) / most * 190, 18 * row + 8
        x = middle if value >= 0 else middle - length
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="13" fill="{COLOURS[0 if value >= 0 else 1]}"/>')
        parts.append(f'<text x="4" y="{y + 11}">{escape(name[:26])}</text>')
        place = f'x="{x - 4:.1f}" text-anchor="end"' if value < 0 else f'x="{x + length + 4:.1f}"'
        parts.append(f'<text {place} y="{y + 11}">{100 * value:+.1f}</text>')
    return svg(parts, height)


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
    return svg(parts, y + 6)


def svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" font-size="11" '
        f'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#eee"/>'


def _frame(x_label: str, y_label: str, top: float) -> str:
    size = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - top - BOTTOM}"'
    box = f'<rect x="{LEFT}" y="{top}" {size} fill="none" stroke="#bbb"/>'
    across = f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
    middle = (HEIGHT + top - BOTTOM) / 2
    up = f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    return box + across + up


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)

"""The demo's report: a table for the terminal, figures, and one HTML page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clipfast.files import replacing
from demo.emoji import Drawings

RIGHT, OTHER, DARK, GREY = "#7fd1a0", "#f6c69a", "#1d7f49", "#6b7280"
LINES = ("#2563a8", "#c2571a")


class Shown(NamedTuple):
    """What the figures show of the drawings of the unseen style, concepts seen and unseen together."""

    drawings: Drawings
    logits: Tensor  # [n, classes], the softmax of which are the probabilities of the names
    queries: dict[str, Tensor]  # text -> [n], its similarity to each drawing


def table(results: dict[str, Any]) -> str:
    """The accuracies as lines for a terminal."""
    rows = [f"{'drawings of the unseen style':32}{'drawings':>9}{'names':>7}{'clipfast':>15}{'pixels':>15}{'chance':>15}"]
    rows.append(f"{'':48}" + f"{'top-1 / top-5':>15}" * 3)
    for row in results["accuracy"]:
        shares = "".join(f"{_pair(row, who):>15}" for who in ("", "pixels_", "chance_"))
        rows.append(f"{_what(row):32}{row['drawings']:9,}{row['names']:7,}{shares}")
    rows += [verdict(results)] if verdict(results) else []
    return "\n".join([*rows, "", _summary(results), results["settings"]["told"]])


def verdict(results: dict[str, Any]) -> str:
    """What is to be said when the model names seen concepts no better than the nearest pixels do; else nothing."""
    row = results["accuracy"][0]
    behind = [
        f"top-{k} {row[f'top{k}']:.1%} for {row[f'pixels_top{k}']:.1%}"
        for k in (1, 5)
        if row[f"top{k}"] <= row[f"pixels_top{k}"]
    ]
    if not behind:
        return ""
    told = f"NOT better than the nearest pixels on seen concepts ({', '.join(behind)})"
    return f"{told}: {results['steps']:,} steps were too few; train longer (python -m demo --seconds ...)"


def _what(row: dict[str, Any]) -> str:
    return f"{row['concepts']} concepts" + ("" if row["flags"] else ", without flags")


def _pair(row: dict[str, Any], who: str) -> str:
    digits = 2 if who == "chance_" else 1
    return f"{row[f'{who}top1']:.{digits}%} / {row[f'{who}top5']:.{digits}%}".replace("% /", " /")


def _summary(results: dict[str, Any]) -> str:
    drawings, weights = results["training_drawings"], results["weights"]
    speed = f"{results['steps']:,} steps in {results['seconds']:.0f} s ({results['pairs_per_second']:,.0f} pairs/s)"
    return f"{weights / 1e6:.1f} million weights, {drawings:,} training drawings, {speed} on {results['versions']['device']}"


def write(
    out: Path,
    results: dict[str, Any],
    losses: Sequence[tuple[float, float]],
    accuracies: Sequence[tuple[float, float, float]],
    shown: Shown,
    attribution: str,
) -> None:
    """report.html and its PNGs into `out`; losses: (seconds, loss), accuracies: (seconds, top-1, top-5)."""
    unseen = torch.tensor([concept.unseen for concept in shown.drawings.concepts])[shown.drawings.concept]
    figures = {
        "learning_curve": learning_curve(losses, accuracies, results["accuracy"][0]),
        "named_seen": sheet(shown, ~unseen, torch.arange(len(shown.drawings.concepts)), 12),
        "named_unseen": sheet(shown, unseen, _unseen_names(shown.drawings), 6),
        "retrieval": retrieved(shown),
        "confusion": confusion(shown, ~unseen),
    }
    for name, figure in figures.items():
        content = BytesIO()
        figure.savefig(content, format="png", dpi=150)
        with replacing(out / f"{name}.png") as file:
            file.write(content.getvalue())
    with replacing(out / "report.html") as file:
        file.write(_page(results, attribution).encode())


def _unseen_names(drawings: Drawings) -> Tensor:
    return torch.tensor([index for index, concept in enumerate(drawings.concepts) if concept.unseen])


# --- figures


def _bare(axes: Axes) -> Axes:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _show(axes: Axes, rgba: Tensor) -> None:
    """A drawing, uint8 [64, 64, 4] with colours times alpha, on white."""
    planes = rgba.numpy().astype(np.int32)
    _bare(axes).imshow((planes[..., :3] + 255 - planes[..., 3:]).clip(0, 255).astype(np.uint8), interpolation="antialiased")


def learning_curve(
    losses: Sequence[tuple[float, float]], accuracies: Sequence[tuple[float, float, float]], row: dict[str, Any]
) -> Figure:
    """The loss, and the accuracies on the unseen style beside the pixel baseline's (`row` of the accuracy table)."""
    figure = Figure((11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    seconds, values = np.array(losses).T
    window = max(1, len(values) // 60)
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    left.plot(seconds, values, color=LINES[0], alpha=0.2, linewidth=0.8)
    left.plot(seconds[window - 1 :], smooth, color=LINES[0], linewidth=2)
    left.set(title="Contrastive loss of a batch (line: running mean)", xlabel="seconds of training", ylim=(0, None))
    seconds, *shares = np.array(accuracies).T
    for k, color, share in zip((1, 5), LINES, shares, strict=True):
        right.plot(seconds, 100 * share, color=color, marker=".", linewidth=2, label=f"clipfast, top-{k}")
        right.axhline(100 * row[f"pixels_top{k}"], color=color, linestyle=":", label=f"nearest pixels, top-{k}")
    right.set(title="Unseen style, seen concepts: named right (%)", xlabel="seconds of training", ylim=(0, None))
    figure.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=4)
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, None)
    return figure


def sheet(shown: Shown, chosen: Tensor, names: Tensor, count: int, columns: int = 3) -> Figure:
    """Drawings of `chosen`, bool [n], with the five likeliest of `names`, class indices, and their probabilities.

    `count` of them, drawn at random with a fixed seed, not picked by hand.
    """
    pool = chosen.nonzero().flatten()
    rows = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:count]].tolist()
    lines = -(-len(rows) // columns)
    figure = Figure((4.3 * columns, 1.65 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # type: ignore[call-arg, union-attr]
    grid = figure.subplots(lines, 2 * columns, squeeze=False, width_ratios=[1, 2.1] * columns).reshape(-1, 2)
    for axes in grid.flat:
        axes.set_axis_off()
    for (picture, bars), row in zip(grid, rows, strict=False):
        _show(picture, shown.drawings.rgba[row])
        target = int(shown.drawings.concept[row])
        _bars(bars, shown, shown.logits[row, names].softmax(0), names, target)
        picture.set_axis_on()
        bars.set_axis_on()
    return figure


def _bars(axes: Axes, shown: Shown, probabilities: Tensor, names: Tensor, target: int) -> None:
    """The top five names; the title is the right one, with its rank."""
    at = int((names == target).nonzero())
    rank = int((probabilities > probabilities[at]).sum()) + 1
    top, places = probabilities.topk(min(5, len(names)))
    best, classes = top.tolist(), names[places].tolist()
    axes.barh(range(len(classes)), best, color=[RIGHT if index == target else OTHER for index in classes], height=0.86)
    for line, (index, probability) in enumerate(zip(classes, best, strict=True)):
        weight = "bold" if index == target else "normal"
        axes.text(0.02, line, _short(shown.drawings.concepts[index].label, 27), va="center", fontsize=8.5, weight=weight)
        axes.text(1, line, f"{probability:.0%}", va="center", ha="right", fontsize=8.5, weight=weight)
    _bare(axes).set(xlim=(0, 1), ylim=(4.5, -0.5))
    axes.set_title(_short(shown.drawings.concepts[target].label, 24), loc="left", fontsize=9.5, weight="bold")
    axes.set_title(f"rank {rank:,}", loc="right", fontsize=9, color=DARK if rank == 1 else GREY)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def retrieved(shown: Shown, count: int = 10) -> Figure:
    """For each query the drawings of the unseen style that come nearest, best first."""
    count = min(count, len(shown.drawings.rgba))
    lines = len(shown.queries)
    figure = Figure((11, 0.92 * lines), layout="constrained")
    grid = figure.subplots(lines, count + 1, squeeze=False, width_ratios=[2.6] + [1] * count)
    for (text, *pictures), (query, scores) in zip(grid, shown.queries.items(), strict=True):
        _bare(text).text(1, 0.5, f"“{query}”", ha="right", va="center", fontsize=11, transform=text.transAxes)
        for axes, row in zip(pictures, scores.topk(count).indices.tolist(), strict=True):
            _show(axes, shown.drawings.rgba[row])
    return figure


def confusion(shown: Shown, chosen: Tensor) -> Figure:
    """Of the drawings of `chosen`, bool [n], in each group: the share whose likeliest name is of each group."""
    concepts = shown.drawings.concepts
    labels = list(dict.fromkeys(concept.group for concept in concepts))  # in Unicode's order
    group = torch.tensor([labels.index(concept.group) for concept in concepts])
    truth, named = group[shown.drawings.concept[chosen]], group[shown.logits[chosen].argmax(1)]
    counts = torch.zeros(len(labels), len(labels)).index_put_((truth, named), torch.ones(len(truth)), accumulate=True)
    totals = counts.sum(1, keepdim=True)
    shares = (counts / totals.clamp(min=1)).numpy()
    figure = Figure((8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for line, column in np.ndindex(shares.shape):
        share = shares[line, column]
        if share >= 0.005:
            axes.text(column, line, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set_yticks(range(len(labels)), [f"{name} ({int(n)})" for name, n in zip(labels, totals, strict=True)])
    axes.set(xlabel="group of the likeliest name", ylabel="group of the drawing")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


# --- page

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5d6470; --line: #d8dbe0; --paper: #fff; --best: #1d7f49 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #a0a6b0; --line: #3b4048; --paper: #17191d; --best: #5cc58c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin-bottom: .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { max-width: 52rem; margin: .3rem 0 .8rem } .soft, footer { color: var(--soft) } footer { font-size: .85rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th { font-weight: 600; font-size: .9rem }
td b { color: var(--best) } .scroll { overflow-x: auto }
img { display: block; width: 100%; box-sizing: border-box; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .6rem }
img.small { max-width: 46rem } pre { white-space: pre-wrap; font-size: .8rem; line-height: 1.4 }
"""


def _page(results: dict[str, Any], attribution: str) -> str:
    seen, unseen = results["accuracy"][0], next(row for row in results["accuracy"] if row["concepts"] == "unseen")
    found = results["retrieval"]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>clipfast: emoji in a style never seen</title><style>{STYLE}</style>
<h1>A CLIP names drawings in a style that it never saw</h1>
<p class="soft">{escape(_summary(results))}; {escape(results["settings"]["told"])}</p>
<p>It learned from seven vendors’ drawings of {results["training_concepts"]:,} emoji and their names in words. Here it meets an
eighth vendor’s (Microsoft’s Fluent): of concepts whose other drawings it learned, and of concepts that no training drawing
shows. It picks a name among all {seen["names"]:,}, or, for the unseen concepts, among their {unseen["names"]:,}.</p>
<div class="scroll"><table><tr><th>drawings of the unseen style<th>drawings<th>names<th>clipfast<br>top-1 / top-5
<th>nearest pixels<br>top-1 / top-5<th>chance<br>top-1 / top-5</tr>{"".join(map(_row, results["accuracy"]))}</table></div>
{f"<p><b>{escape(verdict(results))}</b></p>" if verdict(results) else ""}
<p class="soft">Nearest pixels: the names of the training drawings that come nearest in 24 × 24 pixels, without any learning; it
has no drawing of an unseen concept and so can name none. Size and resolution of the model were chosen among a few by these
same figures, so they flatter it slightly; white as the background by two training vendors’ drawings that were left out.</p>
<h2>Learning</h2><img src="learning_curve.png" alt="Loss and accuracy over the seconds of training">
<h2>Concepts seen in other styles</h2>
<p>Drawn at random, with the five likeliest of {seen["names"]:,} names. Above each the right name and its rank; green is
right.</p><img src="named_seen.png" alt="Drawings with the probabilities of five names each">
<h2>Concepts never seen</h2>
<p>No training drawing shows these; the names are the {unseen["names"]:,} of the unseen concepts.</p>
<img src="named_unseen.png" alt="Drawings of unseen concepts with the probabilities of five names each">
<h2>From text to drawings</h2>
<p>The nearest of the {seen["drawings"] + unseen["drawings"]:,} drawings, best first. Asked for by its own name, a drawing comes
first for {found["text_to_image_R@1"]:.0%} of the names, among the first five for {found["text_to_image_R@5"]:.0%}, among the
first ten for {found["text_to_image_R@10"]:.0%}.</p><img src="retrieval.png" alt="Queries and the drawings found">
<h2>Which group is taken for which</h2>
<p>Seen concepts; each line adds up to 100 % (below 0.5 % left blank), in brackets the drawings.</p>
<img class="small" src="confusion.png" alt="Share of drawings of each group by the group of the likeliest name">
<footer><h2>Sources</h2><pre>{escape(attribution)}</pre>
<p>{escape(", ".join(f"{name} {value}" for name, value in results["versions"].items()))}</p></footer></html>
"""


def _row(row: dict[str, Any]) -> str:
    cells = f"<td>{_what(row)}<td>{row['drawings']:,}<td>{row['names']:,}<td><b>{_pair(row, '')}</b>"
    return f"<tr>{cells}<td>{_pair(row, 'pixels_')}<td>{_pair(row, 'chance_')}</tr>"

"""Charts of a record: ``python -m bench.plot RECORD.json OUT`` writes losses.png, roofline.png, towers.png, end_to_end.png."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OURS_TOO = "#d1495b", "#e9a6ae"  # the automatic choice; ours in another form
RIVALS = ["#2e4057", "#66a182", "#edae49", "#8d96a3", "#7b5ea7", "#00798c"]
MARKS = "os^Dv<>P*Xdp"  # as many as there may be ops: colours come again, with another mark
Record = dict[str, Any]


def label(record: Record) -> str:
    """What the figures were measured on."""
    m = record["machine"]
    on = f"driver {m['driver']}" if m["driver"] else f"{m['instructions']}, {m['threads']} threads"
    return f"{m['device']}, {on}, torch {m['versions']['torch']}, commit {m['commit'][:10]}"


def finish(figure: Figure, record: Record, path: Path) -> Path:
    figure.text(0.01, 0.01, label(record), fontsize=8, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def clean(axes: Axes, name: str, **labels: str) -> None:
    axes.set_title(name, loc="left", fontweight="bold")
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)


def losses(record: Record, path: Path) -> Path | None:
    """Time and memory against N, both logarithmic, of every contender of each loss; None without such rows."""
    rows = [row for row in record["rows"] if row.get("series")]
    if not rows:
        return None
    figure, grid = plt.subplots(len(rows), 2, figsize=(11, 4.2 * len(rows)), squeeze=False)
    for row, (time, memory) in zip(rows, grid, strict=True):
        colours = dict(zip((n for n in row["series"] if n != "ours"), RIVALS, strict=False)) | {"ours": OURS}
        for axes, what, unit in ((time, "ms", 1.0), (memory, "bytes", 1e6)):
            for name, points in row["series"].items():
                shown = [(point["N"], point[what] / unit) for point in points if point[what]]
                if shown:
                    width = 2.6 if name == "ours" else 1.5
                    axes.loglog(*zip(*shown, strict=True), "o-", base=2, label=name, color=colours[name], lw=width, ms=4)
                    axes.annotate(f"{shown[-1][1]:,.0f}", shown[-1], (5, -3), textcoords="offset points", fontsize=8)
            axes.grid(alpha=0.25)
            axes.set_yscale("log", base=10)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            axes.margins(x=0.12)
        loss, at = row["name"].removeprefix("growth "), f"pairs N, D = {row['D']}"
        time_grows, memory_grows = (f"{loss}: ours grows as N^{row['exponents'][k]:.2f}" for k in ("ms", "bytes"))
        clean(time, time_grows, xlabel=at, ylabel="ms, forward + backward")
        clean(memory, memory_grows, xlabel=at, ylabel="peak memory, MB")
        time.legend(frameon=False)
    return finish(figure, record, path)


def roofline(record: Record, path: Path) -> Path | None:
    """What each op reaches under the two ceilings of the run, against its arithmetic intensity; None without such rows."""
    rows = [row for row in record["rows"] if row["roofline"] and row["roofline"]["bytes"]]
    if not rows:
        return None
    roof, figure = record["roofline"], plt.figure(figsize=(11, 6))
    axes, ridge = figure.add_subplot(), roof["flops_per_s"] / roof["bytes_per_s"]
    points = [(r["roofline"]["flops"] / r["roofline"]["bytes"], r["roofline"]["flops"] / r["ms"]["median"] / 1e6) for r in rows]
    low, high = min(ridge / 10, *(x for x, _ in points)) / 1.5, max(ridge * 10, *(x for x, _ in points)) * 1.5
    ceiling = [low * roof["bytes_per_s"] / 1e9, roof["flops_per_s"] / 1e9, roof["flops_per_s"] / 1e9]
    axes.loglog([low, ridge, high], ceiling, color="#333333", lw=2)
    at, copy = low * (ridge / low) ** 0.5, f"copy {roof['bytes_per_s'] / 1e9:,.0f} GB/s"
    axes.text(0.85 * at, at * roof["bytes_per_s"] / 1e9, copy, ha="right", fontsize=9)
    axes.text(high, ceiling[1] * 1.1, f"matrix product {roof['flops_per_s'] / 1e12:.3g} TFLOP/s", ha="right", fontsize=9)
    groups = list(dict.fromkeys(row.get("op", row["group"]) for row in rows))
    for i, group in enumerate(groups):
        mine = [point for row, point in zip(rows, points, strict=True) if row.get("op", row["group"]) == group]
        shares = [row["roofline"]["share"] for row in rows if row.get("op", row["group"]) == group]
        reached = f"{group.replace('_', ' ')}: {min(shares):.0%} to {max(shares):.0%}"
        colour = [OURS, *RIVALS][i % 7]
        axes.loglog(*zip(*mine, strict=True), MARKS[i % len(MARKS)], color=colour, label=reached, ms=7, alpha=0.85)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="share of the roofline", loc="upper left", bbox_to_anchor=(1.01, 1))
    clean(axes, "Ours under the roofline", xlabel="FLOPs per byte that must move", ylabel="GFLOP/s")
    return finish(figure, record, path)


def bars(record: Record, groups: Sequence[str], name: str, path: Path) -> Path | None:
    """Throughput of ours and of the rivals, each row to the scale of its fastest; None without such rows."""
    rows = [row for row in record["rows"] if row["group"] in groups and row["items_per_s"]]
    if not rows:
        return None
    figure = plt.figure(figsize=(9, 1.2 + sum(0.34 * (2 + len(row["rivals"])) for row in rows)))
    axes, at, ticks = figure.add_subplot(), 0.0, []
    names = dict.fromkeys(n for row in rows for n in row["rivals"] if not n.startswith("our "))
    colours = {name: RIVALS[i % len(RIVALS)] for i, name in enumerate(names)} | {"clipfast": OURS}
    for row in rows:
        ours, ms = row["items_per_s"], row["ms"]["median"]
        rates = {n: ours * ms / r["ms"]["median"] for n, r in row["rivals"].items() if "absent" not in r}
        ticks.append((at + len(rates) / 2, row["name"]))
        for i, (who, rate) in enumerate({"clipfast": ours, **rates}.items()):
            share = rate / max(ours, *rates.values(), 0)
            axes.barh(at, share, color=colours.get(who, OURS_TOO), height=0.92)
            times = "" if i == 0 else f", ours {row['rivals'][who]['speedup']:.2f} ×"
            axes.text(share + 0.01, at, f"{who} {rate:,.0f}/s{times}", va="center", fontsize=8)
            at += 1
        at += 0.8
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    clean(axes, name, xlabel="samples per second, each group to the scale of its fastest")
    return finish(figure, record, path)


def charts(record: Record, out: Path) -> list[Path]:
    """Every chart that the record has rows for."""
    out.mkdir(parents=True, exist_ok=True)
    made = [
        losses(record, out / "losses.png"),
        roofline(record, out / "roofline.png"),
        bars(record, ("towers", "training"), "Towers and training steps", out / "towers.png"),
        bars(record, ("end_to_end", "text_and_images"), "From files to vectors, and its parts", out / "end_to_end.png"),
    ]
    return [path for path in made if path]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.record.read_text())
        made = charts(record, options.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.plot: expected a record at {options.record}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A record as Markdown: in short for the README, with every figure on a page of its own."""

from __future__ import annotations

import re
from typing import Any

LEAST = 0.97  # a speed-up from which on a row counts as no slower: medians of equal code lie within 3 %
# Why a row is kept in which ours is slower than a rival, by its title; the page and python -m bench.record say it.
KEPT = {
    "runtimes: texts int8-1": "after a pause its second thread begins late: 11 ms, 3 without the pause",
    "kernels: convolution demo stem 1": "with the gradient of the pixels, which no training asks for",
    "kernels: layer_norm text block": "its tensors of 2 MB lie in the cache, where the pass that fusing saves costs little",
    "kernels: layer_norm B/32 plain": "without a residual it is torch's own call, behind a check of shapes",
}


def _machine(record: dict[str, Any]) -> str:
    """What a record is of, and the ceilings that were measured in the same run."""
    m, roof = record["machine"], record.get("roofline")
    with_set = f"held to {m['instructions']}" if m["held"] else m["instructions"]
    on = f"driver {m['driver']}" if m["driver"] else f"{with_set}, {m['threads']} threads"
    commit = re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", m["commit"])
    said = f"{m['device']}, {on}, torch {m['versions']['torch']}, commit {commit}, {m['date'][:10]}"
    return said + (
        f"; a copy moves {roof['bytes_per_s'] / 1e9:,.0f} GB/s, a matrix product does {roof['flops_per_s'] / 1e12:.3g} TFLOP/s"
        if roof
        else ""
    )


METHOD = "Medians of interleaved rounds, caches cold"


def summary(records: list[dict[str, Any]], changed: list[bool]) -> str:
    """Records side by side, each with whether its kernels have ``changed`` since: everything against every rival that ran, the
    sizes of an op in one line. Not what ``accelerate`` does for others' models: the README has a table of that."""
    lines = [f"{METHOD}; n × is a rival's time over ours, in the last column its peak memory over ours.", ""]
    for record, since in zip(records, changed, strict=True):
        now = "the kernels have changed since" if since else "the kernels are those of today"
        lines.append(f"- {_machine(record)}; {now}.")
    heads = (f"{r['machine']['instructions']}: ours, ms | against" for r in records)
    lines += ["", f"| what | {' | '.join(heads)} | peak memory |", "|---" * (2 + 2 * len(records)) + "|"]
    found = [_ops(record) | _others(record) for record in records]
    for what in sorted(dict.fromkeys(what for cells in found for what in cells), key=lambda what: ": " not in what):
        here = [cells.get(what, ("", "", "")) for cells in found]
        memory = next((memory for *_, memory in here if memory), "")
        lines.append(f"| {what} | {' | '.join(f'{ours} | {against}' for ours, against, _ in here)} | {memory} |")
    return "\n".join(lines)


Cells = dict[str, tuple[str, str, str]]  # what: (ours in ms, against whom, peak memory)


def _ops(record: dict[str, Any]) -> Cells:
    found = {}
    rows = [row for row in record["rows"] if row["group"] == "kernels" and "absent" not in row["rivals"]["eager"]]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        eager = [row["rivals"]["eager"] for row in of_op]
        ratios = [e["memory"] / row["memory"] for e, row in zip(eager, of_op, strict=True) if row["memory"] and e["memory"]]
        times, ups = _range([row["ms"]["median"] for row in of_op]), _range([e["speedup"] for e in eager])
        what = f"{op.replace('_', ' ')}, {len(of_op)} sizes"
        found[what] = (times, f"{ups} × eager", f"{_range(ratios)} × eager" if ratios else "")
    return found


def _others(record: dict[str, Any]) -> Cells:
    """In the order of their groups' first rows."""
    groups = list(dict.fromkeys(row["group"] for row in record["rows"] if row["group"] not in ("kernels", "interop")))
    found = {}
    for row in sorted((row for row in record["rows"] if row["group"] in groups), key=lambda row: groups.index(row["group"])):
        if ran := {n: r for n, r in row["rivals"].items() if "absent" not in r and not n.startswith("our ")}:
            against = ", ".join(f"{r['speedup']:.2f} × {name}" for name, r in ran.items())
            ratios = [(r["memory"] / row["memory"], name) for name, r in ran.items() if row["memory"] and r["memory"]]
            ratios = [one for one in ratios if one[0] >= 0.05]  # less: what a runtime needs it keeps between calls
            others = [f"{ratio:.1f} × {name}" for ratio, name in ratios[:1]]
            memory = "; ".join([_mega(row["memory"]), *others]) if row["memory"] is not None else ""
            found[title(row)] = (f"{row['ms']['median']:.2f}", against, memory)
    return found


def page(name: str, record: dict[str, Any]) -> str:
    """Every row with all that was measured, and the tests that went before."""
    lines = [f"# {name}", "", f"Made by `python -m bench.record` from {name}.json, commit {record['machine']['commit']}.", ""]
    lines += [
        f"{_machine(record)}. {METHOD}.",
        "",
        "| what | ms (p20 to p80) | rate | of the roofline | peak memory | against (its memory) |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for row in record["rows"]:
        ms, roof = row["ms"], row["roofline"]
        unit = "GB/s" if roof and roof["limit"] == "bytes" else "GFLOP/s"
        ran = {n: r for n, r in row["rivals"].items() if "absent" not in r}
        against = [f"{r['speedup']:.2f} × {n} ({_mega(r['memory'])})" for n, r in ran.items()]
        cells = [
            title(row),
            f"{ms['median']:.3f} ({ms['p20']:.3f} to {ms['p80']:.3f})",
            f"{row['items_per_s']:,.0f}/s" if row["items_per_s"] else "",
            f"{roof['rate'] / 1e9:,.0f} {unit}, {roof['share']:.0%}" if roof else "",
            _mega(row["memory"]),
            "; ".join([*against, *kept(row), *absent(row)]),
        ]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    if parts := record.get("parts"):
        lines += [
            "",
            "| kernel alone | size | forward, ms | with backward, ms | of the roofline | most of it |",
            "|---" * 6 + "|",
        ]
        lines += [_part(part) for part in parts]
    if tests := record.get("tests"):
        lines += ["", "| kernel | tests passed | failed | left |", "|---|---|---|---|"]
        every = [(f"{op} {backend}", counts) for op, found in tests.items() for backend, counts in found.items()]
        lines += [f"| {name} | {t['passed']:,} | {t['failed']:,} | {t['left']:,} |" for name, t in every]
    if missing := [s for s in record.get("stages", []) if s["code"] != 0]:
        lines += ["", "| what did not end well | code | after | its last words |", "|---|---|---|---|"]
        cells = ([s["name"], str(s["code"]), f"{s['seconds']:.0f} s", s["said"][-300:]] for s in missing)
        lines += ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def _part(part: dict[str, Any]) -> str:
    """A row of what one backend takes by itself, with the three launches that take longest."""
    longest = sorted(part["launches"].items(), key=lambda one: -one[1])[:3]
    launches = "; ".join(f"{name[:40]} {ms:.3f}" for name, ms in longest)
    share = f"{part['share']:.0%}" if part.get("share") else ""
    times = [f"{part[k]:.3f}" for k in ("forward_ms", "ms")]
    cells = [f"{part['op']} {part['backend']}", part["size"], *times, share, launches.replace("|", "\\|")]
    return "| " + " | ".join(cells) + " |"


def slower(row: dict[str, Any]) -> list[str]:
    """The rivals than which ours is slower by more than the medians of equal code differ; our own backends are none."""
    ran = {name: rival for name, rival in row["rivals"].items() if "absent" not in rival and not name.startswith("our ")}
    return [name for name, rival in ran.items() if rival["speedup"] < LEAST]


def kept(row: dict[str, Any]) -> list[str]:
    """The note of a row that is slower than a rival, if it has one."""
    return [f"kept: {KEPT[title(row)]}"] if slower(row) and title(row) in KEPT else []


def absent(row: dict[str, Any]) -> list[str]:
    """The rivals that did not run, by their reason."""
    by_reason: dict[str, list[str]] = {}
    for name, rival in row["rivals"].items():
        if "absent" in rival:
            by_reason.setdefault(rival["absent"], []).append(name)
    return [f"not run: {', '.join(names)} ({reason})" for reason, names in by_reason.items()]


def title(row: dict[str, Any]) -> str:
    """Group and name of a row."""
    return f"{row['group'].replace('_', ' ')}: {row['name']}"


def _range(values: list[float]) -> str:
    low, high = (f"{edge:.2f}" for edge in (min(values, default=0), max(values, default=0)))
    return low if low == high else f"{low} to {high}"


def _mega(memory: int | None) -> str:
    return "not measured" if memory is None else f"{memory / 1e6:,.1f} MB"


def demo(results: dict[str, Any]) -> str:
    """The figures of `make demo`: the JSON that it writes beside its report."""
    lines = [
        "| drawings of the unseen style | names | clipfast, top-1 / top-5 | nearest pixels | chance |",
        "|---|---|---|---|---|",
    ]
    for row in results["accuracy"]:
        what = f"{row['drawings']:,} of {row['concepts']} concepts{'' if row['flags'] else ', without flags'}"
        shares = (f"{row[f'{kind}top1']:.1%} / {row[f'{kind}top5']:.1%}" for kind in ("", "pixels_", "chance_"))
        lines.append(f"| {what} | {row['names']:,} | {' | '.join(shares)} |")
    pace = f"{results['steps']:,} steps of {results['config']['batch_size']} pairs in {results['seconds']:.0f} s"
    settings = f" Chosen: {results['settings']['told']}." if "settings" in results else ""
    on = f"{results['versions']['device']}, torch {results['versions']['torch']}"
    return "\n".join([*lines, "", f"{pace} on {on}.{settings}"])


def filled(text: str, made: dict[str, str]) -> str:
    """``text`` with every part between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew."""

    def part(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"README table {match[1]!r}: expected one of {sorted(made)}; the records are in bench/results")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)

"""What is found, each a line of JSON that is appended the moment it is there, and the record made of whatever lines there are.

A process that is killed loses what it was about to write and nothing else. Kinds of line:

    machine   what the figures depend on               light, test   a case of op × backend, and what is wrong with it
    library   what of the build works here             tests         how many cases op × backend has
    roofline  the ceilings of the device               part          what a backend takes by itself, launch by launch
    row       a benchmark's, against the rivals        stage         how a process of bench.run ended
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import measure
from bench.record import machine

Line = dict[str, Any]


def append(path: Path | None, what: str, **found: Any) -> None:
    """Add a line, behind one that a killed process may have left without its end; into a file without a machine that first."""
    if path is None:
        return
    if what not in ("machine", "stage") and not of(read(path), "machine"):
        append(path, "machine", **machine())
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"line": what, **found}) + "\n")  # one write: processes beside this one append too


def read(path: Path) -> list[Line]:
    """The whole lines of the file."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # empty, or cut off
            continue
        found += [line] if isinstance(line, dict) and "line" in line else []
    return found


def of(lines: list[Line], what: str) -> list[Line]:
    """The lines of a kind, without its name."""
    return [{k: v for k, v in line.items() if k != "line"} for line in lines if line["line"] == what]


def record(lines: list[Line], full: bool = False) -> dict[str, Any] | None:
    """The record of these lines; None where no process came as far as saying on which machine it ran."""
    if not (machines := of(lines, "machine")):
        return None
    ceilings = [line for line in of(lines, "roofline")]
    best = {k: max(line[k] for line in ceilings) for k in ("bytes_per_s", "flops_per_s")} if ceilings else None
    rows = {(row["group"], row["name"]): row for row in of(lines, "row")}.values()  # what was measured again counts
    for one in (*rows, *(parts := of(lines, "part"))):
        floor, ms = one["roofline"], one["ms"] if isinstance(one["ms"], float) else one["ms"]["median"]
        one["roofline"] = measure.achieved(floor, ms / 1e3, best) if floor and best else None
    return dict(
        machine=machines[0], roofline=best, full=full, rows=list(rows), tests=tests(lines), light=of(lines, "light"),
        parts=parts, library=of(lines, "library"), stages=of(lines, "stage"),
    )  # fmt: skip


def tests(lines: list[Line]) -> dict[str, dict[str, dict[str, Any]]]:
    """How many cases of each op × backend passed, failed and are left, with the kernel's SHA-256."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for begun in of(lines, "tests"):
        pair = begun["op"], begun["backend"]
        cases = {(t["case"], t["dtype"]): t["wrong"] for t in of(lines, "test") if (t["op"], t["backend"]) == pair}
        failed = sum(map(bool, cases.values()))
        counts = dict(passed=len(cases) - failed, failed=failed, left=begun["cases"] - len(cases), kernel=begun["kernel"])
        found[begun["op"]][begun["backend"]] = counts
    return dict(found)


def passes(lines: list[Line]) -> dict[str, dict[str, Any]]:
    """What kernels/passed.py keeps of these lines: who passed whole, with the time at the first size that was measured."""
    counts, kept = tests(lines), {}
    for begun in of(lines, "tests"):
        pair = begun["op"], begun["backend"]
        found = counts[pair[0]][pair[1]]
        if found["passed"] and not found["failed"] and not found["left"]:
            parts = [part for part in of(lines, "part") if (part["op"], part["backend"]) == pair]
            size, ms = (parts[0]["size"], parts[0]["ms"]) if parts else ("", math.nan)
            kept[begun["key"]] = dict(cases=found["passed"], ms=ms, speedup=math.nan, size=size)
    return kept

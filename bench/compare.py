"""What got slower between two records: ``python -m bench.compare BASE.json NEW.json``; exit code 1 if anything did.

A row is judged by its time over that of the rivals which ran in turn with it, so that a machine that is slower today is no
regression; without a common rival by its time alone. Slower means: by more than the noise of both records.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import exp, fsum, log
from pathlib import Path
from typing import Any

from bench.record import problems
from bench.tables import title

LEAST = 0.05  # beyond the spread within a run: two runs of the same attention kernels differed by 1 to 7 % (AMD EPYC, 2 cores)


def noise(row: dict[str, Any]) -> float:
    """Half the way from the 20th to the 80th percentile, as a share of the median."""
    ms = row["ms"]
    return (ms["p80"] - ms["p20"]) / (2 * ms["median"])


def change(base: dict[str, Any], new: dict[str, Any]) -> tuple[float, float]:
    """(Times as long as before, the share of it that may be noise) of one row of two records."""
    ratio = new["ms"]["median"] / base["ms"]["median"]
    common = [
        (base["rivals"][name], rival)
        for name, rival in new["rivals"].items()
        if "absent" not in rival and "absent" not in base["rivals"].get(name, {"absent": ""}) and not name.startswith("our ")
    ]
    drift = exp(fsum(log(b["ms"]["median"] / a["ms"]["median"]) for a, b in common) / max(1, len(common)))
    rivals = fsum(noise(a) + noise(b) for a, b in common) / max(1, len(common))
    return ratio / drift, LEAST + noise(base) + noise(new) + rivals


def compared(base: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(Row, times as long, noise) of every row of both, the worst first."""
    before = {title(row): row for row in base["rows"]}
    found = [(title(row), *change(before[title(row)], row)) for row in new["rows"] if title(row) in before]
    return sorted(found, key=lambda row: -row[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    read = []
    for path in (options.base, options.new):
        try:
            record = json.loads(path.read_text())
            wrong = next(problems(record), None)
        except (OSError, ValueError) as error:
            record, wrong = {}, str(error)
        if wrong:
            print(f"bench.compare: {path}: {wrong}", file=sys.stderr)
            return 2
        read.append(record)
    machines = [record["machine"] for record in read]
    devices = [f"{m['device']}, {m['instructions']}, {m['threads']} threads" for m in machines]
    if devices[0] != devices[1]:
        print(f"bench.compare: expected records of one machine, got {devices[0]} and {devices[1]}", file=sys.stderr)
        return 2
    rows = compared(*read)
    slower = [row for row in rows if row[1] > 1 + row[2]]
    faster = [row for row in rows if row[1] < 1 / (1 + row[2])]
    for what, found in (("slower", slower), ("faster", faster)):
        for name, times, noisy in found:
            print(f"{what:8} {name[:60]:60} {times:5.2f} × its time, noise {noisy:.0%}")
    titles = [{title(row) for row in record["rows"]} for record in read]
    for what, names in (("gone", titles[0] - titles[1]), ("new", titles[1] - titles[0])):
        for name in sorted(names):
            print(f"{what:8} {name}")
    print(f"{len(rows)} rows in both: {len(slower)} slower, {len(faster)} faster, the others within the noise")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())

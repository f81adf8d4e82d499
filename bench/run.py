"""The tests of the kernels and the benchmarks, into one record: ``python -m bench.run cpu|cuda OUT``.

``make cpu-check`` and ``make gpu-check`` build first. On a GPU each part has its time, so that build, tests and benchmarks end
within nine minutes; what was done until then is in the record, and the exit code tells that something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

from bench.record import ROOT, problems
from clipfast.kernels import passed

# Seconds from the start.
ENDS = {"cuda": {"tests": 180, "benchmarks": 350}, "cpu": {"tests": 1200, "benchmarks": 1800, "long": 3000}}
# What a record of a CPU has of the long grid.
LONG = ["bench", "--full", "-k", "growth or 8192 or 16384 or (training_step and 64)"]


def phase(name: str, command: Sequence[str], out: Path, seconds: float, **environment: str) -> int:
    """Run a command with its output in OUT/name.log until it ends or its time does; its exit code, 124 in the latter case."""
    start = perf_counter()
    print(f"{name}: {' '.join(command)}", flush=True)
    with (out / f"{name}.log").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            code = running.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
            running.send_signal(signal.SIGINT)  # pytest then writes what it has
            try:
                running.wait(15)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
    said = (out / f"{name}.log").read_text().splitlines()
    print("\n".join(f"    {line}" for line in said[-4 if code == 0 else -25 :]))
    print(f"{name}: exit code {code} after {perf_counter() - start:.0f} s", flush=True)
    return code


def counted(xml: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Tests passed and failed of each op × backend by pytest's JUnit report, with the kernel's SHA-256."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for case in ElementTree.parse(xml).iter("testcase"):
        if not (match := re.match(r"test_matches_spec\[(\w+)-(\w+)-", case.get("name", ""))):
            continue
        outcomes = {child.tag for child in case}
        if "skipped" in outcomes:
            continue
        op, backend = match.groups()
        zero = dict(passed=0, failed=0, kernel=passed.fingerprint(op, backend))
        found[op].setdefault(backend, zero)["failed" if outcomes & {"failure", "error"} else "passed"] += 1
    return dict(found)


def merged(rows: list[dict[str, Any]], later: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` with those of ``later`` in the place of the same ones, or at the end."""
    found = {(row["group"], row["name"]): row for row in rows} | {(row["group"], row["name"]): row for row in later}
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything was built, passed and measured; the record is written in any case in which something was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("out", type=Path)
    parser.add_argument("-k", default="", help="only the tests and benchmarks that match, as for pytest")
    options = parser.parse_args(arguments)
    out, cuda, start = options.out.resolve(), options.device == "cuda", perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    ends, matching = ENDS[options.device], [options.k] if options.k else []
    pytest, rows, xml = [sys.executable, "-m", "pytest", "-q"], out / "rows.json", out / "tests.xml"
    # On the CPU the record is of what runs there: Triton's interpreter is for the tests.
    workers = ["-n", "8"] if cuda and importlib.util.find_spec("xdist") else []
    only = " and ".join([*(f"({part})" for part in matching), *(["(cuda or test_loss)"] if cuda else [])])
    files = ["tests/kernels/test_kernels.py", *(["tests/loss/test_loss.py"] if cuda else [])]
    tests = [*pytest, *files, f"--junitxml={xml}", *workers, "-k", only]
    codes = [phase("tests", tests, out, ends["tests"], TRITON_INTERPRET="0")]
    measuring = [*pytest, "--benchmark-only", "--continue-on-collection-errors", "--record", str(rows)]
    left = ends["benchmarks"] - (perf_counter() - start)
    codes.append(phase("benchmarks", [*measuring, "bench", "-k", *(matching or [""])], out, left))
    if not rows.exists():
        print("no record: nothing was measured", file=sys.stderr)
        return 1
    made = json.loads(rows.read_text())
    if not cuda and not matching:
        rows.unlink()
        codes.append(phase("long", [*measuring, *LONG], out, ends["long"] - (perf_counter() - start)))
        made["rows"] = merged(made["rows"], json.loads(rows.read_text())["rows"] if rows.exists() else [])
    record = made | {
        "tests": counted(xml) if xml.exists() else {},
        "tests_finished": codes[0] in (0, 1),
    }
    name = re.sub(r"\W+", "-", record["machine"]["device"]).strip("-").lower() if cuda else "cpu"
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    rows.unlink(missing_ok=True)
    xml.unlink(missing_ok=True)
    if importlib.util.find_spec("matplotlib"):
        from bench.plot import charts

        charts(record, out)
    wrong = list(problems(record))
    print("\n".join([*wrong, f"written: {out / name}.json"]))
    return int(any(codes) or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

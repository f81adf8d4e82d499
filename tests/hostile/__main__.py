"""`python -m tests.hostile [PART ...] [--minutes 30] [--first N] [--inputs N]`: what `make soak` runs.

Prints for each reader how many inputs it was given and how many answers were wrong, crashed, hung or above memory; then what
the sanitizers, the memory and the month report. Exit code 1 if there was anything. A part that is cut short by the clock says
how far it came.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from tests.hostile import harness, month, sanitize, steady
from tests.hostile.harness import READERS

OTHERS = ("sanitize", "steady", "month", "checkpoints")
SHARES = {"strings": 9.0, "sanitize": 5.0, "month": 4.0, "steady": 3.0}  # of the time that is left; the others' are 1


def part(name: str, options: argparse.Namespace, minutes: float) -> int:
    """Run it for so long at most; how much was wrong."""
    if name == "sanitize":
        return sanitize.main(options.inputs or 20_000, minutes)
    if name == "steady":
        return steady.report(options.inputs or 5_000, minutes)
    if name == "checkpoints":
        return damaged_checkpoints(options.inputs or 1_000, minutes)
    if name == "month":
        return month.report(options.inputs or month.CHECKPOINTS, minutes)
    per, inputs, _ = READERS[name]
    inputs = options.inputs or (per if options.first is not None else inputs)
    found = harness.run(name, options.first or 0, inputs, time.monotonic() + 60 * minutes)
    print(found, flush=True)
    return len(found.faults)


def damaged_checkpoints(count: int, minutes: float) -> int:
    """Those of a training: see checkpoints.py."""
    command = [sys.executable, "-m", "tests.hostile.checkpoints", str(count)]
    try:
        return subprocess.run(command, timeout=60 * minutes).returncode
    except subprocess.TimeoutExpired:
        print(f"checkpoints     not done with {count:,} within {minutes:.1f} minutes, nothing wrong until then", flush=True)
        return 0


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__)
    names = [*OTHERS, *sorted(READERS, key=lambda name: SHARES.get(name, 1.0))]
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--first", type=int, help="number of a reader's attempt to begin at: alone, that one is made again")
    parser.add_argument("--inputs", type=int, help="of each part, instead of the soak's")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"expected parts of {', '.join(names)}, got {', '.join(unknown)}")
    end, wrong = time.monotonic() + 60 * options.minutes, 0
    for place, name in enumerate(options.parts):
        shares = [SHARES.get(own, 1.0) for own in options.parts[place:]]
        wrong += part(name, options, (end - time.monotonic()) / 60 * shares[0] / sum(shares))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.hostile [PART ...] [--minutes 30] [--first N] [--inputs N]`: what `make soak` runs.

Prints for each reader how many inputs it was given and how many answers were wrong, crashed, hung or above memory; then what
the sanitizers, the memory and the month report. Exit code 1 if there was anything. Every part is made of pieces, each a process
of its own; as many run at once as there are cores. A piece that is cut short by the clock says how far it came.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.hostile import harness, month, sanitize
from tests.hostile.harness import READERS, Found

Work = Callable[[float], tuple[str, int]]  # minutes at most -> what it says, how much was wrong
# Minutes of one core that the pieces of a part take together (EPYC Zen 4), by which the clock is shared out. What is long and
# cannot be cut into pieces comes first.
MINUTES = {
    **{"month": 12.0, "steady": 6.0, "sanitize": 22.0, "strings": 6.0, "checkpoints": 6.0, "commands": 2.0},
    **{"tables": 1.0, "weights": 1.0, "images": 1.0, "configurations": 1.0, "shards": 1.0},
}


@dataclass
class Part:
    name: str
    pieces: list[tuple[float, Work]]  # with the share of the part's time
    said: list[tuple[str, int]] = field(default_factory=list)

    def told(self) -> str:
        return "\n".join(text for text, _ in self.said)


class Reader(Part):
    """Halves of a reader's inputs, told as one."""

    found: list[Found]

    def __init__(self, name: str, options: argparse.Namespace, cores: int) -> None:
        per, inputs, _ = READERS[name]
        inputs = options.inputs or (per if options.first is not None else inputs)
        attempts = -(-inputs // per)
        ends = [options.first or 0, *((options.first or 0) + attempts * (own + 1) // cores for own in range(cores))]
        self.found = []
        spans = [(a, b - a) for a, b in zip(ends, ends[1:], strict=False) if b > a]
        super().__init__(name, [(1 / len(spans), self.piece(first, count * per)) for first, count in spans])

    def piece(self, first: int, inputs: int) -> Work:
        def work(minutes: float) -> tuple[str, int]:
            found = harness.run(self.name, first, inputs, time.monotonic() + 60 * minutes)
            self.found.append(found)
            return "", len(found.faults)

        return work

    def told(self) -> str:
        whole = Found(self.name, sum(own.inputs for own in self.found), max(own.seconds for own in self.found))
        whole.faults = [fault for own in self.found for fault in own.faults]
        return str(whole)


def module(name: str, *arguments: object) -> Work:
    """`python -m tests.hostile.NAME ARGUMENTS SECONDS`, which tells by its exit code whether something was wrong."""

    def work(minutes: float) -> tuple[str, int]:
        command = [sys.executable, "-m", f"tests.hostile.{name}", *map(str, arguments), str(60 * minutes)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryDirectory(prefix="clipfast-", dir=harness.quick_disk()) as folder:
            done = subprocess.run(command, capture_output=True, text=True, env=variables | {"TMPDIR": folder})
        told = done.stdout.rstrip() or f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}"
        return told, int(done.returncode != 0)

    return work


def parts(names: list[str], options: argparse.Namespace, cores: int) -> list[Part]:
    made: list[Part] = []
    for name in names:
        if name == "steady":
            made.append(Part(name, [(1.0, module("steady", options.inputs or 5_000))]))
        elif name == "month":
            trials = [(0.2, module("month", "trials")), (0.8, module("month", options.inputs or month.CHECKPOINTS))]
            made.append(Part(name, trials[::-1]))
        elif name == "checkpoints":
            count = -(-(options.inputs or 1_000) // cores)
            made.append(Part(name, [(1 / cores, module(name, count, own * 10_000_019, cores, own)) for own in range(cores)]))
        elif name == "sanitize":
            calls = -(-(options.inputs or 20_000) // cores)
            made.append(Part(name, [(1 / cores, sanitize.piece(calls, own, cores)) for own in range(cores)]))
        else:
            made.append(Reader(name, options, cores))
    return made


def run(chosen: list[Part], minutes: float, cores: int) -> int:
    """All pieces, as many at once as there are cores; a part is told when its last piece is done. -> how much was wrong."""
    end, lock = time.monotonic() + 60 * minutes, threading.Lock()
    due = [(part, share * MINUTES[part.name], work) for part in chosen for share, work in part.pieces]
    left = sum(share for _, share, _ in due)
    waiting = {part.name: len(part.pieces) for part in chosen}

    def piece(part: Part, share: float, work: Work) -> int:
        nonlocal left
        with lock:
            rest = max(0.0, end - time.monotonic()) / 60
            allowed, left = min(rest, rest * cores * share / left), left - share
        said = work(allowed)
        with lock:
            part.said.append(said)
            waiting[part.name] -= 1
            if not waiting[part.name]:
                print(part.told(), flush=True)
        return said[1]

    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(lambda own: piece(*own), due))


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__)
    names = [*MINUTES]
    parser.add_argument("parts", nargs="*", default=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--first", type=int, help="number of a reader's attempt to begin at: alone, that one is made again")
    parser.add_argument("--inputs", type=int, help="of each part, instead of the soak's")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"expected parts of {', '.join(names)}, got {', '.join(unknown)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "sanitize" in options.parts:
        sanitize.build()
    return min(1, run(parts(options.parts, options, cores), options.minutes, cores))


if __name__ == "__main__":
    sys.exit(main())

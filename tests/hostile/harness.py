"""Inputs without number for one reader, each judged, in a child process with a limit of memory and of time.

A reader is a function `prepare(folder) -> attempt`; `attempt(rng)` makes an input, hands it to clipfast and to an oracle, and
returns what was wrong with the answer, or "". Input number n comes of `Random(f"{name} {n}")`: it can be made again alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Attempt = Callable[[random.Random], str]
# name: how many inputs an attempt judges, and how many the soak and the quick test ask for.
READERS = {
    "strings": (100, 1_000_000, 10_000),
    "images": (1, 20_000, 300),
    "shards": (1, 5_000, 150),
    "tables": (1, 10_000, 200),
    "weights": (1, 2_000, 60),
    "configurations": (1, 2_000, 80),
    "commands": (1, 2_000, 60),
}
SPACE = 2 << 30  # bytes of addresses beyond what the child has when it starts
MEMORY = 1 << 30  # bytes in memory beyond that
SECONDS = 20  # for one attempt, of which the slowest takes 0.5
KINDS = ("wrong", "crashed", "hung", "above memory")


@dataclass
class Found:
    """Of one reader: how many inputs, and what was not right."""

    name: str
    inputs: int = 0
    seconds: float = 0.0
    faults: list[tuple[str, int, str]] = field(default_factory=list)  # kind, number of the input, what

    def __str__(self) -> str:
        counts = [sum(kind == own for own, _, _ in self.faults) for kind in KINDS]
        told = ", ".join(f"{count} {kind}" for count, kind in zip(counts, KINDS, strict=True))
        lines = [f"{self.name:15} {self.inputs:>9,} inputs: {told}; {self.seconds:.0f} s"]
        return "\n".join(
            [*lines, *(f"    {self.name} --first {n}: {kind}: {what[:600]}" for kind, n, what in self.faults[:20])]
        )


def run(name: str, first: int, inputs: int, until: float = float("inf")) -> Found:
    """`inputs` of them from attempt `first` on, or fewer where the clock (time.monotonic) reaches `until`."""
    per, found, begun = READERS.get(name, (1,))[0], Found(name), time.monotonic()
    end, place = first + -(-inputs // per), first
    with tempfile.TemporaryDirectory(prefix="clipfast-", dir=quick_disk()) as folder:
        while place < end and time.monotonic() < until:
            stopped, faults, ended = _child(name, place, end, Path(folder), until)
            found.faults += faults
            if ended:
                found.faults.append((ended[0], stopped, ended[1]))
                stopped += 1
            found.inputs += (stopped - place) * per
            place = stopped
            if len(found.faults) > 100:
                break
    found.seconds = time.monotonic() - begun
    return found


def quick_disk() -> str | None:
    """A folder in memory, where there is one with room: what is tried does not hang on the disk. None: where others are."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 << 30:
            return "/dev/shm"
    return None


def _child(
    name: str, first: int, end: int, folder: Path, until: float
) -> tuple[int, list[tuple[str, int, str]], tuple[str, str] | None]:
    """(the attempt that it did not finish, or `end`; the faults it told; how it ended if not in order)."""
    work, told, beat = folder / "work", folder / "faults", folder / "beat"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    told.write_text("")
    beat.write_bytes(struct.pack("q", -1))
    command = [sys.executable, "-m", "tests.hostile.harness", name, str(first), str(end), str(folder)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with open(folder / "output", "wb") as output, open(beat, "r+b") as file, mmap.mmap(file.fileno(), 8) as pulse:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
        seen, since, ended = -1, time.monotonic(), None
        while child.poll() is None:
            time.sleep(0.02)
            now = struct.unpack("q", pulse[:8])[0]
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > SECONDS * (6 if seen < 0 else 1):  # first it imports and prepares
                ended = ("hung", f"no answer within {SECONDS} s")
            if ended or time.monotonic() > until:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it may have started
        stopped = struct.unpack("q", pulse[:8])[0]
    if stopped < 0 and time.monotonic() < until:
        raise RuntimeError(f"{name} cannot be prepared: {(folder / 'output').read_text(errors='replace')[-2000:]}")
    stopped = max(stopped, first)
    faults = [tuple(json.loads(line)) for line in told.read_text().splitlines()]
    if not ended and stopped < end and time.monotonic() < until:
        last = (folder / "output").read_text(errors="replace").strip().splitlines()[-8:]
        if any("MemoryError" in line for line in last):
            ended = ("above memory", " | ".join(last))
        elif child.returncode != _RESTART:
            ended = ("crashed", f"exit status {child.returncode}: {' | '.join(last)}")
        else:
            stopped += 1
            return stopped, faults, None
    return stopped, faults, ended


_RESTART = 77  # exit status of a child that has told a fault and shall start afresh


def _work(name: str, first: int, end: int, folder: Path) -> int:
    module = importlib.import_module(f"tests.hostile.{name}")
    attempt: Attempt = module.prepare(folder / "work")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY
    with open(folder / "beat", "r+b") as file, mmap.mmap(file.fileno(), 8) as pulse, open(folder / "faults", "a") as told:

        def fault(kind: str, place: int, what: str) -> None:
            told.write(json.dumps([kind, place, what]) + "\n")
            told.flush()

        for place in range(first, end):
            pulse[:8] = struct.pack("q", place)
            try:
                if what := attempt(random.Random(f"{name} {place}")):
                    fault("wrong", place, what)
            except MemoryError as error:
                fault("above memory", place, f"{error} in {_where(error)}")
                return _RESTART
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > most:
                fault("above memory", place, f"more than {MEMORY >> 20} MB")
                return _RESTART
        pulse[:8] = struct.pack("q", end)
    return 0


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""


def one_line(error: BaseException) -> str:
    """What is wrong with an error that a reader raised: it must be of a kind that the command line tells, in one short line."""
    from clipfast.cli import USER_ERRORS

    text = str(error)
    if not isinstance(error, USER_ERRORS) or isinstance(error, (RecursionError, NotImplementedError)):
        return f"raised {type(error).__name__}: {text[:300]} in {_where(error)}"
    if not text.strip():
        return f"raised {type(error).__name__} without a message in {_where(error)}"
    return f"told in {len(text.splitlines())} lines: {text[:200]!r}" if len(text.strip().splitlines()) > 1 else ""


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four faults: what disks, networks and people make of a file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(8)
        place = rng.randrange(len(out) + 1) if rng.random() < 0.6 else min(len(out), int(rng.expovariate(1 / 60)))
        if kind == 0:
            del out[place:]
        elif kind == 1:
            out[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 2 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("<", ">"))
            value = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**16, 2**24, rng.randrange(2**20)))
            packed = struct.pack(f"{order}Q", value)
            out[place : place + width] = packed[:width] if order == "<" else packed[8 - width :]
        elif kind == 4:
            del out[place : place + rng.randrange(1, 64)]
        elif kind == 5:
            out[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 6:
            other = rng.randrange(len(out) + 1)
            out[place:place] = out[other : other + rng.randrange(1, 512)]
        else:
            out[place : place + 16] = bytes(16)
    return bytes(out)


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))

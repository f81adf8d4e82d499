"""The tests of the kernels and the benchmarks, into one record: ``python -m bench.run cpu|first|check|multi OUT [SECONDS]``.

``make cpu-check`` builds first; ``make gpu-first``, ``gpu-check`` and ``gpu-multi`` take the libraries that lie there. Every
stage is a process with its time: what hangs, crashes or breaks the GPU's context costs its stage. What a stage finds is
appended to OUT/lines.jsonl at once (bench/lines.py), so that a run that is cut off is a record of what was done; its output is
in OUT/log.txt. No stage starts with less than ``LEAST`` seconds left. No GPU has run the plans for one yet:
tests/bench/test_rehearsal.py does with a stand-in, all but ncu, compute-sanitizer and what needs several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from bench import lines
from bench.record import ROOT, problems, stem
from clipfast import kernels
from clipfast.kernels import dispatch, passed

PYTHON: tuple[str, ...] = (sys.executable,)  # what runs a stage
TOOLS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])  # where ncu and compute-sanitizer are looked for
SECONDS = {"cpu": 1500.0, "first": 200.0, "check": 480.0, "multi": 480.0}
LEAST = 3.0  # seconds below which no stage starts
WIDTH = max(2, min(8, (os.cpu_count() or 1) // 2))  # processes at once, where nothing is timed
ROWS = ("attention", "layer_norm", "mlp", "fused_mlp", "pooling")  # whose benchmarks come before those of the towers
# Of a CPU: benchmarks of files, by pytest's -k, that come before the others.
GOALS = {"losses": "8192", "training": "emoji", "runtimes": "runtimes", "towers": "towers"}
# What a GPU's stages import, and what it is for; without the first nothing runs.
NEEDS = {
    "clipfast": "torch numpy PIL regex tokenizers safetensors tqdm",
    "Triton's kernels": "triton",
    "the benchmarks": "pytest pytest_benchmark",
    "captions": "ftfy wcwidth",
    "the training step": "webdataset braceexpand yaml",
}


@dataclass(frozen=True)
class Stage:
    """A process, the seconds that it may take, and variables of its environment."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


Group = list[Stage]  # at once where they are many; nothing in such a group is timed


def plan(kind: str, path: Path) -> list[Group]:
    """The stages of a run in their order: what matters most comes first, as time may cut off the rest."""
    return dict(cpu=_cpu, first=_first, check=_check, multi=_multi)[kind](path)


def stage(path: Path, seconds: float, name: str, *arguments: str, before: Sequence[str] = (), **environment: str) -> Stage:
    """One of bench/stages.py; ``before``: a tool that runs it."""
    title = " ".join([*map(os.path.basename, before[:1]), name, *arguments])
    return Stage(title, [*before, *PYTHON, "-m", "bench.stages", str(path), name, *arguments], seconds, environment)


def rows(path: Path, seconds: float, name: str, file: str, *options: str) -> Stage:
    """Benchmarks of a file."""
    pytest = [*PYTHON, "-m", "pytest", "-q", "--benchmark-only", "--continue-on-collection-errors", "--lines", str(path)]
    return Stage(name, [*pytest, file, *options], seconds)


def on_gpus(*backends: str) -> list[tuple[str, str]]:
    """Op × backend that have a source."""
    return [(op, backend) for backend in backends for op in kernels.OPS if passed.source_of(op, backend).exists()]


def _cpu(path: Path) -> list[Group]:
    """The end-to-end goals, the kernels' tests (in two processes, as nothing is timed), every other row."""
    ops = list(kernels.OPS)
    return [
        *([rows(path, 600, which, f"bench/test_{file}.py", "-k", which)] for file, which in GOALS.items()),
        [stage(path, 600, "tests", ",".join(some)) for some in (ops[::2], ops[1::2])],
        [rows(path, 1500, "other rows", "bench", "-k", f"not ({' or '.join(f'({which})' for which in GOALS.values())})")],
    ]


def _begun(path: Path) -> list[Group]:
    """The libraries, where they do not load; the ceilings; first light."""
    build = Stage(
        "build", [*PYTHON, "setup.py", "build_ext", "--inplace"], 150, {"CLIPFAST_CUDA": "on", "CUDAARCHS": "90a-real"}
    )
    missing = [build] if torch.version.cuda and (dispatch.library("cuda") or dispatch.library("cpu")) else []
    light = [stage(path, 40, "light", *pair) for pair in on_gpus("triton", "cuda")]
    return [*([missing] if missing else []), [stage(path, 40, "roofline")], light]


def _first(path: Path) -> list[Group]:
    cuda, parts = on_gpus("cuda"), [[stage(path, 30, "parts", op)] for op, _ in on_gpus("cuda")]
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a write beyond a tensor stays within torch's pool
    sanitized = [stage(path, 45, "launch", *pair, "small", before=memcheck, **uncached) for pair in cuda]
    ncu = ("ncu", "--clock-control", "none", "--set", "detailed", "--launch-count", "6", "-k", f"regex:^({'|'.join(_names())})")
    return [*_begun(path), *parts, sanitized, *([stage(path, 25, "launch", *pair, before=ncu)] for pair in cuda)]


def _names() -> list[str]:
    """Of our kernels in CUDA C++, without which ncu would profile torch's too."""
    sources = [*passed.ROOT.rglob("*.cuh"), *passed.ROOT.glob("*/cuda.cu")]
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(?:__cluster_dims__\([^()]*\)\s*)?"
    return sorted(
        {n for s in sources for n in re.findall(rf"__global__\s+void\s+{bounds}(\w+)", s.read_text(encoding="utf-8"))}
    )


def _check(path: Path) -> list[Group]:
    def tests(seconds: float, *backends: str) -> Group:
        return [stage(path, seconds, "tests", *pair) for pair in on_gpus(*backends)]

    losses = [*PYTHON, "-m", "pytest", "-q", "tests/loss/test_loss.py", "-k", "triton or cuda or gpu"]
    timed = [
        *(stage(path, 30, "parts", op) for op, _ in on_gpus("cuda")),
        *(rows(path, 60, f"loss {name}", "bench/test_losses.py", "-k", f"test_loss[{name}") for name in ("clip", "siglip")),
        *(rows(path, 45, op, "bench/test_kernels.py", "-k", f"test_op[{op}") for op in ROWS),
        rows(path, 90, "training step", "bench/test_towers.py", "-k", "test_training_step"),
        rows(path, 60, "towers", "bench/test_towers.py", "-k", "encode"),
        rows(path, 45, "all pairs", "bench/test_kernels.py", "-k", "test_op[contrastive or test_op[pairwise"),
        rows(path, 60, "growth", "bench/test_losses.py", "-k", "growth"),
        rows(path, 60, "other libraries", "bench/test_interop.py"),
    ]
    others = [*tests(90, "triton"), Stage("tests of the losses", losses, 90), *tests(60, "torch")]
    return [*_begun(path), tests(60, "cuda"), others, *([one] for one in timed)]


def _multi(path: Path) -> list[Group]:
    torchrun = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu", "-m", "bench.ranks", str(path)]
    pytest = [*PYTHON, "-m", "pytest", "-q", "tests/loss/test_ranks.py", "-k", "nccl"]
    parts = [Stage(f"ranks {name}", [*torchrun, name], 100) for name in ("losses", "ddp", "fsdp")]
    return [[stage(path, 40, "roofline")], [Stage("tests over NCCL", pytest, 90)], *([one] for one in parts)]


# ---- running them ------------------------------------------------------------------------------------------------------------


class Runner:
    """Runs stages until its time ends, and writes how each did."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.path, self.end, self.lock = out, out / "lines.jsonl", perf_counter() + seconds, threading.Lock()

    def run(self, groups: list[Group]) -> list[int | str]:
        """The exit code of each stage, or a word: ``hung``, ``no time``, ``absent``."""
        codes: list[int | str] = []
        for group in groups:
            with ThreadPoolExecutor(min(WIDTH, len(group))) as pool:
                codes += pool.map(self._one, group)
            with contextlib.suppress(OSError):  # of a cache that cannot be written nobody has use
                passed.keep(lines.passes(lines.read(self.path)))
        return codes

    def _one(self, one: Stage) -> int | str:
        start, log = perf_counter(), self.out / f"{re.sub(r'[^a-z0-9]+', '-', one.name.lower())}.part"
        limit = min(one.seconds, self.end - start)
        code: int | str = "no time"
        if limit >= LEAST:
            with log.open("w") as file:
                code = _ended(one, limit, file)
        said = log.read_text(errors="replace") if log.exists() else ""
        took = perf_counter() - start
        with self.lock:
            tail = "" if code == 0 else said[-2000:]
            lines.append(self.path, "stage", name=one.name, code=code, seconds=took, limit=max(limit, 0.0), said=tail)
            with (self.out / "log.txt").open("a") as file:
                file.write(f"==== {one.name}: {code} after {took:.1f} s: {' '.join(one.command)}\n{said}\n")
            log.unlink(missing_ok=True)
            print(f"{one.name}: {code if code != 0 else 'done'} after {took:.0f} s", flush=True)
            if tail:
                print("\n".join(f"    {line}" for line in tail.splitlines()[-12:]), flush=True)
        return code


def _ended(one: Stage, limit: float, log: object) -> int | str:
    """How a stage ended. Past its time it is killed with all that it has started; what a GPU holds even then is left behind."""
    tool = shutil.which(one.command[0], path=TOOLS)
    if tool is None:
        return "absent"
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"} | one.environment
    running = subprocess.Popen([tool, *one.command[1:]], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment,  # type: ignore[call-overload]
                               start_new_session=True)  # fmt: skip
    try:
        return running.wait(limit)
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(5)


def absent() -> Iterator[tuple[str, list[str]]]:
    """What is not here of that which the stages import, by what it is for."""
    for what, modules in NEEDS.items():
        if missing := [name for name in modules.split() if not importlib.util.find_spec(name)]:
            yield what, missing


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every stage ended well and the record is one; it is written in any case in which something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SECONDS)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float, nargs="?")
    options = parser.parse_args(arguments)
    out, cuda = options.out.resolve(), options.kind != "cpu"
    if cuda:
        for what, missing in absent():
            print(
                f"bench.run: {what} needs {', '.join(missing)}: install them, or put their wheels on PYTHONPATH",
                file=sys.stderr,
            )
            if what == "clipfast":
                return 2
        if not torch.cuda.is_available():
            print(f"bench.run: expected a GPU, torch {torch.__version__} finds none", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    for old in ("lines.jsonl", "log.txt"):
        (out / old).unlink(missing_ok=True)
    runner = Runner(out, options.seconds or SECONDS[options.kind])
    codes = runner.run(plan(options.kind, runner.path))
    record = lines.record(lines.read(runner.path))
    if record is None:
        print("bench.run: no record, as no stage came as far as its first line; see log.txt", file=sys.stderr)
        return 1
    name = stem(record["machine"]) + (f"-{options.kind}" if options.kind in ("first", "multi") else "")
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if not cuda and importlib.util.find_spec("matplotlib"):
        from bench.plot import charts

        charts(record, out)
    wrong = list(problems(record))
    print("\n".join([*wrong, f"written: {out / name}.json"]))
    return int(any(codes) or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

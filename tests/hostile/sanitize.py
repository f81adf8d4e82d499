"""`python -m tests.hostile sanitize [--inputs CALLS]`: the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds the CPU library with CLIPFAST_SANITIZE into build/sanitize and runs, in processes that have the sanitizers' libraries,
every op x case x dtype, and random ones until CALLS of them (default 20,000) have run on a kernel in C++, forward and backward:
sizes of 0 and 1, odd strides, expanded and misaligned tensors, NaN and infinities.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "sanitize"
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:log_path={0}/asan:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:log_path={0}/ubsan",
}


def build() -> None:
    tools = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", "-DCLIPFAST_SANITIZE=ON", "-GNinja", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (["cmake", *options, "-S", str(ROOT), "-B", str(BUILT)], ["cmake", "--build", str(BUILT)]):
        subprocess.run(command, check=True, env=tools, stdout=subprocess.DEVNULL)


def piece(calls: int, own: int, pieces: int) -> Callable[[float], tuple[str, int]]:
    """One of several processes: its part of the cases, and so many random calls; the library is built."""
    return lambda minutes: _piece(calls, own, pieces, minutes)


def _piece(calls: int, own: int, pieces: int, minutes: float) -> tuple[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        runtime = [_library(name) for name in ("asan", "ubsan", "stdc++")]
        variables = os.environ | {key: value.format(folder) for key, value in OPTIONS.items()}
        # Two threads, so that what is shared out is: who waits sleeps, as the other pieces run beside it.
        variables |= {"LD_PRELOAD": ":".join(runtime), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
        begun = time.monotonic()
        numbers = map(str, (calls, own, pieces, 60 * minutes))
        command = [sys.executable, "-m", "tests.hostile.sanitize", *numbers]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
        reports = sorted(path.read_text(errors="replace") for path in Path(folder).iterdir())
    count = sum(len(re.findall(r"ERROR: AddressSanitizer|runtime error:", report)) for report in reports)
    told = done.stdout.strip() or done.stderr[-2000:]
    lines = [f"sanitizers      {told}: {count} reports; {time.monotonic() - begun:.0f} s", *(own[:3000] for own in reports)]
    return "\n".join(lines), int(bool(count or done.returncode))


def _library(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ---- in the child


def odd(x: Tensor, rng: random.Random) -> Tensor:
    """The same shape in a layout that nobody asked for, with values that nobody likes."""
    x = x.detach()
    kind = rng.randrange(7)
    if x.is_floating_point() and rng.random() < 0.15:
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[: rng.randrange(1, 4)] = rng.choice(
            (float("nan"), float("inf"), -float("inf"), 0.0, 1e15, 1e-40)
        )  # whose squares overflow nowhere
    if kind == 0 and x.ndim:  # strides of two
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if kind == 1 and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2 and x.ndim and x.shape[0]:
        return x[:1].expand_as(x)
    if kind == 3 and x.numel():  # one element off its alignment, at the very end of its memory
        held = x.new_empty(x.numel() + 1)
        return held[1:].view(x.shape).copy_(x)
    if kind == 4 and x.ndim:
        return x.new_zeros(x.shape[0] + 3, *x.shape[1:])[2 : 2 + x.shape[0]].copy_(x)
    if kind == 5 and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def all_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every op x case x dtype."""
    from clipfast.check import DTYPES, arguments
    from tests.kernels.rows import CASES

    for op, cases in CASES.items():
        for case in cases.values():
            for dtype in DTYPES.values():
                yield op, arguments(op, case, dtype, "cpu")


def odd_calls(number: int, seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Random ones: a case's sizes changed, its tensors laid out anew. Large sizes are made small: `all_cases` has them."""
    from clipfast import kernels
    from clipfast.check import DTYPES, arguments
    from tests.kernels.rows import CASES

    dtypes = [*DTYPES.values(), *[torch.float32] * 12]  # the one that all of them take
    rng, made, ops = random.Random(seed), 0, [op for op in CASES if "cpu" in kernels.OPS[op].compiled]
    while made < number:
        op = rng.choice(ops)
        case = dict(rng.choice([*CASES[op].values()]))
        for name, value in case.items():
            if type(value) is int and rng.random() < (0.4 if value <= 64 else 0.95):
                near = (value, value + 1, max(value - 1, 0)) if value <= 64 else (65, 96, 127, 128)
                case[name] = rng.choice((0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, *near))
        try:
            given = arguments(op, case, rng.choice(dtypes), "cpu", rng.randrange(1 << 30))
        except Exception:  # sizes that do not go together
            continue
        made += 1
        yield (
            op,
            {name: odd(v, rng).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for name, v in given.items()},
        )


def child(number: int, own: int, pieces: int, seconds: float) -> int:
    given = torch.ops.load_library
    torch.ops.load_library = lambda path: given(BUILT / "_C_cpu.so" if Path(path).name == "_C_cpu.so" else path)  # type: ignore
    from clipfast import kernels
    from clipfast.check import run
    from clipfast.kernels import dispatch

    if reason := dispatch.library("cpu"):
        raise SystemExit(f"the library with sanitizers: {reason}")
    said, end = [], time.monotonic() + seconds
    for name, calls in (("cases", islice(all_cases(), own, None, pieces)), ("random calls", odd_calls(20 * number, own))):
        made, ran = 0, 0
        for op, arguments in calls:
            if ran == number and name == "random calls":
                break
            if time.monotonic() > end:
                name += " (cut short)"
                break
            made += 1
            with suppress(dispatch.NoBackend, ValueError, TypeError, RuntimeError, IndexError), dispatch.use("cpu"):
                run(getattr(kernels, op), arguments, [])
                ran += 1
        said.append(f"{made:,} {name}, {ran:,} of which ran on C++ kernels")
    print("; ".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(child(*map(int, sys.argv[1:4]), float(sys.argv[4])))

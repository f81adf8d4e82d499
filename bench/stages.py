"""What one process of ``bench.run`` does: ``python -m bench.stages LINES NAME [ARGUMENTS]``, a line of JSON for each result.

roofline           what of the build works here, and the ceilings of the device
light OP BACKEND   a kernel's first cases against float64, twice for equal bits
tests OPS BACKEND  all cases in all types, of ops with commas between them; without BACKEND by all
parts OP           forward and backward of each of our backends for GPUs, and every launch by itself
launch OP BACKEND  both ways once, for ncu and compute-sanitizer; ``small``: at the first of the first cases
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench import measure, sizes
from bench.lines import append
from bench.measure import DEVICE, DTYPE
from clipfast import check, kernels
from clipfast.kernels import dispatch, passed

ROUNDS = 11  # of a part


def roofline(lines: Path) -> None:
    """The ceilings, and before them what a build may lack: the libraries, libtorch_cuda's and cuBLAS's symbols in them, and a
    product of 16 bit into fp32 (torch 2.9 refused it)."""
    for kind in ("cpu", "cuda"):
        append(lines, "library", name=f"_C_{kind}", wrong=dispatch.library(kind) or "")
    if DEVICE == "cuda":
        for name in ("aoti_torch_get_current_cuda_stream", "cublasGemmEx", "cublasSetPointerMode_v2"):
            append(lines, "library", name=name, wrong=_symbol(name))
        append(lines, "library", name="addmm of 16 bit into fp32", wrong=_wide_product())
    append(lines, "roofline", **measure.roofline())


def _symbol(name: str) -> str:
    """What is wrong with a symbol that our library for GPUs takes from those that it brings."""
    try:
        return "" if hasattr(ctypes.CDLL(str(passed.ROOT.parent / "clipfast" / "_C_cuda.so")), name) else "no such symbol"
    except OSError as error:
        return str(error)


def _wide_product() -> str:
    a, b = (torch.randn(256, 256, device=DEVICE, dtype=DTYPE) for _ in range(2))
    out = torch.ones(256, 256, device=DEVICE)
    expected = 1 + 0.5 * a.double() @ b.double()
    try:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=1, alpha=0.5, out=out)
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if (out - expected).norm() <= 1e-5 * expected.norm() else "it computes something else"


def light(lines: Path, op: str, backend: str) -> None:
    """A line for each first case in each type; a case that the kernel refuses says why."""
    for name, case in sizes.FIRST[op].items():
        for dtype in ("bf16", "fp16", "fp32"):
            start = perf_counter()
            try:
                wrong = check.wrongs(op, backend, case, dtype, DEVICE)
            except dispatch.NoBackend as error:
                wrong = [str(error)]
            took = perf_counter() - start
            append(lines, "light", op=op, backend=backend, case=name, dtype=dtype, wrong=" ".join(wrong), seconds=took)
            if wrong and _broken():
                return


def tests(lines: Path, ops: str, backend: str = "") -> None:
    """A line for each case of the ops by the backend, or by all; they end where the GPU's context is broken."""
    from tests.kernels.rows import collected

    rows = [row for row in collected(tuple(ops.split(",")))[0] if row.device == DEVICE and not row.interpreted]
    rows = [row for row in rows if backend in ("", row.backend)]
    for (op, by), count in Counter((row.op, row.backend) for row in rows).items():
        key = passed.key(op, by, DEVICE)
        append(lines, "tests", op=op, backend=by, cases=count, kernel=passed.fingerprint(op, by), key=key)
    for row in rows:
        try:
            wrong = " ".join(check.disagreements(row.op, row.backend, row.arguments))
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the result
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        append(lines, "test", op=row.op, backend=row.backend, case=row.case, dtype=row.dtype, wrong=wrong)
        if wrong and _broken():
            return


def _broken() -> bool:
    """Whether the GPU's context is lost, so that whatever follows would fail too."""
    try:
        return DEVICE == "cuda" and torch.cuda.synchronize() is not None
    except RuntimeError:
        return True


def parts(lines: Path, op: str) -> None:
    """A line for each size and backend: forward, both ways, and the time of each launch in one call, vendor's products too."""
    from bench.test_kernels import floor

    for backend, (size, case) in itertools.product((passed.beside(op), "cuda"), sizes.PARTS[op].items()):
        try:
            with dispatch.use(backend):
                both, forward = _calls(op, case)
                both()
                times = [1e3 * median(measure.seconds(call) for _ in range(ROUNDS)) for call in (forward, both)]
                found = dict(forward_ms=times[0], ms=times[1], launches=_launches(both))
        except Exception as error:  # noqa: BLE001 - a backend that refuses or fails says so in the log
            print(f"{op} {backend} {size}: {type(error).__name__}: {error}", flush=True)
            continue
        append(lines, "part", op=op, backend=backend, size=size, roofline=floor(kernels.OPS[op].spec, case), **found)


def _calls(op: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward, and forward alone, on arguments that ask for gradients."""
    from bench.test_kernels import arguments, forward_backward

    given, leaves = arguments(op, case)
    return forward_backward(getattr(kernels, op), given, leaves), lambda: getattr(kernels, op)(**given)


def _launches(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel in one call, by its name; nothing where the profiler cannot see the GPU."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        found = {e.key: e.device_time_total / 1e3 for e in profile.key_averages()}
    except (AssertionError, RuntimeError) as error:
        print(f"no profile: {error}", flush=True)
        return {}
    return {name: ms for name, ms in found.items() if ms}


def launch(lines: Path, op: str, backend: str, *small: str) -> None:
    """Forward and backward once."""
    case = next(iter((sizes.FIRST if small else sizes.PARTS)[op].values()))
    with dispatch.use(backend):
        _calls(op, case)[0]()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


STAGES: dict[str, Callable[..., None]] = dict(roofline=roofline, light=light, tests=tests, parts=parts, launch=launch)


def main(path: str, name: str, *arguments: str) -> None:
    os.environ.setdefault("TRITON_INTERPRET", "0")
    STAGES[name](Path(path), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

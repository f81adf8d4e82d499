"""``clipfast check``: every op × backend against its spec in float64 on this device, and its speed against eager PyTorch.

The numerics policy lives here, and the tests of the kernels apply the same. On a GPU the kernels run in a process of their own:
one that hangs, crashes or breaks the GPU's context is told, and the others go on in another.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch, passed

log = logging.getLogger(__name__)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS = 50.0  # for all that is checked; what remains of a minute is for imports and for the call that is under way
PATIENCE = 20.0  # beyond its time, for a kernel that gives no answer: imports and the compiler's call under way may take that
COLOURS = {"passed": 32, "failed": 31, "absent": 2}  # green, red, faint


@dataclass
class Result:
    """What is known of one op × backend on a device."""

    op: str
    backend: str
    state: str  # passed, failed or absent
    detail: str = ""  # why it is absent, what is wrong
    cases: int = 0  # that were checked
    left: int = 0  # that were not, for want of time
    ms: float = math.nan  # a forward and backward pass at a benchmark's size
    speedup: float = math.nan  # over eager PyTorch
    size: str = ""  # at which both were measured
    kept: bool = False  # it passed on an earlier call


def arguments(op: str, case: str | dict[str, Any], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """A case, of the op's spec where it is a name, as arguments of its public function; every floating tensor is a leaf that
    asks for a gradient, where the op has any."""
    spec = kernels.OPS[op].spec
    case = spec.CASES[case] if isinstance(case, str) else case
    return _leaves(op, spec.inputs(torch.Generator().manual_seed(seed), **case), dtype, device)


def _leaves(op: str, made: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    asks = kernels.OPS[op].differentiable

    def leaf(x: Tensor) -> Tensor:
        return x.to(device, dtype).requires_grad_(asks) if x.is_floating_point() else x.to(device)

    return {k: leaf(v) if isinstance(v, Tensor) else v for k, v in made.items()}


def disagreements(op: str, backend: str, given: dict[str, Any], twice: bool = True) -> list[str]:
    """Where a backend breaks the numerics policy on these arguments; an empty list: nowhere.

    With the spec in float64 as the truth: ‖out − truth‖ ≤ 2·‖eager − truth‖ + one ulp, gradients ≤ 3·, eager being the spec in
    the dtype of the arguments; equal calls give equal bits (``twice``: whether a second call is made to see it). Raises
    dispatch.NoBackend where it does not run such arguments.
    """
    function, reference = getattr(kernels, op), kernels.OPS[op].spec.reference
    with dispatch.use(backend):
        with torch.no_grad():
            function(**given)
        upstream: list[Tensor] = []
        try:
            got = run(function, given, upstream)
            again = run(function, given, upstream) if twice else got
        except dispatch.NoBackend as error:
            return [f"it runs forward and not backward: {error}"]
    eager, truth = run(reference, given, upstream), run(reference, _widened(given), upstream)
    wrong, unordered = [], getattr(kernels.OPS[op].backend(backend), "UNORDERED", ())  # where a library may differ in bits
    for name in truth:
        wrong += _apart(name, got[name], eager[name], truth[name], factor=2 if name.startswith("output") else 3)
        if got[name].device.type not in unordered and not torch.equal(got[name], again[name]):
            wrong.append(f"{name} differs between two equal calls")
    return wrong


def run(function: Callable, given: dict[str, Any], upstream: list[Tensor]) -> dict[str, Tensor]:
    """``output i`` and ``gradient of x`` of sum(outputs · upstream); an empty ``upstream`` is filled, for the next call."""
    outputs = function(**given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    if not upstream:
        generator = torch.Generator().manual_seed(1)
        upstream += [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    given_grads = [u.to(o.device, o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given_grads) if leaves else ()
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"gradient of {leaf}": grad for leaf, grad in zip(leaves, grads, strict=True)}


def _widened(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }


def _apart(name: str, got: Tensor, eager: Tensor, truth: Tensor, factor: float) -> list[str]:
    """What is wrong with ``got``: nothing where ‖got − truth‖ ≤ factor · ‖eager − truth‖ + one ulp of the output."""
    if got.shape != truth.shape or got.dtype != eager.dtype:
        return [f"{name}: expected {tuple(truth.shape)} {eager.dtype}, got {tuple(got.shape)} {got.dtype}"]
    error, rival = (got.double() - truth).norm(), (eager.double() - truth).norm()
    ulp = (16 if got.dtype == torch.float64 else 1) * torch.finfo(got.dtype).eps * truth.norm()  # in fp64 eager is the truth
    if error <= factor * rival + ulp:  # a NaN is not
        return []
    return [f"{name}: error {error:.3e}, eager {rival:.3e}, ulp {ulp:.3e}"]


def check(device: str, again: bool = False) -> Iterator[Result]:
    """Each op × backend in turn, within ``SECONDS``; those that passed before are not run again unless ``again``.

    What passes whole is kept for the next call, and makes a CUDA C++ kernel an automatic choice. Those come last: a kernel that
    writes where it must not takes the GPU's context with it.
    """
    before, now = passed.kept(), {}
    pairs = [(op, backend) for op in kernels.OPS for backend in dispatch.BACKENDS if passed.source_of(op, backend).exists()]
    pairs.sort(key=lambda pair: pair[1] == "cuda")
    absent = {pair: found for pair in pairs if isinstance(found := kernels.OPS[pair[0]].backend(pair[1]), str)}
    keys = {pair: passed.key(*pair, device) for pair in pairs}
    known = {pair: before[name] for pair, name in keys.items() if name in before and not again}
    left = [pair for pair in pairs if pair not in absent and pair not in known]
    results = (_elsewhere if torch.device(device).type == "cuda" else _in_turn)(device, left, perf_counter() + SECONDS)
    try:
        for pair in pairs:
            if pair in absent:
                yield Result(*pair, "absent", absent[pair])
            elif pair in known:
                yield Result(*pair, "passed", **known[pair], kept=True)
            else:
                result = next(results)
                now[keys[pair]] = kept_of(result)
                yield result
    finally:
        try:
            passed.keep(now)
        except OSError as error:
            log.warning("what passed is not kept for the next time: %s", error)


def kept_of(result: Result) -> dict[str, Any] | None:
    """What is kept of a result for the next call; None of one that is no pass, or not whole."""
    whole = result.state == "passed" and not result.left
    return dict(cases=result.cases, ms=result.ms, speedup=result.speedup, size=result.size) if whole else None


def _in_turn(device: str, pairs: list[tuple[str, str]], end: float) -> Iterator[Result]:
    """Each op × backend, in an equal share of the time that those before it have left."""
    for i, (op, backend) in enumerate(pairs):
        yield _checked(op, backend, device, perf_counter() + (end - perf_counter()) / (len(pairs) - i))


def _elsewhere(device: str, pairs: list[tuple[str, str]], end: float) -> Iterator[Result]:
    """The same in another process, and behind a failure, a crash or a hang in the next one."""
    while pairs:
        with subprocess.Popen(_command(device, pairs, end), stdout=subprocess.PIPE, text=True) as worker:
            for op, backend in list(pairs):
                limit = max(0.0, end - perf_counter()) / len(pairs) + PATIENCE
                watch, start = threading.Timer(limit, worker.kill), perf_counter()
                watch.start()
                line = worker.stdout.readline()  # type: ignore[union-attr]
                watch.cancel()
                pairs = pairs[1:]
                if not line:
                    hangs = perf_counter() - start >= limit
                    code = f"its process ended with code {worker.wait()}"
                    yield Result(op, backend, "failed", f"no answer within {limit:.0f} s: it hangs" if hangs else code)
                    break
                result = Result(**json.loads(line))
                yield result
                if result.state == "failed":  # the GPU's context may be broken
                    break


def _command(device: str, pairs: list[tuple[str, str]], end: float) -> list[str]:
    """``main`` for these pairs."""
    return [sys.executable, "-m", "clipfast.check", device, str(end - perf_counter()), *map(" ".join, pairs)]


def main(device: str, seconds: str, *pairs: str) -> None:
    """The other process: a line of JSON for each op × backend as soon as it is known, until one fails."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else prints is no result
    for result in _in_turn(device, [(*pair.split(),) for pair in pairs], perf_counter() + float(seconds)):  # type: ignore[misc]
        print(json.dumps(asdict(result)), file=out, flush=True)
        if result.state == "failed":
            return


def wrongs(op: str, backend: str, case: str | dict[str, Any], dtype: str, device: str) -> list[str]:
    """``disagreements`` on a case, in which whatever a broken kernel or a broken compiler raises is the result."""
    try:
        return disagreements(op, backend, arguments(op, case, DTYPES[dtype], device))
    except dispatch.NoBackend:
        raise
    except Exception as error:  # noqa: BLE001
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def _checked(op: str, backend: str, device: str, until: float) -> Result:
    grid = [(case, dtype) for case in kernels.OPS[op].spec.CASES for dtype in ("fp32", "bf16", "fp16")]
    refused, result = "", Result(op, backend, "passed")
    for result.left, (case, dtype) in zip(reversed(range(len(grid))), grid, strict=True):
        try:
            wrong = wrongs(op, backend, case, dtype, device)
        except dispatch.NoBackend as error:
            refused = refused or str(error).partition("(")[2].removesuffix(")")
            continue
        result.cases += 1
        if wrong:
            return replace(result, state="failed", left=0, detail=f"{case}, {dtype}: {wrong[0]}")
        if perf_counter() > until:
            break
    if not result.cases:
        return Result(op, backend, "absent", refused)
    result.size, result.ms, result.speedup = _speed(op, backend, device)
    return result


def _speed(op: str, backend: str, device: str) -> tuple[str, float, float]:
    """At the first size that it runs: its name, milliseconds of forward and backward and the speed-up over eager PyTorch,
    medians of interleaved rounds."""
    spec, dtype = kernels.OPS[op].spec, torch.float32 if device == "cpu" else torch.bfloat16
    for size, case in (spec.BENCH if device == "cpu" else getattr(spec, "BENCH_GPU", spec.BENCH)).items():
        given = _leaves(op, spec.inputs(torch.Generator().manual_seed(0), **case), dtype, device)
        own: list[float] = []
        eager: list[float] = []
        upstream: list[Tensor] = []
        try:
            with dispatch.use(backend):
                run(getattr(kernels, op), given, upstream)
        except dispatch.NoBackend:
            continue
        upstream = [u.to(device, dtype) for u in upstream]
        for _ in range(10):
            with dispatch.use(backend):
                own.append(_seconds(getattr(kernels, op), given, upstream))
            eager.append(_seconds(getattr(spec, "eager", spec.reference), given, upstream))
        return size, 1e3 * median(own[1:]), median(e / o for e, o in zip(eager[1:], own[1:], strict=True))
    return "", math.nan, math.nan


def _seconds(function: Callable, given: dict[str, Any], upstream: list[Tensor]) -> float:
    start = perf_counter()
    run(function, given, upstream)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def line(result: Result, colour: bool) -> str:
    """One row of the table."""
    state = f"{result.state} before" if result.kept else result.state
    cases = f"{result.cases} cases" + (f", no time for {result.left}" if result.left else "") if result.cases else ""
    speed = f"{result.ms:9.3f} ms  {result.speedup:5.2f} × eager" if math.isfinite(result.ms) else ""
    text = f"{result.op:17} {result.backend:10} {{}} {cases:28} {speed} {result.detail}".rstrip()
    return text.format(f"\033[{COLOURS[result.state]}m{state:13}\033[0m" if colour else f"{state:13}")


def report(device: str, again: bool = False) -> int:
    """Check and print the table; 1 where something failed, else 0."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"expected a GPU for the device {device}, torch {torch.__version__} finds none; check the cpu")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{passed.device_name(device)}{passed.driver() and ', driver ' + passed.driver()}, torch {torch.__version__}")
    states = []
    for result in check(device, again):
        print(line(result, colour), flush=True)
        states.append(result.state)
    print(", ".join(f"{states.count(state)} {state}" for state in COLOURS))
    return int("failed" in states)


if __name__ == "__main__":
    main(*sys.argv[1:])

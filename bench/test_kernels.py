"""Every op at sizes that CLIP has: the automatic choice against eager PyTorch and against each of our backends, both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure, rivals
from bench.measure import DEVICE, DTYPE
from clipfast import kernels
from clipfast.kernels import dispatch, passed


def rows() -> list[Any]:
    """(op, arguments of the case, whether it is the first of its op).

    BENCH any machine affords; BENCH_GPU fills a GPU. A CPU runs the latter with --full only. A GPU runs the ops that have a
    kernel for it, at the sizes that fill it where there are such.
    """
    found = []
    for op, home in kernels.OPS.items():
        small, large = home.spec.BENCH, getattr(home.spec, "BENCH_GPU", {})
        marks: dict[str, Any] = dict.fromkeys(large, [pytest.mark.full])
        if DEVICE == "cuda":
            small, large, marks = {} if large or not on_a_gpu(op) else small, large if on_a_gpu(op) else {}, {}
        cases = small | large
        first = next(iter(cases), None)
        found += [pytest.param(op, case, n == first, id=f"{op} {n}", marks=marks.get(n, [])) for n, case in cases.items()]
    return found


def on_a_gpu(op: str) -> bool:
    """Whether the op has a kernel for GPUs."""
    return any(passed.source_of(op, backend).exists() for backend in ("cuda", "triton"))


def arguments(op: str, case: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Of the public function, in the dtype of the benchmarks, and which of them ask for a gradient."""
    made = kernels.OPS[op].spec.inputs(torch.Generator(DEVICE).manual_seed(0), **case)
    asks = kernels.OPS[op].differentiable
    given = {
        k: (v.to(DEVICE, DTYPE).requires_grad_(asks) if v.is_floating_point() else v.to(DEVICE)) if isinstance(v, Tensor) else v
        for k, v in made.items()
    }
    if given.get("cu_seqlens") is not None:  # as the model has it from the tokenizer: no op need ask the device
        given["max_length"] = int(given["cu_seqlens"].diff().max())
    return given, [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]


def forward_backward(function: Callable, given: dict[str, Any], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """A call of the function and of its backward where it has one, on upstream gradients that are no special number; its first
    output."""
    upstream: list[Tensor] = []

    def run() -> Tensor:
        outputs = function(**given)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        if not upstream:
            generator = torch.Generator(DEVICE).manual_seed(1)
            upstream.extend(torch.empty_like(o).normal_(generator=generator) for o in outputs)
        if leaves:
            torch.autograd.grad(outputs, leaves, upstream)
        return outputs[0].detach()

    return run


def contenders(op: str, given: dict[str, Any], leaves: list[Tensor], first: bool) -> dict[str, Callable[[], Tensor] | str]:
    """Eager PyTorch, other people's kernels and each of our backends on the same arguments, or why one does not run them."""
    spec, ours = kernels.OPS[op].spec, getattr(kernels, op)

    def by(backend: str) -> Callable[..., Any]:
        def forced(**given: Any) -> Any:
            with dispatch.use(backend):
                return ours(**given)

        return forced

    found: dict[str, Callable | str] = {"eager": getattr(spec, "eager", spec.reference), **rivals.of_op(op)}
    if "compiled" in found and DEVICE == "cuda" and not first:
        found["compiled"] = "compiled at the first size only: it takes seconds for each"
    for name in (b for b in dispatch.AUTOMATIC[DEVICE] if passed.source_of(op, b).exists()):
        reason = kernels.OPS[op].backend(name)
        found[f"our {name}"] = reason if isinstance(reason, str) else by(name)
    with torch.no_grad():
        outputs = ours(**given)
    expected = outputs if isinstance(outputs, Tensor) else outputs[0]
    made = {name: call if isinstance(call, str) else tried(call, given, leaves, expected) for name, call in found.items()}
    assert made["eager"] != "it computes something else"
    return made


def tried(function: Callable, given: dict[str, Any], leaves: list[Tensor], expected: Tensor) -> Callable[[], Tensor] | str:
    """Forward and backward by it, once it has been seen to compute the same; a str, the reason, where it refuses."""
    run = forward_backward(function, given, leaves)
    try:
        got = run()
    except Exception as error:  # noqa: BLE001 - whatever a rival raises is the reason
        return measure.reason(error)
    tolerance = 1e-4 if DEVICE == "cpu" else 2e-2
    same = (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    return run if same else "it computes something else"


def floor(spec: Any, case: dict[str, Any]) -> tuple[int, int]:
    """(FLOPs, bytes) of forward and backward."""
    passes = spec.floors(DTYPE.itemsize, **case).values()
    return sum(flops for flops, _ in passes), sum(moved for _, moved in passes)


@pytest.mark.parametrize(("op", "case", "first"), rows())
def test_op(compare, op: str, case: dict[str, Any], first: bool) -> None:
    spec = kernels.OPS[op].spec
    given, leaves = arguments(op, case)
    ours = forward_backward(getattr(kernels, op), given, leaves)
    compare(ours, contenders(op, given, leaves, first), floor=floor(spec, case), graphs=True, op=op)

"""Every op at sizes that CLIP has: the automatic choice against eager PyTorch and against each of our backends, both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
CASES = [pytest.param(op, case, id=f"{op} {case}") for op, home in kernels.OPS.items() for case in home.spec.BENCH]


def forward_backward(function, given: dict, leaves: list[Tensor]):
    """A call of the function and of its backward, on upstream gradients of ones."""
    upstream: list[Tensor] = []

    def run() -> None:
        outputs = function(**given)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        if not upstream:
            upstream.extend(torch.ones_like(o) for o in outputs)
        torch.autograd.grad(outputs, leaves, upstream)

    return run


def by_backend(op: str, backend: str, given: dict, leaves: list[Tensor]):
    """The same by one backend, or the reason why it does not run this."""
    if isinstance(reason := kernels.OPS[op].backend(backend), str):
        return reason
    run = forward_backward(getattr(kernels, op), given, leaves)

    def forced() -> None:
        with dispatch.use(backend):
            run()

    try:
        forced()
    except RuntimeError as error:
        return str(error)
    return forced


@pytest.mark.parametrize(("op", "case"), CASES)
def test_op(compare, op: str, case: str) -> None:
    spec = kernels.OPS[op].spec
    made = spec.inputs(torch.Generator().manual_seed(0), **spec.BENCH[case])
    given = {
        k: (v.to(DEVICE, DTYPE).requires_grad_() if v.is_floating_point() else v.to(DEVICE)) if isinstance(v, Tensor) else v
        for k, v in made.items()
    }
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    rivals = {"eager": forward_backward(getattr(spec, "eager", spec.reference), given, leaves)}
    rivals |= {f"our {name}": by_backend(op, name, given, leaves) for name in dispatch.AUTOMATIC[DEVICE]}
    compare(forward_backward(getattr(kernels, op), given, leaves), rivals, rounds=15)

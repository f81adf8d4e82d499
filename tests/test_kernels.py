"""Every op × backend × case × dtype against its spec in float64, forward and backward (the numerics policy)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [
    pytest.param(op, backend, case, dtype, device, id=f"{op}-{backend}-{case}-{dtype}-{device}")
    for op, home in kernels.OPS.items()
    for device in DEVICES
    for backend in dispatch.BACKENDS
    for case in home.spec.CASES
    for dtype in DTYPES
]


def arguments(op: str, case: str, dtype: torch.dtype, device: str, seed: int = 0) -> dict:
    """The case's arguments in ``dtype``; every floating tensor is a leaf that asks for a gradient."""
    spec = kernels.OPS[op].spec
    made = spec.inputs(torch.Generator().manual_seed(seed), **spec.CASES[case])
    return {
        k: (v.to(device, dtype).requires_grad_() if v.is_floating_point() else v.to(device)) if isinstance(v, Tensor) else v
        for k, v in made.items()
    }


def widened(given: dict) -> dict:
    return {
        k: v.detach().double().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in given.items()
    }


def run(function, given: dict, upstream: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients by argument name, of sum(output · upstream)."""
    outputs = function(**given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    leaves = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    if not upstream:
        generator = torch.Generator().manual_seed(1)
        upstream += [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    given_grads = [u.to(o.device, o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given_grads)
    return [o.detach() for o in outputs], dict(zip(leaves, grads, strict=True))


def check(name: str, got: Tensor, eager: Tensor, truth: Tensor, factor: float) -> None:
    """‖got − truth‖ ≤ factor · ‖eager − truth‖ + one ulp of the output."""
    assert got.shape == truth.shape, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}"
    assert got.dtype == eager.dtype, f"{name}: expected {eager.dtype}, got {got.dtype}"
    error, rival = (got.double() - truth).norm(), (eager.double() - truth).norm()
    ulp = (16 if got.dtype == torch.float64 else 1) * torch.finfo(got.dtype).eps * truth.norm()  # in fp64 eager is the truth
    assert error <= factor * rival + ulp, f"{name}: error {error:.3e}, eager {rival:.3e}, ulp {ulp:.3e}"


def skip_unless_runs(op: str, backend: str, device: str, dtype: str, given: dict) -> None:
    found = kernels.OPS[op].backend(backend)
    if isinstance(found, str):
        pytest.skip(found)
    with dispatch.use(backend):
        try:
            with torch.no_grad():
                getattr(kernels, op)(**given)
        except RuntimeError as error:
            if "no backend runs this" not in str(error):
                raise
            pytest.skip(str(error))


@pytest.mark.parametrize(("op", "backend", "case", "dtype", "device"), ROWS)
def test_matches_spec(op: str, backend: str, case: str, dtype: str, device: str) -> None:
    given = arguments(op, case, DTYPES[dtype], device)
    skip_unless_runs(op, backend, device, dtype, given)
    upstream: list[Tensor] = []
    reference = kernels.OPS[op].spec.reference
    truth, truth_grads = run(reference, widened(given), upstream)
    eager, eager_grads = run(reference, given, upstream)
    with dispatch.use(backend):
        got, got_grads = run(getattr(kernels, op), given, upstream)
        again, again_grads = run(getattr(kernels, op), given, upstream)
    for i in range(len(truth)):
        check(f"output {i}", got[i], eager[i], truth[i], 2)
        assert torch.equal(got[i], again[i]), f"output {i} differs between two equal calls"
    for leaf in truth_grads:
        check(f"gradient of {leaf}", got_grads[leaf], eager_grads[leaf], truth_grads[leaf], 3)
        assert torch.equal(got_grads[leaf], again_grads[leaf]), f"gradient of {leaf} differs between two equal calls"

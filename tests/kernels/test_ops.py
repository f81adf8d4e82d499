"""What holds for the ops as PyTorch operators: opcheck, torch.compile, the choice of a backend, the import guard."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast import kernels
from clipfast.check import arguments
from clipfast.kernels import dispatch

ROOT = Path(__file__).parents[2]
DIFFERENTIABLE = [op for op, home in kernels.OPS.items() if home.differentiable]


class Calls(TorchDispatchMode):
    """Records the calls of one clipfast operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.calls = f"clipfast::{name}", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == self.name:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def called(op: str, **given):
    """Inside, the op's function calls its operator: some take torch's own function where that is faster."""
    takes = op in ("bmm", "convolution", "linear", "layer_norm") or (op == "mlp" and not given.get("quick_gelu", True))
    return dispatch.use("torch") if takes else contextlib.nullcontext()


def public(op: str):
    def run(**given):
        with called(op, **given):
            return getattr(kernels, op)(**given)

    return run


def tensors(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, home in kernels.OPS.items() for case in home.spec.CASES])
def test_opcheck(op: str, case: str) -> None:
    """Schema and fake of the raw operators, forward and backward, on the arguments that the public function gives them."""
    given = arguments(op, case, torch.float32, "cpu")
    with Calls(op) as forward, Calls(f"{op}_backward") as backward:
        outputs = tensors(public(op)(**given))
        if kernels.OPS[op].differentiable:
            torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    assert forward.calls and bool(backward.calls) == ("backward" in kernels.OPS[op].parts)
    for function, args in [*forward.calls, *backward.calls]:
        leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(function, leaves, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", kernels.OPS)
def test_compiles_to_one_graph(op: str) -> None:
    torch.compiler.reset()  # `run` is one function for all ops, of which it compiles no more than eight
    case = next(iter(kernels.OPS[op].spec.CASES))
    given = arguments(op, case, torch.float32, "cpu")
    function = public(op)
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    with called(op):  # a graph, too, chooses the backend as it runs
        expected = tensors(function(**given))
        got = tensors(torch.compile(function, fullgraph=True, backend="aot_eager")(**given))
        upstream = [torch.randn_like(o) for o in expected]
        of_got, of_expected = (torch.autograd.grad(o, leaves, upstream) if leaves else () for o in (got, expected))
    for a, b in zip(got, expected, strict=True):
        if op == "layer_norm":  # torch's own, which the compiler takes apart
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    for a, b in zip(of_got, of_expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", kernels.OPS)
def test_no_gradient_work_without_gradients(op: str) -> None:
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float32, "cpu")
    with torch.no_grad(), Calls(op) as forward, Calls(f"{op}_backward") as backward:
        outputs = tensors(public(op)(**given))
    assert not backward.calls and not any(o.requires_grad for o in outputs)
    # Flags of an op that makes its gradients in the forward pass say which.
    home = kernels.OPS[op]
    assert "backward" in home.parts or not home.differentiable or not any(a is True for a in forward.calls[0][1])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_upstream_gradients_may_have_any_strides(op: str) -> None:
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float64, "cpu")
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
    outputs = tensors(public(op)(**given))
    flat = [torch.full_like(o, 0.7) for o in outputs]
    strange = [torch.tensor(0.7, dtype=o.dtype).expand(o.shape) for o in outputs]
    once = torch.autograd.grad(outputs, leaves, flat, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(outputs, leaves, strange), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", kernels.OPS)
def test_plain_call_equals_the_operator(op: str) -> None:
    """Outside tracing an op calls its backend itself; a dispatch mode that only looks on sends it through the operator."""
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float32, "cpu")
    leaves = [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]

    def run(watched: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with Calls(op) if watched else contextlib.nullcontext() as seen:
            outputs = tensors(public(op)(**given))
            gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]) if leaves else ()
        assert not watched or len(seen.calls) == 1
        return outputs, gradients

    for a, b in zip(*(sum(map(list, run(watched)), []) for watched in (False, True)), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()


@pytest.mark.parametrize("op", kernels.OPS)
def test_without_storage_the_operator_runs(op: str) -> None:
    """On the meta device and with fake tensors, whose shapes alone are asked for."""
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float32, "cpu")
    real = tensors(public(op)(**given))
    meta = tensors(public(op)(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tensors(public(op)(**{k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}))
    for a, b, c in zip(real, meta, fake, strict=True):
        assert a.shape == b.shape == c.shape and a.dtype == b.dtype == c.dtype and b.is_meta and isinstance(c, FakeTensor)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_refused(op: str) -> None:
    """Also where another way to them exists, beside which the op's part would fall silently; the reference has them."""
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float64, "cpu")
    leaf = next(v for v in given.values() if isinstance(v, Tensor) and v.requires_grad)

    def twice(function) -> Tensor:
        (gradient,) = torch.autograd.grad(
            sum(o.square().sum() for o in tensors(function(**given))) + leaf.pow(3).sum(), leaf, create_graph=True
        )
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        twice(public(op))
    with dispatch.use("reference"):
        torch.testing.assert_close(twice(getattr(kernels, op)), twice(kernels.OPS[op].spec.reference))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_function_transforms_take_the_reference(op: str) -> None:
    given = arguments(op, next(iter(kernels.OPS[op].spec.CASES)), torch.float64, "cpu")
    name, leaf = next((k, v.detach()) for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad)

    def total(function, x: Tensor) -> Tensor:
        return sum(o.square().sum() for o in tensors(function(**given | {name: x})))

    ours, reference = getattr(kernels, op), kernels.OPS[op].spec.reference
    direction = torch.randn_like(leaf)
    for transform in (
        lambda f: torch.func.grad(lambda x: total(f, x))(leaf),
        lambda f: torch.func.jvp(lambda x: total(f, x), (leaf,), (direction,))[1],
        lambda f: forward_tangent(lambda x: total(f, x), leaf, direction),
    ):
        torch.testing.assert_close(transform(ours), transform(reference))
        assert transform(ours).abs().max() > 0


def forward_tangent(function, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def test_layer_norm_of_which_only_the_sum_is_used() -> None:
    x, residual, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 64), (4, 64), (64,), (64,)))
    _, s = kernels.layer_norm(x, weight, bias, residual)
    s.backward(torch.full_like(s, 3))
    assert bool((x.grad == 3).all()) and bool((residual.grad == 3).all())
    assert all(p.grad is None or not p.grad.any() for p in (weight, bias))


def test_every_op_has_its_backends() -> None:
    """A backend that is absent has no rows in test_kernels; here it shows when one is."""
    assert set(kernels.OPS) == {"attention", "batch_norm", "bmm", "contrastive", "convolution", "encoder", "fused_mlp",
                                "int8_linear", "layer_norm", "linear", "mlp", "pairwise_sigmoid", "pooling"}  # fmt: skip
    # On a GPU without a kernel of ours in Triton.
    vendors = {"batch_norm", "bmm", "convolution", "encoder", "int8_linear", "linear"}
    for name, op in kernels.OPS.items():
        triton = [] if name in vendors else ["triton"]
        for backend in (
            "torch",
            *triton,
            *(["cpu"] if "cpu" in op.compiled else []),
            *(["onednn"] if name == "linear" else []),
        ):
            assert not isinstance(op.backend(backend), str), f"{name}: {backend}: {op.backend(backend)}"
    assert {name for name, op in kernels.OPS.items() if "cpu" not in op.compiled} == {"fused_mlp", "linear"}


@pytest.mark.parametrize(
    ("op", "shapes"),
    [("bmm", [(2, 3, 4), (2, 5, 3)]), ("bmm", [(2, 3, 4), (1, 4, 3)]), ("bmm", [(3, 4), (4, 3)]),
     ("convolution", [(2, 8, 6, 6), (8, 3, 3, 3)]), ("convolution", [(2, 8, 6, 6), (8, 8, 5, 5)]),
     ("convolution", [(8, 6, 6), (8, 8, 3, 3)])],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(op: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=f"{op}: expected .*, got {re.escape(str(shapes[0]))} and {re.escape(str(shapes[1]))}"):
        getattr(kernels, op)(*(torch.randn(shape) for shape in shapes))


def test_forced_backend_runs_or_says_why_not() -> None:
    given = arguments("mlp", "quick C64", torch.float64, "cpu")
    with dispatch.use("cpu"), pytest.raises(RuntimeError, match="mlp on cpu: no backend runs this .cpu: expected float32"):
        kernels.mlp(**given)
    kernels.mlp(**given)  # the choice is automatic again


def test_kernels_refuses_to_be_imported_by_its_folder_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "import clipfast.kernels, not kernels" in done.stderr


def test_import_needs_neither_compiled_library_nor_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
torch.ops.load_library = None
import clipfast.kernels as kernels
kernels.dispatch.library = lambda kind: "not built"
x = torch.randn(2, 64)
assert kernels.layer_norm(x, x[0], x[1]).shape == (2, 64)
assert kernels.OPS["mlp"].choose(x, x[0], True)[0] == "torch"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("grad", [True, False])
def test_the_exact_gelu_of_a_cpu_is_torchs(grad: bool) -> None:
    """Behind the product that has added the bias; in its place where no gradient needs that."""
    given = arguments("mlp", "exact C64", torch.float64, "cpu")
    with torch.set_grad_enabled(grad), Calls("mlp") as mlp:
        got = kernels.mlp(**given)
    expected = kernels.OPS["mlp"].spec.reference(**given)
    torch.testing.assert_close(got, expected)
    assert not mlp.calls and got.requires_grad == grad
    if grad:
        leaves = [value for value in given.values() if isinstance(value, Tensor)]
        upstream = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("switch", ["fp32_precision", "allow_tf32"])
def test_fp32_products_are_tf32_by_either_of_torchs_switches(switch: str) -> None:
    """Reading the older one raises where the newer was set."""
    pytest.importorskip("triton")
    from clipfast.kernels import tiles
    from clipfast.kernels.attention import triton as attention
    from clipfast.kernels.pooling import triton as pooling

    def precisions() -> set[str]:
        shapes = [tiles.tiles("sums", torch.float32, 64, 90), *attention._tiles(torch.float32, 64, 50)]
        return {shape["PRECISION"] for shape in (*shapes, pooling._tiles(torch.float32, 12, 50))}

    matmul, new = torch.backends.cuda.matmul, switch == "fp32_precision"
    before = getattr(matmul, switch)
    assert precisions() == {"ieee"}
    try:
        setattr(matmul, switch, "tf32" if new else True)
        assert precisions() == {"tf32"}
    finally:
        setattr(matmul, switch, before)
    assert precisions() == {"ieee"} and not matmul.allow_tf32

"""An MLP in CUDA C++, with what torch calls of it, run on the host (cuda_emulator.h), against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from clipfast import kernels
from clipfast.check import DTYPES, disagreements
from clipfast.kernels import passed
from clipfast.kernels.fused_mlp import _supports_cuda, spec, where_faster
from tests.kernels.test_attention_emulated import _on_gpu
from tests.kernels.test_layer_norm_emulated import backend_of

OP = kernels.OPS["fused_mlp"]


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    backend, found = backend_of("fused_mlp", tmp_path_factory.mktemp("emulated"), lambda *args: None), OP.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OP, "backend", lambda name: backend if name == "cuda" else found(name))
        yield


CASES = {
    "one row": dict(rows=1, C=64),
    "exact": dict(rows=3, C=64, quick_gelu=False),
    "blocks of rows and of columns": dict(rows=1030, C=128),
    "C192, transposed": dict(rows=70, C=192, transposed=True),
    "large values": dict(rows=65, C=64, spread=40.0),
    "no rows": dict(rows=0, C=64),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if i % 2 == turn else [pytest.mark.slow])
        for i, name in enumerate(CASES)
        for turn, dtype in enumerate(("bf16", "fp16"))
    ],
)
def test_matches_spec(name: str, dtype: str) -> None:
    made: dict[str, Any] = spec.inputs(torch.Generator().manual_seed(0), **CASES[name])
    given = {k: v.to(DTYPES[dtype]).requires_grad_() if isinstance(v, Tensor) else v for k, v in made.items()}
    assert not disagreements("fused_mlp", "cuda", given)


def test_what_is_kept_and_views() -> None:
    """x starts at an odd place, the weight is transposed, the bias in fp32; h is the product in 16 bit, before the bias."""
    made = spec.inputs(torch.Generator().manual_seed(0), rows=9, C=64)
    x = torch.zeros(9 * 64 + 1, dtype=torch.bfloat16)[1:].view(9, 64).copy_(made["x"])
    weight, bias = made["fc_weight"].bfloat16().T.contiguous().T, made["fc_bias"].float()
    others = made["proj_weight"].bfloat16(), made["proj_bias"].bfloat16()
    z, y, h = OP.backend("cuda").forward(x, weight, bias, *others, True, True)
    product = functional.linear(x.double(), weight.double())
    assert ((h.double() - product).abs() <= 2**-8 * product.abs() + 1e-6).all()
    right = (right := product + bias.double()) * torch.sigmoid(1.702 * right)
    assert ((y.double() - right).abs() <= 2**-8 * right.abs() + 1e-5).all() and torch.equal(z, functional.linear(y, *others))
    again, *nothing = OP.backend("cuda").forward(x, weight, bias, *others, True, False)
    assert torch.equal(again, z) and not any(t.numel() for t in nothing)


def test_the_gradient_of_the_bias_is_summed_in_fp32() -> None:
    """Of 1,030 equal rows, where one in 16 bit would stall; the derivative is 0.5 at zero. dz starts at an odd place."""
    rows, C = 1030, 64
    dz = torch.ones(rows * C + 1, dtype=torch.bfloat16)[1:].view(rows, C)
    weight = torch.zeros(C, 4 * C, dtype=torch.bfloat16)
    weight[0] = torch.arange(4 * C) % 64 + 1
    h, bias = torch.zeros(rows, 4 * C, dtype=torch.bfloat16), torch.zeros(4 * C)
    for quick in (True, False):
        dh, dbias = OP.backend("cuda").backward(dz, weight, h, bias, quick)
        assert torch.equal(dh, (0.5 * weight[0]).expand(rows, -1)) and torch.equal(dbias, rows * 0.5 * weight[0].float())


def test_only_the_gradients_that_are_asked_for() -> None:
    made = spec.inputs(torch.Generator().manual_seed(0), rows=5, C=64)
    given = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in made.items()}
    names = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")
    whole = {name: given[name].detach().requires_grad_() for name in names}
    with kernels.use("cuda"):
        kernels.fused_mlp(**given | whole).sum().backward()
        for name in names:
            leaf = given[name].detach().requires_grad_()
            kernels.fused_mlp(**given | {name: leaf}).sum().backward()
            assert torch.equal(leaf.grad, whole[name].grad)


def test_what_it_supports() -> None:
    def reason(C: int, F: int, dtype=torch.bfloat16, weight=torch.bfloat16) -> str | None:
        return _supports_cuda(_on_gpu(torch.empty(2, C, dtype=dtype)), _on_gpu(torch.empty(F, C, dtype=weight)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert reason(768, 3072) is None
        assert reason(768, 3000) == "expected multiples of 8 and of 256 columns, got 768 and 3000"
        assert "got torch.bfloat16 and torch.float32 on cuda:0" in str(reason(768, 3072, weight=torch.float32))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert reason(768, 3072) == "expected Hopper, compute capability 9.0, got 8.0"


def test_it_is_compared_with_the_products_around_tritons_pass() -> None:
    assert passed.beside("fused_mlp") == "triton"
    sources = passed._closure(passed.source_of("fused_mlp", "triton"), set())
    assert passed.ROOT / "mlp" / "triton.py" in sources and passed.ROOT / "fused_mlp" / "spec.py" in sources


def test_an_mlp_takes_it_only_where_it_is_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def choose(x: Tensor, *rest: Any) -> tuple[str, Any]:
        asked.append(x.dtype)
        return chosen, spec

    weights = torch.empty(256, 64), torch.empty(256), torch.empty(64, 256), torch.empty(64)

    def taken(rows: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return where_faster(_on_gpu(torch.empty(rows, 64, dtype=dtype)), *weights, True) is not None

    monkeypatch.setattr(OP, "choose", choose)
    monkeypatch.setattr(sys.modules[where_faster.__module__], "fused_mlp", lambda x, *rest: x)
    chosen = "torch"
    assert not taken(8192)
    chosen = "cuda"
    assert taken(8192) and not taken(8191) and asked == [torch.bfloat16] * 2
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert taken(8192, torch.float32) and asked[-1] == torch.float16
    assert where_faster(torch.empty(8192, 64), *weights, True) is None  # a CPU's

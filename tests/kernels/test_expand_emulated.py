"""The first half of an MLP in CUDA C++, with what torch calls of it, run on the host (cuda_emulator.h), against float64."""

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
from clipfast.kernels.expand import _supports_cuda, one_kernel, spec
from tests.kernels.test_attention_emulated import _on_gpu
from tests.kernels.test_layer_norm_emulated import backend_of

OP = kernels.OPS["expand"]


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    backend, found = backend_of("expand", tmp_path_factory.mktemp("emulated"), lambda *args: None), OP.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OP, "backend", lambda name: backend if name == "cuda" else found(name))
        # The derivative is another op's, which has no such backend.
        patch.setattr(kernels.OPS["mlp"], "choose", lambda *args: ("torch", kernels.OPS["mlp"].spec))
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
    assert not disagreements("expand", "cuda", given)


def test_what_is_kept_and_views() -> None:
    """x starts at an odd place, the weight is transposed, the bias in fp32; h is the product in 16 bit, before the bias."""
    made = spec.inputs(torch.Generator().manual_seed(0), rows=9, C=64)
    x = torch.zeros(9 * 64 + 1, dtype=torch.bfloat16)[1:].view(9, 64).copy_(made["x"])
    weight, bias = made["weight"].bfloat16().T.contiguous().T, made["bias"].float()
    y, h = OP.backend("cuda").forward(x, weight, bias, True, True)
    product = functional.linear(x.double(), weight.double())
    assert ((h.double() - product).abs() <= 2**-8 * product.abs() + 1e-6).all()
    right = spec.reference(x.double(), weight.double(), bias.double())
    assert ((y.double() - right).abs() <= 2**-8 * right.abs() + 1e-5).all()
    again, nothing = OP.backend("cuda").forward(x, weight, bias, True, False)
    assert torch.equal(again, y) and nothing.numel() == 0


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


def test_an_mlp_takes_it_only_where_it_is_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def choose(x: Tensor, *rest: Any) -> tuple[str, Any]:
        asked.append(x.dtype)
        return chosen, spec

    def taken(rows: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return one_kernel(_on_gpu(torch.empty(rows, 64, dtype=dtype)), torch.empty(256, 64), torch.empty(256), True) is not None

    monkeypatch.setattr(OP, "choose", choose)
    monkeypatch.setattr(sys.modules[one_kernel.__module__], "expand", lambda x, *rest: x)
    chosen = "torch"
    assert not taken(8192)
    chosen = "cuda"
    assert taken(8192) and not taken(8191) and asked == [torch.bfloat16] * 2
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert taken(8192, torch.float32) and asked[-1] == torch.float16
    assert one_kernel(torch.empty(8192, 64), torch.empty(256, 64), torch.empty(256), True) is None  # a CPU's

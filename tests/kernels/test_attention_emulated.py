"""Attention's CUDA C++ source, run on the host thread by thread (tests/kernels/cuda_emulator.h), against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipfast import kernels
from clipfast.check import DTYPES, disagreements
from clipfast.kernels.attention import _supports_cuda, spec
from tests.kernels.test_cuda_emulated import compiled

OP = kernels.OPS["attention"]
HARNESS = r"""
#define CLIPFAST_EMULATED
#include "kernels/attention/cuda.cu"

using namespace clipfast;
using emulated::Memory;

struct Given {
  const void *qkv, *dout, *out, *ends;
  int64_t span, pitch, step, dout_span, dout_pitch, dout_step, B, tokens, longest, heads, causal, half, seed, generation;
};

template <class F> const char* run(const Given& g, const F& f) {
  return emulated::run(g.seed, [&](Memory& m) {
    const auto with = [&](auto t) {
      using T = decltype(t);
      const Matrix<const T> qkv{m.in<T>(g.qkv, g.span), g.pitch, g.step};
      const int* ends = g.ends ? m.in<int>(g.ends, g.B + 1) : nullptr;
      f(m, Call{"emulated", 1, nullptr, {}, {}, int(g.generation)},
        Problem<T>{qkv, ends, g.tokens, g.B * g.heads, int(g.heads), int(g.longest), g.causal > 0});
    };
    g.half ? with(__half{}) : with(__nv_bfloat16{});
  });
}
extern "C" const char* attention(const Given& g, void* out, float* lse) {
  return run(g, [&]<class T>(Memory& m, const Call& call, const Problem<T>& p) {
    forward(call, p, g.longest, m.out(static_cast<T*>(out), g.tokens * g.heads * K), m.out(lse, g.heads * g.tokens));
  });
}
extern "C" const char* attention_backward(const Given& g, const float* lse, void* dqkv) {
  return run(g, [&]<class T>(Memory& m, const Call& call, const Problem<T>& p) {
    const Matrix<const T> dout{m.in<T>(g.dout, g.dout_span), g.dout_pitch, g.dout_step};
    const int64_t C = g.heads * K;
    const Matrix<const T> out{m.in<T>(g.out, g.tokens * C), C, g.longest * C};
    backward(call, p, g.longest, dout, out, m.in<float>(lse, g.heads * g.tokens),
             m.out(static_cast<T*>(dqkv), g.tokens * 3 * g.heads * K));
  });
}
"""


class Given(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "dout", "out", "ends")),
        *((name, ctypes.c_int64) for name in ("span", "pitch", "step", "dout_span", "dout_pitch", "dout_step", "B", "tokens")),
        *((name, ctypes.c_int64) for name in ("longest", "heads", "causal", "half", "seed", "generation")),
    ]


class Emulated:
    """The backend, with a new order of warps on every call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.calls, self.generation = library, 0, 9

    def supports(self, *args: Any) -> str | None:
        return _supports_cuda(_on_gpu(args[-5]), *args[-4:])

    def _given(self, qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int) -> Given:
        self.calls += 1
        given = Given(qkv=qkv.data_ptr(), span=_span(qkv), pitch=qkv.stride(-2), step=qkv.stride(0), heads=heads)
        given.B = len(qkv) if cu_seqlens is None else len(cu_seqlens) - 1
        given.ends = None if cu_seqlens is None else cu_seqlens.data_ptr()
        given.tokens, given.longest = qkv.shape[:-1].numel(), qkv.shape[1] if cu_seqlens is None else max_length
        given.causal, given.half, given.seed = causal, qkv.dtype == torch.float16, self.calls
        given.generation = self.generation
        return given

    def forward(self, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        qkv = _aligned(qkv)
        given = self._given(qkv, *rest)
        out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
        lse = qkv.new_empty((given.heads, given.tokens), dtype=torch.float32)
        self._call("attention", given, out, lse)
        return out, lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
        dout, qkv = _aligned(dout), _aligned(qkv)
        given = self._given(qkv, *rest)
        given.dout, given.dout_span, given.dout_pitch = dout.data_ptr(), _span(dout), dout.stride(-2)
        given.dout_step, given.out = dout.stride(0), out.data_ptr()
        dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        self._call("attention_backward", given, lse, dqkv)
        return dqkv

    def _call(self, name: str, given: Given, *tensors: Tensor) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(ctypes.byref(given), *(ctypes.c_void_p(t.data_ptr()) for t in tensors)) if given.tokens else b""
        assert not error, error.decode()


def _on_gpu(x: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def _aligned(x: Tensor) -> Tensor:
    """As the tail of the source has it."""
    return x if x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) else x.contiguous()


def _span(x: Tensor) -> int:
    """Elements from the first to the last of a view."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    backend, found = Emulated(compiled(HARNESS, tmp_path_factory.mktemp("emulated"))), OP.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(OP, "backend", lambda name: backend if name == "cuda" else found(name))
        yield backend


CASES = {
    name: case
    for name, case in spec.CASES.items()
    if case.get("K", 64) == 64 and max(case["lengths"], default=0) <= (128 if case.get("causal") else 640)
}
CASES |= {
    "L16, heads over CTAs": dict(lengths=(16, 16, 16), heads=3),
    "L32, causal": dict(lengths=(32,) * 2, heads=3, causal=True),
    "L33": dict(lengths=(33,)),
    "L64": dict(lengths=(64,)),
    "L65, causal": dict(lengths=(65,), causal=True),
    "L80": dict(lengths=(80,), heads=2),
    "L81": dict(lengths=(81,)),
    "L128": dict(lengths=(128,)),
    "L128, causal": dict(lengths=(128,), causal=True),
    "packed, of all lengths": dict(lengths=(0, 77, 1, 16, 0, 33, 64, 2), heads=2, packed=True),
    "packed, of all lengths, causal": dict(lengths=(1, 0, 128, 17, 0, 49, 1), packed=True, causal=True),
    "packed, of up to 16": dict(lengths=(9, 0, 1, 16, 5), heads=2, packed=True, causal=True),
    "sharp, causal": dict(lengths=(77,), spread=8.0, causal=True),
    "L129, two heads": dict(lengths=(129,), heads=2),
    "L208, sharp": dict(lengths=(208,), spread=8.0),
    "L192, in whole blocks": dict(lengths=(192,)),
    "L200, of eight heads": dict(lengths=(200,) * 2, heads=4),
    "L577": dict(lengths=(577,)),
    "L150, batch inside": dict(lengths=(150,) * 2, layout="batch inside"),
    "packed, of all lengths up to 144": dict(lengths=(0, 144, 1, 16, 0, 33), packed=True),
    "packed, L197 and 208": dict(lengths=(197, 208), packed=True),
    "packed, sharp": dict(lengths=(257,), packed=True, spread=8.0),
}


def inputs(dtype: torch.dtype, seed: int = 0, **case: Any) -> dict[str, Any]:
    """Arguments of ``attention``; the projection asks for a gradient."""
    given = spec.inputs(torch.Generator().manual_seed(seed), **case)
    return given | {"qkv": given["qkv"].to(dtype).requires_grad_()}


def by_turns(*cases: tuple) -> list[Any]:
    """Each case in one of the types, the other left to ``make test-all``; a case ends with its place in the turn."""
    return [
        pytest.param(*case, dtype, marks=[] if turn % 2 == ("bf16", "fp16").index(dtype) else [pytest.mark.slow])
        for *case, turn in cases
        for dtype in ("bf16", "fp16")
    ]


@pytest.mark.parametrize(("name", "dtype"), by_turns(*((name, i) for i, name in enumerate(CASES))))
def test_matches_spec(emulated: Emulated, name: str, dtype: str) -> None:
    """The numerics policy, and that the order of warps does not matter: each call has its own."""
    assert not disagreements("attention", "cuda", inputs(DTYPES[dtype], **CASES[name]))


@pytest.mark.parametrize("length", [50, 130])
def test_scores_that_are_all_low(emulated: Emulated, length: int) -> None:
    """A key behind the end, whose score is zero, would weigh e¹²⁸."""
    given = inputs(torch.bfloat16, lengths=(length,))
    with torch.no_grad():
        given["qkv"].mul_(0.1).add_(torch.tensor([4.0, -4.0, 0.0]).repeat_interleave(64))
    assert not disagreements("attention", "cuda", given)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "packed"), [(432, True), (640, False)])
def test_the_longest(emulated: Emulated, length: int, packed: bool) -> None:
    assert not disagreements("attention", "cuda", inputs(torch.bfloat16, lengths=(length,), packed=packed))


def test_a_gpu_that_came_after_wgmma(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "generation", 10)
    assert not disagreements("attention", "cuda", inputs(torch.float16, lengths=(257,)))


def truth(given: dict[str, Any], upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse [H, T] and dqkv in float64."""
    wide = given["qkv"].detach().double().requires_grad_()
    out = spec.reference(**given | {"qkv": wide})
    (dqkv,) = torch.autograd.grad(out, wide, upstream.double())
    ends = given["cu_seqlens"]
    flat = wide.detach().flatten(0, -2)
    parts = flat.tensor_split(ends[1:-1].cpu()) if ends is not None else flat.split(wide.shape[-2])
    lse = []
    for part in parts:
        q, k, _ = part.unflatten(-1, (3, given["heads"], -1)).permute(1, 2, 0, 3)
        scores = q @ k.mT / 8
        if given["causal"]:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf)
        lse.append(scores.logsumexp(-1))
    return out.detach(), torch.cat(lse, -1), dqkv


@pytest.mark.parametrize(
    ("length", "causal", "dtype"),
    by_turns(
        *((length, causal, i + causal) for i, length in enumerate((1, 2, 15, 17, 31, 48, 50, 63, 77, 79, 100, 127, 145))
          for causal in (False, True) if length <= 128 or not causal)
    ),
)  # fmt: skip
def test_every_row_of_strided_tensors(emulated: Emulated, length: int, causal: bool, dtype: str) -> None:
    """Each row of a head against its truth, within buffers of NaN; the upstream gradient has rows all alike (stride 0)."""
    B, H, C = 2, 3, 192
    given = inputs(DTYPES[dtype], seed=length, lengths=(length,) * B, heads=H, causal=causal)
    buffer = torch.full((B, length + 1, 3 * C + 24), torch.nan, dtype=DTYPES[dtype])
    buffer[:, :length, 8 : 3 * C + 8] = given["qkv"].detach()
    qkv, upstream = buffer[:, :length, 8 : 3 * C + 8], torch.randn(C, generator=torch.Generator().manual_seed(1))
    dout = upstream.to(qkv.dtype).expand(B, length, C)
    rest = (None, H, causal, 0)
    out, lse = emulated.forward(qkv, *rest)
    dqkv = emulated.backward(dout, out, lse, qkv, *rest)
    expected = truth(given, dout)
    assert (lse.double() - expected[1]).abs().max() < 1.5e-6
    eps = torch.finfo(qkv.dtype).eps
    for got, right in ((out, expected[0]), (dqkv, expected[2])):
        got, right = (x.double().unflatten(-1, (-1, 64)) for x in (got, right))
        # Against the largest row of the head's sequence; that of a sole key's q and k is zero.
        error = (got - right).norm(dim=-1) / right.norm(dim=-1).amax(1, keepdim=True).clamp_min(1e-3)
        assert error.max() < eps, f"row off by {error.max() / eps:.2f} eps"


@pytest.mark.parametrize(("L", "causal"), [(70, False), (70, True), (130, False)])
@pytest.mark.parametrize("part", ["q", "k", "v", "dout"])
def test_nan_reaches_what_depends_on_it_and_no_other_head(emulated: Emulated, part: str, L: int, causal: bool) -> None:
    """Rows and keys that do not see each other may have the NaN or not: 0 · NaN is one, for the reference too."""
    H, at = 2, 37
    given = inputs(torch.bfloat16, lengths=(L, L), heads=H, causal=causal)
    qkv, dout = given["qkv"].detach(), torch.ones(2, L, 64 * H, dtype=torch.bfloat16)
    (dout if part == "dout" else qkv.unflatten(-1, (3, -1))[:, :, "qkv".index(part)])[1, at, 70] = torch.nan
    rest = (None, H, causal, 0)
    out, lse = emulated.forward(qkv, *rest)
    got = (out, *emulated.backward(dout, out, lse, qkv, *rest).chunk(3, -1))
    right_out, right_lse, right_dqkv = truth(given, dout)
    seen = slice(at, None) if causal else slice(None)
    seeing = slice(at + 1) if causal else slice(None)
    for x, right, rows in zip(got, (right_out, *right_dqkv.chunk(3, -1)), (seen, seen, seeing, seeing), strict=True):
        assert not x[0].isnan().any() and not x[1, :, :64].isnan().any()
        assert torch.equal(x.isnan()[:, rows], right.isnan()[:, rows])
    assert torch.equal(lse.unflatten(-1, (2, L))[..., seen].isnan(), right_lse.unflatten(-1, (2, L))[..., seen].isnan())
    assert part == "dout" or got[0].isnan().any()


@pytest.mark.parametrize(("length", "most"), [(40, 16), (180, 144)])
def test_a_length_beyond_max_length_is_cut(emulated: Emulated, length: int, most: int) -> None:
    """A GPU trusts the caller's bound; a wrong one writes nothing outside shared memory."""
    given = inputs(torch.float16, lengths=(3, length, 5), packed=True)
    qkv, ends = given["qkv"].detach(), given["cu_seqlens"]
    out, lse = emulated.forward(qkv, ends, 1, False, most)
    dqkv = emulated.backward(torch.ones_like(out), out, lse, qkv, ends, 1, False, most)
    cut = slice(3 + most, 3 + length)
    assert out[cut].isnan().all() and dqkv[cut].isnan().all()  # not written
    assert not out[: cut.start].isnan().any() and not out[cut.stop :].isnan().any()


def test_what_it_supports() -> None:
    def reason(shape: tuple[int, ...], dtype=torch.bfloat16, ends: Tensor | None = None, heads=2, longest=0, causal=False):
        return _supports_cuda(_on_gpu(torch.empty(shape, dtype=dtype)), ends, heads, causal, longest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        ends = torch.tensor([0, 500, 999])
        assert reason((4, 128, 384)) is None and reason((999, 384), torch.float16, ends, longest=128) is None
        assert reason((4, 129, 384)) == "expected sequences of at most 128 tokens, got 129"
        assert reason((999, 384), ends=ends, longest=500) == "expected sequences of at most 128 tokens, got 500"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert reason((4, 640, 384)) is None and reason((999, 384), ends=ends, longest=432) is None
        assert reason((4, 641, 384)) == "expected sequences of at most 640 tokens, got 641"
        assert reason((999, 384), ends=ends, longest=500) == "expected sequences of at most 432 tokens, got 500"
        assert reason((4, 129, 384), causal=True) == "expected sequences of at most 128 tokens, got 129"
        assert reason((4, 50, 384), torch.float32) == "expected float16 or bfloat16, got torch.float32"
        assert reason((4, 50, 384), heads=4) == "expected heads of 64 columns, got 32"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert reason((4, 433, 384)) == "expected sequences of at most 432 tokens, got 433"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert reason((4, 50, 384)) == "expected compute capability 8.0 or later"
    assert _supports_cuda(torch.empty(4, 50, 384), None, 2, False, 0) == "expected CUDA tensors, got cpu"

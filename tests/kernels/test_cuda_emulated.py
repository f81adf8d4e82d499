"""The Hopper kernels' own source, run on the host thread by thread (tests/kernels/cuda_emulator.h), against float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
HARNESS = r"""
#define CLIPFAST_EMULATED
#include "kernels/contrastive/cuda.cu"
#define forward sigmoid_forward
#include "kernels/pairwise_sigmoid/cuda.cu"

namespace {
using namespace clipfast;
using emulated::Memory;

struct Given {
  const void *image, *text;
  int n, N, D;
  float scale;
  int64_t offset;
  int half, sms, seed;
};

template <class F> const char* run(const Given& g, const F& f) {
  return emulated::run(g.seed, [&](Memory& m) {
    const auto allocate = [&](int64_t bytes) { return m.space(bytes); };
    const Call call{"emulated", g.sms, nullptr, allocate, [] { return static_cast<void*>(nullptr); }};
    const auto with = [&](auto t) {
      using T = decltype(t);
      const T* image = m.in<T>(g.image, int64_t{g.n} * g.D);
      const T* text = m.in<T>(g.text, int64_t{g.N} * g.D);
      f(m, call, Problem<T>{image, text, g.n, g.N, g.D, m.in<float>(&g.scale, 1), g.offset});
    };
    g.half ? with(__half{}) : with(__nv_bfloat16{});
  });
}
}  // namespace

// cuBLAS: matrices by columns, op 1 the transpose; with beta zero C is not read
extern "C" int cublasSetPointerMode_v2(void*, int mode) { return mode >> 1; }
extern "C" int cublasGemmEx(
    void*, int turn_a, int turn_b, int m, int n, int k, const void* alpha, const void* a, int type, int lda, const void* b,
    int type_b, int ldb, const void* beta, void* c, int type_c, int ldc, int compute, int) {
  if (type != type_b || type_c != CUDA_R_32F || compute != 68) return 7;
  if (lda < (turn_a ? k : m) || ldb < (turn_b ? n : k) || ldc < m) return 7;
  const auto read = [type](const void* p, int64_t at) {
    const uint16_t bits = static_cast<const uint16_t*>(p)[at];
    return type == CUDA_R_16F ? static_cast<float>(__builtin_bit_cast(_Float16, bits)) : __bfloat162float({bits});
  };
  const float by = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  std::vector<float> left(static_cast<size_t>(m) * k), sum(m);
  for (int64_t l = 0; l < k; ++l)
    for (int64_t i = 0; i < m; ++i) left[l * m + i] = read(a, turn_a ? i * lda + l : l * lda + i);
  for (int64_t j = 0; j < n; ++j) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t l = 0; l < k; ++l) {
      const float right = read(b, turn_b ? l * ldb + j : j * ldb + l);
      for (int64_t i = 0; i < m; ++i) sum[i] += left[l * m + i] * right;
    }
    for (int64_t i = 0; i < m; ++i) {
      float& out = static_cast<float*>(c)[j * ldc + i];
      out = by * sum[i] + (keep != 0.0f ? keep * out : 0.0f);
    }
  }
  return 0;
}

extern "C" int64_t block_bytes(int64_t n, int64_t N, int64_t D, int sms) {
  const Block block = make_block(n, N, D, sms);
  return divide_up(block.rows, 256) * 256 * divide_up(block.columns, 256) * 256 * 2 + divide_up(block.columns, 32) * 32 * D * 2;
}

using Floats = const float*;
extern "C" const char* contrastive(
    const Given& g, float* row_top, float* row_sum, float* col_top, float* col_sum, float* diagonal) {
  return run(g, [&](Memory& m, const Call& call, const auto& p) {
    float* pairs = m.out(diagonal, g.n);
    std::fill(pairs, pairs + g.n, 0.0f);
    statistics(call, p, m.out(row_top, g.n), m.out(row_sum, g.n), m.out(col_top, g.N), m.out(col_sum, g.N), pairs);
  });
}
extern "C" const char* contrastive_backward(
    const Given& g, Floats row_lse, Floats col_lse, Floats row_grad, Floats col_grad, Floats diagonal_grad, float* image_grad,
    float* text_grad) {
  return run(g, [&](Memory& m, const Call& call, const auto& p) {
    const auto rows = [&](Floats from) { return m.in<float>(from, g.n); };
    const auto columns = [&](Floats from) { return m.in<float>(from, g.N); };
    backward(call, p, rows(row_lse), columns(col_lse), rows(row_grad), columns(col_grad), rows(diagonal_grad),
             m.out(image_grad, int64_t{g.n} * g.D), m.out(text_grad, int64_t{g.N} * g.D));
  });
}
extern "C" const char* pairwise_sigmoid(
    const Given& g, Floats bias, float* loss, float* slope, float* image_grad, float* text_grad) {
  return run(g, [&](Memory& m, const Call& call, const auto& p) {
    sigmoid_forward(call, p, m.in<float>(bias, 1), m.out(loss, g.n), m.out(slope, g.n),
                    m.out(image_grad, int64_t{g.n} * g.D), m.out(text_grad, int64_t{g.N} * g.D));
  });
}
"""


class Given(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("image", "text")),
        *((name, ctypes.c_int) for name in ("n", "N", "D")),
        ("scale", ctypes.c_float),
        ("offset", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("half", "sms", "seed")),
    ]


def compiled(harness: str, work: Path, with_torch: bool = False) -> ctypes.CDLL:
    """The library of a harness that includes kernels, with or without torch; skips the test where there is no compiler."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not on the PATH")
    (work / "harness.cpp").write_text(harness)
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-fno-strict-aliasing"]
    if with_torch:
        libraries = Path(torch.__file__).parent
        flags += [f"-I{libraries}/include", f"-L{libraries}/lib", f"-Wl,-rpath,{libraries}/lib", "-ltorch_cpu", "-ltorch"]
    includes = [f"-I{ROOT / folder}" for folder in ("", "kernels", "tests/kernels")]
    command = [compiler, *includes, str(work / "harness.cpp"), *flags, "-o", str(work / "harness.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(work / "harness.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(HARNESS, tmp_path_factory.mktemp("emulated"))


class Case:
    """Features, float64 similarities and where the pairs lie; ``sms`` is how many SMs the kernels believe to have."""

    def __init__(
        self, n: int, N: int, D: int, *, scale=14.3, offset=0, dtype=torch.bfloat16, kind="random", sms=4, seed=0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        image, text = (
            F.normalize(torch.randn(k, D, generator=generator, dtype=torch.float64), dim=1).to(dtype) for k in (n, N)
        )
        if kind == "identical":
            image, text = text[:1].repeat(n, 1), text[:1].repeat(N, 1)
        elif kind == "opposite":
            image = -text[torch.arange(n) % N]
        elif kind == "orthogonal":
            image, text = torch.eye(n, D, dtype=dtype), torch.eye(N, D, dtype=dtype)
        elif kind == "apart":  # rows and columns that a maximum of their tile would flush to nothing
            image *= (1 + torch.arange(n) % 2)[:, None]
            text *= torch.where(torch.arange(N) % 3 == 0, -2, 1)[:, None]
            image[:, 0] += 1
            text[:, 0] += 1
        elif kind == "NaN":
            image[n // 2, 3] = torch.nan
        self.image, self.text, self.scale, self.dtype = image.contiguous(), text.contiguous(), scale, dtype
        self.generator = generator
        self.s = torch.tensor(scale).double() * image.double() @ text.double().T
        i, j = torch.arange(n)[:, None], torch.arange(N)
        self.pair = j == i + offset
        self.given = Given(image=self.image.data_ptr(), text=self.text.data_ptr(), n=n, N=N, D=D, scale=scale, offset=offset)
        self.given.half, self.given.sms, self.given.seed = dtype == torch.float16, sms, seed

    def call(self, function, *args: Tensor | None) -> None:
        function.restype = ctypes.c_char_p
        kept = [ctypes.c_void_p(None if a is None else a.data_ptr()) for a in args]
        error = function(ctypes.byref(self.given), *kept)
        assert not error, error.decode()


def close(got: Tensor, truth: Tensor, tolerance: float) -> None:
    """NaN where the truth is NaN; elsewhere ‖got − truth‖ ≤ tolerance · ‖truth‖."""
    assert torch.equal(got.isnan(), truth.isnan())
    error = (got.double() - truth).nan_to_num().norm() / truth.nan_to_num().norm().clamp_min(1e-300)
    assert error <= tolerance, f"relative error {error:.2e}"


CASES = {
    "one tile, D 64": dict(n=100, N=130, D=64),
    "one pair, D 8": dict(n=1, N=1, D=8),
    "D 72, row blocks and parts": dict(n=700, N=900, D=72, offset=-300, sms=8),
    "D 512, fp16": dict(n=300, N=515, D=512, offset=7, dtype=torch.float16),
    "D 1152": dict(n=256, N=256, D=1152, offset=255),
    "one cluster for all": dict(n=600, N=700, D=64, offset=100, sms=2),
    "more SMs than work": dict(n=40, N=700, D=64, offset=560, sms=132),
    "pairs outside": dict(n=40, N=300, D=64, offset=300),
    "scale 100": dict(n=300, N=300, D=64, scale=100.0, dtype=torch.float16),
    "scale -100": dict(n=90, N=600, D=64, scale=-100.0, offset=500),
    "identical": dict(n=260, N=300, D=64, kind="identical", scale=100.0),
    "opposite": dict(n=260, N=300, D=64, kind="opposite", scale=100.0),
    "orthogonal": dict(n=64, N=64, D=64, kind="orthogonal", scale=50.0),
    "apart": dict(n=300, N=600, D=64, kind="apart", scale=60.0, sms=2),
    "NaN": dict(n=300, N=300, D=64, kind="NaN", offset=200),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics(library: ctypes.CDLL, name: str) -> None:
    case = Case(**CASES[name])
    n, N = case.s.shape
    row_top, row_sum, diagonal = (torch.empty(n) for _ in range(3))
    col_top, col_sum = torch.empty(N), torch.empty(N)
    case.call(library.contrastive, row_top, row_sum, col_top, col_sum, diagonal)
    for top, total, dim in ((row_top, row_sum, 1), (col_top, col_sum, 0)):
        truth = case.s.logsumexp(dim)
        # fp32 rounds the products of s and s itself: 3e-5 at 100
        assert torch.equal(truth.isnan(), total.isnan())
        error = (top.double() + total.double().log() - truth).nan_to_num().abs().max()
        assert error <= 4e-7 + 3e-7 * case.s.nan_to_num().abs().max(), f"error {error:.2e}"
        assert (top.double() - truth).nan_to_num().abs().max() < 1  # the reference lies within a bit of the result
    close(diagonal, torch.where(case.pair, case.s, 0.0).sum(1), 3e-7)


def test_a_small_loss_is_exact(library: ctypes.CDLL) -> None:
    """Near 100 fp32 has steps of 8e-6, and a loss taken from s itself is still right to 1e-6."""
    for scale in (96.1, 97.3, 99.9):
        case = Case(64, 64, 64, kind="identical", scale=scale)
        row_top, row_sum, diagonal, col_top, col_sum = (torch.empty(64) for _ in range(5))
        case.call(library.contrastive, row_top, row_sum, col_top, col_sum, diagonal)
        loss = (row_top - diagonal) + row_sum.log()
        assert (loss.double() - torch.tensor(64.0).double().log()).abs().max() < 1e-6


def by_turns(first: float, second: float) -> list[Any]:
    """Each case with one of the two, the others left to ``make test-all``."""
    return [
        pytest.param(name, value, marks=[] if i % 2 == turn else [pytest.mark.slow])
        for i, name in enumerate(CASES)
        for turn, value in enumerate((first, second))
    ]


@pytest.mark.parametrize(("name", "spread"), by_turns(0.0, 200.0))
def test_gradients(library: ctypes.CDLL, name: str, spread: float) -> None:
    """``spread`` drives the log-sum-exps so far apart that one exponential cannot serve rows and columns."""
    case = Case(**CASES[name])
    n, N = case.s.shape
    row_lse, col_lse = case.s.logsumexp(1) + torch.linspace(0, spread, n), case.s.logsumexp(0)
    row_grad, col_grad, diagonal_grad = ((torch.rand(k, generator=case.generator) - 0.2) / (2 * N) for k in (n, N, n))
    row_lse, col_lse = row_lse.float(), col_lse.float()
    G = row_grad[:, None] * (case.s - row_lse[:, None]).exp() + col_grad * (case.s - col_lse).exp()
    G = torch.where(case.pair, diagonal_grad.double()[:, None], G)
    image_grad, text_grad = torch.empty(n, case.given.D), torch.empty(N, case.given.D)
    statistics = (row_lse, col_lse, row_grad, col_grad, diagonal_grad)
    case.call(library.contrastive_backward, *statistics, image_grad, text_grad)
    eps = torch.finfo(case.dtype).eps
    close(image_grad, G @ case.text.double(), eps)
    close(text_grad, G.T @ case.image.double(), eps)


def test_tiny_gradients_and_only_one_wanted(library: ctypes.CDLL) -> None:
    case = Case(130, 300, 64, dtype=torch.float16, offset=5)
    row_lse, col_lse = case.s.logsumexp(1).float(), case.s.logsumexp(0).float()
    row_grad, col_grad, diagonal_grad = (torch.full((k,), 1e-9) for k in (130, 300, 130))
    G = row_grad[:, None] * (case.s - row_lse[:, None]).exp() + col_grad * (case.s - col_lse).exp()
    G = torch.where(case.pair, diagonal_grad.double()[:, None], G)
    text_grad = torch.empty(300, 64)
    case.call(library.contrastive_backward, row_lse, col_lse, row_grad, col_grad, diagonal_grad, None, text_grad)
    close(text_grad, G.T @ case.image.double(), 1e-3)


@pytest.mark.parametrize(("which", "place"), [("row_grad", 300), ("col_grad", 519), ("diagonal_grad", 519)])
def test_the_unit_of_G_is_that_of_the_largest_gradient(library: ctypes.CDLL, which: str, place: int) -> None:
    case = Case(520, 520, 8, dtype=torch.float16, sms=2)
    names = ("row_lse", "col_lse", "row_grad", "col_grad", "diagonal_grad")
    given = {name: torch.full((520,), 15.0 if "lse" in name else 1e-9) for name in names}
    given[which][place] = 0.5
    weights = [given[f"{side}_grad"].double() * (-given[f"{side}_lse"].double()).exp() for side in ("row", "col")]
    G = case.s.exp() * (weights[0][:, None] + weights[1])
    G = torch.where(case.pair, given["diagonal_grad"].double()[:, None], G)
    image_grad, text_grad = torch.empty(520, 8), torch.empty(520, 8)
    case.call(library.contrastive_backward, *given.values(), image_grad, text_grad)
    close(image_grad, G @ case.text.double(), 2e-3)
    close(text_grad, G.T @ case.image.double(), 2e-3)


@pytest.mark.parametrize(("name", "bias"), by_turns(-10.0, 3.0))
def test_sigmoid(library: ctypes.CDLL, name: str, bias: float) -> None:
    case = Case(**CASES[name])
    n, N = case.s.shape
    sign = torch.where(case.pair, -1.0, 1.0).double()
    l = sign * (case.s + bias)
    g = sign * l.sigmoid()
    loss, slope, image_grad, text_grad = (torch.empty(shape) for shape in ((n,), (n,), (n, case.given.D), (N, case.given.D)))
    case.call(library.pairwise_sigmoid, torch.tensor(bias), loss, slope, image_grad, text_grad)
    close(loss, (l.clamp(min=0) + (-l.abs()).exp().log1p()).sum(1), 2e-6)
    close(slope, g.sum(1), 2e-6)
    eps = torch.finfo(case.dtype).eps
    close(image_grad, g @ case.text.double(), eps)
    close(text_grad, g.T @ case.image.double(), eps)
    without = torch.empty(n), torch.empty(n)
    case.call(library.pairwise_sigmoid, torch.tensor(bias), *without, None, None)
    close(without[0], loss.double(), 2e-6)
    close(without[1], slope.double(), 2e-6)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["contrastive", "sigmoid"])
def test_gradients_in_bf16_have_less_error_than_eagers_under_autocast(
    library: ctypes.CDLL, sigmoid: bool, scale: float
) -> None:
    """Whose features are in fp32 and rounded for the product alone; and they are the same in any order of the warps."""
    N, bias = 300, -10.0
    case = Case(N, N, 64, scale=scale)
    case.text = F.normalize(case.text.double() + 0.5 * case.image.double(), dim=1).bfloat16()  # pairs that are alike
    case.given.text = case.text.data_ptr()

    def eager(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (case.image, case.text)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = (scale * leaves[0] @ leaves[1].T).to(dtype)
        if sigmoid:
            loss = -F.logsigmoid((2 * torch.eye(N) - 1) * (logits + bias)).sum() / N
        else:
            loss = sum(F.cross_entropy(x, torch.arange(N)) for x in (logits, logits.T)) / 2
        return list(torch.autograd.grad(loss, leaves))

    def ours(seed: int) -> list[Tensor]:
        case.given.seed, found = seed, [torch.empty(N, 64), torch.empty(N, 64)]
        if sigmoid:
            case.call(library.pairwise_sigmoid, torch.tensor(bias), torch.empty(N), torch.empty(N), *found)
            return [(scale / N * x).bfloat16() for x in found]
        row_top, row_sum, col_top, col_sum, diagonal = (torch.empty(N) for _ in range(5))
        case.call(library.contrastive, row_top, row_sum, col_top, col_sum, diagonal)
        lse = [row_top + row_sum.log(), col_top + col_sum.log()]
        each = torch.full((N,), 0.5 / N)
        pairs = each * sum((diagonal - x).expm1() for x in lse)
        case.call(library.contrastive_backward, *lse, each, each, pairs, *found)
        return [(scale * x).bfloat16() for x in found]

    for mine, again, other, true in zip(ours(0), ours(1), eager(torch.float32), eager(torch.float64), strict=True):
        assert (mine - true).norm() < (other - true).norm() and torch.equal(mine, again)


@pytest.mark.parametrize(
    ("n", "N", "D", "most"), [(65536, 65536, 768, 640), (65536, 65536, 1152, 760), (8192, 65536, 768, 450)]
)
def test_memory_is_that_of_the_gradients_and_a_block(library: ctypes.CDLL, n: int, N: int, D: int, most: int) -> None:
    """In MB, on the 132 SMs of an H100; sums of a block's rows included."""
    library.block_bytes.restype = ctypes.c_int64
    block = library.block_bytes(*map(ctypes.c_int64, (n, N, D)), 132)
    assert block > 1e8 and 4 * (n + N) * D + block + 66 * 8 * 16896 < most * 1e6


def test_the_order_of_warps_does_not_matter(library: ctypes.CDLL) -> None:
    results = []
    for seed in range(3):
        case = Case(300, 600, 64, offset=30, sms=8)
        case.given.seed = seed
        results.append([torch.empty(k) for k in (300, 300, 600, 600, 300)])
        case.call(library.contrastive, *results[-1])
    for others in zip(*results, strict=True):
        assert all(torch.equal(others[0], other) for other in others)

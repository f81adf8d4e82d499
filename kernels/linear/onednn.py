"""The three products of a Linear by oneDNN, which torch carries for convolutions and for torch.compile's Linears."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import dispatch, processor
from clipfast.kernels.linear import spec

# On AMD, MKL (what torch multiplies fp32 matrices with) takes its AVX2 path, oneDNN its AVX-512 path: 117 and 250 GFLOP/s a
# core forward, 115 and 180 to 260 backward on an EPYC of Zen 5 at the towers' shapes (bench/test_kernels.py, "linear").
# On Intel both take AVX-512; before Zen 5 (family 26) AMD's AVX-512 multiplies no faster than AVX2.
_FIRST_FAMILY = 26
# At 2^22 multiply-adds a call saves what it costs beside F.linear, 15 µs forward and 55 backward; at 2^23 it is 1.2 x as fast.
LEAST = 1 << 23


def _lacks() -> str | None:
    """Why this machine's product is F.linear's, so that oneDNN runs on request alone; or None."""
    if not torch.backends.mkl.is_available():
        return "this torch multiplies without MKL, whose AVX2 path on AMD it would replace"
    if processor.NAME != "avx512":
        return f"F.linear is as fast on a processor without AVX-512, got {processor.NAME}"
    vendor, family = processor.cpuid().get("vendor", "unknown"), processor.cpuid().get("family", 0)
    if vendor != "AuthenticAMD" or family < _FIRST_FAMILY:
        return f"F.linear is as fast but on AMD from family {_FIRST_FAMILY} (Zen 5) on, got {vendor}, family {family}"
    return _absent()


def _absent() -> str | None:
    """Why oneDNN cannot run at all, or None."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return "this torch is built without oneDNN"


LACKS = _lacks()


def supports(*args: Any) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    asked = dispatch.forced() or any(t.is_mkldnn for t in tensors)
    low = bool(processor.BF16) and all(t.dtype == torch.bfloat16 for t in tensors)  # F.linear too is oneDNN's there
    if reason := _absent() if asked or low else LACKS:
        return reason
    return None if low and all(t.is_cpu for t in tensors) else _of_other_kind(tensors)


def _of_other_kind(tensors: list[Tensor]) -> str | None:
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return f"expected float32 on the CPU, got {', '.join(sorted({f'{t.dtype} on {t.device}' for t in tensors}))}"
    return None


def lacks_packed(weight: Tensor) -> str | None:
    """Why this weight is not to be packed, or None.

    It pays with AVX2 too, where the choice is F.linear without: products of 12 rows take 0.65 to 0.9 of its time, of 50 rows
    0.66 to 0.9, of 400 rows 0.8 to 0.9 (a Zen 5 held to AVX2, a core).
    """
    if (forced := dispatch.forced()) not in (None, "onednn"):
        return f"{forced} is forced, which does not read it"
    if processor.NAME not in ("avx512", "avx2"):
        return f"expected a processor with AVX-512 or AVX2, got {processor.NAME}"
    return _absent() or _of_other_kind([weight])


def packed(weight: Tensor) -> Tensor:
    """A weight [C_out, C_in] as the product reads it, for ``forward`` alone; for few rows packing takes as long as they do."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias. oneDNN packs b itself, from rows or from columns; rows or columns further apart it would read one by one."""
    b = b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _stepped(x: Tensor) -> Tensor:
    """Packed tokens [T, C] with rows of zeros up to the next multiple of 64.

    oneDNN compiles a product for each new shape, 0.3 ms, where 930 × 128 × 128 takes 0.1, and the T of a batch is seldom seen
    twice. Below 256 rows the shapes are few and soon all there.
    """
    return F.pad(x, (0, 0, 0, -len(x) % 64)) if x.ndim == 2 and len(x) > 256 else x


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], len(weight))) if weight.is_mkldnn else spec.forward(x, weight, bias)
    return _product(_stepped(x), weight, bias)[: len(x)]


def backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (given the weight), of the weight (given x) and of the bias; empty where not asked for."""
    if dy.numel() == 0:
        return spec.backward(dy, x, weight, bias)
    rows = _stepped(dy).flatten(0, -2)
    dx = dweight = dy.new_empty(0)
    if weight is not None:
        dx = _product(rows, weight.T)[: dy.numel() // dy.shape[-1]].view(*dy.shape[:-1], weight.shape[1])
    if x is not None:
        tokens = _stepped(x).flatten(0, -2)
        # The left operand is copied into rows: the narrower one stands there.
        narrow = rows.shape[1] <= tokens.shape[1]
        dweight = _product(rows.T, tokens.T) if narrow else _product(tokens.T, rows.T).T.contiguous()
    return dx, dweight, rows.sum(0) if bias else dy.new_empty(0)

"""A batch of products of matrices: a head's queries with its keys' weights, a head's sums with its values' (pooling)."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.bmm.spec import turned
from clipfast.kernels.linear import onednn, slow
from clipfast.kernels.op import Op, transformable


@transformable
def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a[i]·b[i].

    ``torch.bmm``, the vendor's product, unless that is MKL's on AMD, which does not use AVX-512. Autocast holds.

    Args:
        a: [n, M, K], b: [n, K, N], any strides.

    Returns:
        [n, M, N] in the dtype of ``a``.

    Raises:
        ValueError: a shape does not fit.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"bmm: expected a [n, M, K] and b [n, K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    return torch.bmm(a, b) if _vendors(a, b) else OP(a, b)


def _vendors(a: Tensor, b: Tensor) -> bool:
    """Whether torch.bmm itself is the choice."""
    if (vendors := dispatch.settled(a, "cpu")) is not None:
        return vendors
    return not slow(a, b) or a.numel() * b.shape[-1] < onednn.LEAST


def _supports_cpu(*args: object) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(not t.is_cpu or t.dtype != torch.float32 for t in tensors):
        return "expected float32 tensors on the CPU"
    return "expected matrices that are not empty" if any(t.numel() == 0 for t in tensors) else None


def _fake(a, b):
    return a.new_empty((*a.shape[:2], b.shape[2]))


def _fake_backward(dy, a, b, need_a, need_b):
    def gradient(of: Tensor) -> Tensor:
        return dy.new_empty(of.mT.shape).mT if turned(of) else dy.new_empty(of.shape)

    return gradient(a) if need_a else dy.new_empty(0), gradient(b) if need_b else dy.new_empty(0)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    need = ctx.needs_input_grad
    grads = OP.backward(dy, *ctx.saved_tensors, *need)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


OP = Op(
    __name__,
    forward=("(Tensor a, Tensor b) -> Tensor", _fake),
    backward=("(Tensor dy, Tensor a, Tensor b, bool need_a, bool need_b) -> (Tensor da, Tensor db)", _fake_backward),
    compiled={"cpu": _supports_cpu},
    autograd=(_setup, _backward),
)

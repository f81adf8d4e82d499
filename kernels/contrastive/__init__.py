"""Both log-sum-exps of CLIP's similarity matrix and their gradients, the matrix never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.kernels.op import Op, first_derivative, transformable

_FORWARD = (
    "(Tensor image, Tensor text, Tensor scale, int offset) -> "
    "(Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor diagonal)"
)
_BACKWARD = (
    "(Tensor image, Tensor text, Tensor scale, int offset, Tensor row_lse, Tensor col_lse, Tensor row_grad, Tensor col_grad, "
    "Tensor diagonal_grad, bool want_image, bool want_text) -> (Tensor image_grad, Tensor text_grad)"
)


@transformable
def contrastive(image_features: Tensor, text_features: Tensor, scale: Tensor | float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of the pairs, image to text and text to image, in O((n + N)·D) memory.

    With s_ij = scale·⟨image_i, text_j⟩ in fp32 (fp64 for fp64), whatever the dtype of the features:

    Args:
        image_features: [n, D] fp32, bf16, fp16 or fp64, any strides.
        text_features: [N, D], the same dtype.
        scale: [] of any floating dtype, or a number: the factor itself, not its logarithm.
        offset: the column that is the pair of row 0, so that of row i is i + offset; a row whose pair lies outside 0 .. N - 1
            has none among these columns.

    Returns:
        row_nll [n]: log Σ_j exp(s_ij), less the similarity of the row's pair where it has one. col_nll [N]: the same over the
        rows, log Σ_i exp(s_ij). Both in fp32 (fp64).

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit.
    """
    check_features("contrastive", image_features, text_features)
    scale = check_scalar("contrastive", "scale", scale, image_features)
    return _Contrastive.apply(image_features, text_features, scale, offset)


def check_features(op: str, image: Tensor, text: Tensor) -> None:
    """Raise unless these are [n, D] and [N, D] of one floating dtype on one device; ``op`` is named in the message."""
    if not isinstance(image, Tensor) or not isinstance(text, Tensor):
        raise TypeError(f"{op}: expected tensors as features, got {type(image).__name__} and {type(text).__name__}")
    shapes = f"{tuple(image.shape)} and {tuple(text.shape)}"
    if image.ndim != 2 or text.ndim != 2:
        raise ValueError(f"{op}: expected features [n, D] and [N, D], got {shapes}; flatten them to one row per sample")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"{op}: expected one width D, got {shapes}; project both towers to the same width")
    if not image.is_floating_point() or not text.is_floating_point():
        raise TypeError(f"{op}: expected floating features, got {image.dtype} and {text.dtype}; convert with .float()")
    if image.dtype != text.dtype:
        raise TypeError(f"{op}: expected one dtype, got {image.dtype} and {text.dtype}; convert one with .to(dtype)")
    if image.device != text.device:
        raise ValueError(f"{op}: expected features on one device, got {image.device} and {text.device}; use .to(device)")


def check_scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """``value`` as a floating tensor [] on the device of ``like``; raises where it is none, ``name`` tells which."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((), value, dtype=wide(like), device=like.device)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{op}: expected a number or a floating tensor as {name}, got {got}; pass {name}.float()")
    if value.ndim != 0:
        raise ValueError(f"{op}: expected a scalar {name} of shape (), got {tuple(value.shape)}; pass one number")
    if value.device != like.device:
        raise ValueError(f"{op}: expected {name} on {like.device}, got {value.device}; use .to(device)")
    return value


def paired(n: int, N: int, offset: int) -> tuple[slice, slice]:
    """The rows and the columns that are pairs of each other, row i with column i + offset."""
    first, last = max(0, -offset), max(0, -offset, min(n, N - offset))
    return slice(first, last), slice(first + offset, last + offset)


def inner(features: Tensor, gradient: Tensor) -> Tensor:
    """Σ features·gradient over both dimensions, in the wider type; where they are large, in parts: the product is not kept."""
    parts = 16 if features.numel() > (1 << 20 if features.device.type == "cpu" else 1 << 26) else 1
    return sum((x * y).sum() for x, y in zip(features.chunk(parts), gradient.chunk(parts), strict=True))  # type: ignore[return-value]


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, spend: bool = True) -> Tensor:
    """gradient·factor rounded to ``dtype``, with nothing in between; ``spend``: ``gradient`` may be written over."""
    fits = spend and gradient.dtype == dtype
    return torch.mul(gradient, factor, out=gradient if fits else gradient.new_empty(gradient.shape, dtype=dtype))


def wide(x: Tensor) -> torch.dtype:
    """Fp32, or fp64 for fp64: what statistics and gradients are accumulated in."""
    return torch.promote_types(x.dtype, torch.float32)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, offset):
        row_max, row_sum, col_max, col_sum, diagonal = OP(image, text, scale, offset)
        row_log, col_log = row_sum.log(), col_sum.log()
        rows, columns = paired(len(image), len(text), offset)
        # Near 100 an fp32 log-sum-exp is rounded to 4e-6: the maximum less the diagonal first keeps a small loss exact.
        row_nll, col_nll = (row_max - diagonal) + row_log, col_max + col_log
        col_nll[columns] = (col_max[columns] - diagonal[rows]) + col_log[columns]
        ctx.offset = offset
        ctx.save_for_backward(image, text, scale, row_max + row_log, col_max + col_log, row_nll, col_nll)
        return row_nll, col_nll

    @staticmethod
    @first_derivative
    def backward(ctx, row_grad, col_grad):
        image, text, scale, row_lse, col_lse, row_nll, col_nll = ctx.saved_tensors
        needs_image, needs_text, needs_scale, _ = ctx.needs_input_grad
        want_image = needs_image or (needs_scale and not needs_text)
        rows, columns = paired(len(image), len(text), ctx.offset)
        diagonal_grad = row_grad * torch.expm1(-row_nll)  # p - 1 would cancel where p is near 1
        diagonal_grad[rows] += col_grad[columns] * torch.expm1(-col_nll[columns])
        image_grad, text_grad = OP.backward(
            image, text, scale, ctx.offset, row_lse, col_lse, row_grad, col_grad, diagonal_grad, want_image, needs_text
        )
        # dscale = Σ G_ij·⟨image_i, text_j⟩, which is ⟨image, G·text⟩ as well as ⟨text, Gᵀ·image⟩.
        features, gradient = (image, image_grad) if want_image else (text, text_grad)
        dscale = inner(features, gradient).to(scale.dtype) if needs_scale else None
        image_grad = scaled(image_grad, scale, image.dtype)  # one after the other: each frees its wider self
        text_grad = scaled(text_grad, scale, text.dtype)
        return (
            image_grad if needs_image else None,
            text_grad if needs_text else None,
            dscale,
            None,
        )


def supports_cpu(image: Tensor, text: Tensor, *rest: object) -> str | None:
    """Of the C++ kernels of both losses over all pairs."""
    if image.device.type != "cpu" or image.dtype != torch.float32:
        return f"expected float32 on the CPU, got {image.dtype} on {image.device}"
    return None if image.numel() and text.numel() else "expected at least one row and one column"


def supports_cuda(image: Tensor, text: Tensor, *rest: object) -> str | None:
    """Of the CUDA C++ kernels of both losses over all pairs."""
    if image.device.type != "cuda" or image.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16 on CUDA, got {image.dtype} on {image.device}"
    if (capability := torch.cuda.get_device_capability(image.device)) != (9, 0):
        return f"expected Hopper, compute capability 9.0, got {capability[0]}.{capability[1]}"
    D = image.shape[1]
    if D % 8 or D > 1536:
        return f"expected a width D that is a multiple of 8, at most 1536, got {D}"
    if any(x.is_contiguous() and x.data_ptr() % 16 for x in (image, text)):
        return "expected features that start at a multiple of 16 bytes; pass a copy"
    return None if image.numel() and text.numel() else "expected at least one row and one column"


def _fake(image, text, scale, offset):
    rows, columns = (x.new_empty(x.shape[0], dtype=wide(x)) for x in (image, text))
    return rows, torch.empty_like(rows), columns, torch.empty_like(columns), torch.empty_like(rows)


def _fake_backward(image, text, scale, offset, row_lse, col_lse, row_grad, col_grad, diagonal_grad, want_image, want_text):
    return fake_gradients(image, text, want_image, want_text)


def fake_gradients(image: Tensor, text: Tensor, want_image: bool, want_text: bool) -> tuple[Tensor, Tensor]:
    """Empty gradients [n, D] and [N, D]; no rows where a gradient is not wanted."""
    D = image.shape[1]
    return (
        image.new_empty((image.shape[0] if want_image else 0, D), dtype=wide(image)),
        text.new_empty((text.shape[0] if want_text else 0, D), dtype=wide(text)),
    )


OP = Op(__name__, (_FORWARD, _fake), (_BACKWARD, _fake_backward), compiled={"cpu": supports_cpu, "cuda": supports_cuda})

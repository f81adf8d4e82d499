"""What a backend needs beside its kernel: the compiled libraries, Triton and a device that it compiles for."""

from __future__ import annotations

import ctypes
import functools
import importlib
from pathlib import Path

import torch

from clipfast.kernels import processor


@functools.cache
def library(kind: str) -> str | None:
    """Load the compiled library ``_C_<kind>`` once; None, or the reason why it cannot be had."""
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if kind == "cpu" and processor.NAME == "none":
        return "expected a processor with AVX-512, AVX2 or NEON" + (", got CLIPFAST_CPU=none" if processor.HELD else "")
    folder = Path(importlib.import_module("clipfast").__file__ or "").parent
    path = folder / f"_C_{kind}.so"
    if not path.exists():
        return f"{path.name} is not built: pip install -e . --no-build-isolation"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if kind == "cpu" and processor.NAME == "avx2":
        ctypes.CDLL(str(path)).clipfast_hold_to_avx2()
    return None


def triton_lacks(x: torch.Tensor, products: bool = False) -> str | None:
    """Why no Triton kernel of ours runs on this tensor, or None; ``products``: whether the kernel multiplies matrices."""
    import triton

    interpreting = triton.knobs.runtime.interpret
    if x.device.type != "cuda" and not interpreting:
        return f"expected CUDA tensors, got {x.device}; on a CPU it runs only under TRITON_INTERPRET=1"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {x.dtype}"
    if interpreting and products and x.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "expected compute capability 8.0 or later"
    return None

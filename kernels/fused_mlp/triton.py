"""What stands beside the kernels in CUDA C++: the vendor's products, and mlp's pass in Triton between them."""

from __future__ import annotations

import functools
from typing import Any

from clipfast.kernels.available import triton_lacks
from clipfast.kernels.fused_mlp import spec
from clipfast.kernels.mlp import triton as activation
from clipfast.kernels.mlp.triton import compiled

__all__ = ["backward", "compiled", "forward", "supports"]

forward, backward = (functools.partial(part, activation=activation) for part in (spec.forward, spec.backward))


def supports(*args: Any) -> str | None:
    return triton_lacks(args[0])

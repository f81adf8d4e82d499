"""What the two losses over all pairs share in Triton: a tile of the similarity matrix, its sizes, and the gradients' products.

``G`` [n, N], the loss's derivative by each similarity, exists only block by block (``blocks``), in the features' own type. A
Triton kernel writes a block, 2·D FLOPs an element, and the vendor's GEMM multiplies it with either side (``add_product``), 4·D.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Rows and bytes of columns of a block of G: 8,192 × 16,384 in 16 bit are 256 MB. For each product the fp32 gradient is read and
# written, 8·D bytes a row, once in 16,384 or 8,192 terms of 2·D FLOPs: both together 6 % of their time at 4.3 TB/s and
# 750 TFLOP/s, were nothing of it overlapped. A block that stays in L2 (4,096²: 32 MB) makes that 17 % and at D = 768 fills 73 %
# of one wave with 96 tiles of 128 × 256. G itself passes HBM in vain, 6 bytes for 6·D FLOPs: 0.9 TB/s. Below 8,192 rows a block
# is all of G: once in 16 bit what eager holds several times.
ROWS, COLUMN_BYTES = 8192, 32768
# Whole numbers among kernels' arguments that no address depends on: another batch or offset compiles nothing anew.
SIZES = ("n", "N", "rows", "columns", "start", "first", "offset", "height", "scans")
BAND = 8  # rows of tiles that are walked together: 132 programs then read 8 + 17 strips of features at a time, not 1 + 132


@triton.jit
def similarity(
    a, b, row, column, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """⟨a_i, b_j⟩ [BLOCK_M, BLOCK_N] in fp32 from descriptors of a and b; 0 beyond their last rows.

    In a loop with ``flatten=True`` the loads of the next tile run under the epilogue of this one.
    """
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        s = tl.dot(a.load([row, d]), b.load([column, d]).T, s, input_precision=PRECISION)
    return s


@triton.jit
def place(tile, down, across, BAND: tl.constexpr):
    """Row and column of a tile's place among ``down`` × ``across``, BAND rows at a time, column by column."""
    band, inside = tile // (BAND * across), tile % (BAND * across)
    height = tl.minimum(BAND, down - band * BAND)
    return band * BAND + inside % height, inside // height


@functools.cache
def chip(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, compute capability); the interpreter, on a CPU, plays a small Hopper."""
    if device.type != "cuda":
        return 2, 90
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_properties(device).multi_processor_count, 10 * major + minor


# BLOCK_M, BLOCK_N, warps, stages of each kernel for 16 bit: many tiles on Hopper, on other GPUs, and few tiles.
# Hopper: from L2 a tile of 256 × 128 asks 768 bytes for each 65,536 FLOPs, 85 a byte: 7 TB/s carry 600 TFLOP/s (128 × 128: 450;
# 256 × 256 does not fit the registers). The sums of a tile take 128 registers of 256 threads. In wgmma's layout a thread holds
# four rows and 32 columns, so that sums over rows need no shuffle before a program's last tile; 128 × 256 holds two rows and 64
# columns, twice the registers for those sums. Four stages take 192 KB, three leave room for the tile of G on its way to TMA.
# Others: at most 99 KB, which all GPUs since 8.6 have. Few: 1,024² are 128 programs. What is not here spills somewhere.
_FEW = (128, 64, 4, 3)
SHAPES = {
    "sums": ((256, 128, 8, 4), (128, 128, 8, 3), _FEW),
    "finish": (_FEW, _FEW, _FEW),
    "gradient": ((256, 128, 8, 3), (128, 128, 8, 2), _FEW),
    "sigmoid": ((256, 128, 8, 3), _FEW, _FEW),
}


def tiles(kernel: str, dtype: torch.dtype, D: int, capability: int, many: bool = True) -> dict[str, Any]:
    """Constants and launch options of a kernel around ``similarity``.

    Fp32 multiplies outside the tensor cores, from registers: 64 × 64. Descriptors made by the host keep addresses out of
    registers and feed TMA; before Hopper they would be plain loads whose alignment the compiler cannot see, so that there the
    kernel makes them (HOST false).
    """
    narrow = dtype != torch.float32
    depth = min(64 if narrow else 32, max(16, triton.next_power_of_2(D)))
    M, N, warps, stages = SHAPES[kernel][(0 if capability == 90 else 1) if many else 2] if narrow else (64, 64, 8, 2)
    precision = "tf32" if not narrow and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return dict(
        D=triton.cdiv(D, depth) * depth, BLOCK_M=M, BLOCK_N=N, BLOCK_D=depth, PRECISION=precision, HOST=capability >= 90,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def fitting(kernel: str, image: Tensor, text: Tensor) -> dict[str, Any]:
    """``tiles`` for these features: the large ones where they make three quarters of a wave, 99 of 132."""
    processors, capability = chip(image.device)
    shape = tiles(kernel, image.dtype, image.shape[1], capability)
    count = triton.cdiv(len(image), shape["BLOCK_M"]) * triton.cdiv(len(text), shape["BLOCK_N"])
    return shape if 4 * count >= 3 * processors else tiles(kernel, image.dtype, image.shape[1], capability, many=False)


def operand(x: Tensor, shape: dict[str, Any]) -> Tensor:
    """x contiguous, with zeros up to the width of ``shape``, at an address that a descriptor takes."""
    if x.shape[1] < shape["D"]:
        return F.pad(x, (0, shape["D"] - x.shape[1]))
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def described(x: Tensor, rows: int, columns: int, shape: dict[str, Any]) -> Any:
    """What a kernel takes for the matrix x, read or written in tiles of rows × columns."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if shape["HOST"] else x


def constants(shape: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """``shape`` as constants, warps and stages, the parts of a variant in ``compiled``."""
    return {k: v for k, v in shape.items() if not k.startswith("num_")}, shape["num_warps"], shape["num_stages"]


def signature(kernel: Any, feature: str, shape: dict[str, Any], G_columns: int = 0) -> dict[str, str]:
    """The types of a kernel's arguments by name: features and G as descriptors or pointers, other pointers fp32, sizes i32."""
    M, N, D = shape["BLOCK_M"], shape["BLOCK_N"], shape["BLOCK_D"]
    matrices = dict(image=(M, D), text=(N, D), a=(M, D), b=(N, D), G=(M, G_columns or N))
    given = {k: f"tensordesc<{feature}[{r}, {c}]>" if shape["HOST"] else f"*{feature}" for k, (r, c) in matrices.items()}
    given |= dict.fromkeys((*SIZES, "width"), "i32")
    given |= dict.fromkeys(shape, "constexpr")
    return {name: given.get(name, "*fp32") for name in kernel.arg_names}


def blocks(n: int, N: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each block of G."""
    step = COLUMN_BYTES // itemsize
    for row in range(0, n, ROWS):
        for column in range(0, N, step):
            yield slice(row, min(row + ROWS, n)), slice(column, min(column + step, N))


def add_product(out: Tensor, a: Tensor, b: Tensor, first: bool, alpha: float = 1.0) -> None:
    """out += alpha·a·b in fp32 from a and b of any type; the ``first`` term overwrites what is there."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)
    else:
        out.addmm_(a.float(), b.float(), beta=beta, alpha=alpha)

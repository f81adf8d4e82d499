"""The CUDA C++ sources as nvcc sees them: they compile for three generations of GPU, no kernel spills, all can be launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.compiled import CAPABILITIES, compile_cuda, nvcc, reported

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels").glob("*/cuda.cu"))
STATIC = 48 << 10  # bytes of shared memory that a program may have without asking for more at its launch


@pytest.mark.slow  # a minute of compilation, the same until a kernel changes
@pytest.mark.skipif(nvcc() is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_no_kernel_spills(source: Path) -> None:
    for capability in CAPABILITIES:
        rows = compile_cuda(source.parent.name, capability)
        assert not [row for row in rows if row.spilled or row.shared > STATIC or not 0 < row.registers <= 255]


def test_what_nvcc_reports_is_read() -> None:
    said = """ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90a'
ptxas info    : Function properties for _Z3addPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3mulPf' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers"""
    add, mul = reported("mlp", 90, said)
    assert (add.registers, add.spilled, add.shared) == (40, 40, 2048) and (mul.registers, mul.spilled, mul.shared) == (12, 0, 0)
    with pytest.raises(RuntimeError, match="expected registers and spills"):
        reported("mlp", 90, "nothing")


def test_there_is_cuda_to_compile() -> None:
    assert SOURCES

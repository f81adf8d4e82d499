"""Triton kernels as ptxas sees them for three generations of GPU: spills, shared memory, tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiled import CAPABILITIES, SHARED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # two minutes of compilation, the same until a kernel changes
# Bytes a thread may spill (op, kernel, capabilities), all others none. On 8.0 mma.sync keeps its operands in registers, which
# wgmma reads from shared memory.
SPILLS = [("attention", r"_(forward|backward) bf16", (80,), 160)]
# Tiles were chosen with Triton 3.6. With 3.7 to 3.9 some kernels miss a few registers, and fp32 attention's backward pass many.
CHOSEN_WITH, OTHERS_SPILL = "3.6.", {"fp32": 1024, "": 64}

# Ops that move bytes hide the wait for memory behind other warps: of an SM's 65,536 registers 128 a thread leave 16 warps.
# Pooling in fp32 is none of them: it multiplies outside the tensor cores, from registers.
MOVERS, REGISTERS = ("layer_norm", "mlp", "pooling"), 128


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """In a process of its own: here the kernels may be interpreted, which is settled when they are imported."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--only", "triton", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_is_there(rows: list[dict]) -> None:
    from clipfast import kernels

    expected = {
        (name, c) for name in kernels.OPS for c in CAPABILITIES if not isinstance(kernels.OPS[name].backend("triton"), str)
    }
    assert expected and {(row["op"], row["capability"]) for row in rows} == expected


def test_nothing_spills_and_shared_memory_fits(rows: list[dict]) -> None:
    import triton

    def allowed(row: dict) -> int:
        fits = (b for op, k, on, b in SPILLS if op == row["op"] and re.match(k, row["kernel"]) and row["capability"] in on)
        found = next(fits, 0)
        if triton.__version__.startswith(CHOSEN_WITH):
            return found
        return max(found, next(most for kind, most in OTHERS_SPILL.items() if kind in row["kernel"]))

    bad = [
        row
        for row in rows
        if row["spilled"] > allowed(row) or row["shared"] > SHARED[row["capability"]] or not row["registers"]
    ]
    assert not bad


def test_what_moves_bytes_leaves_registers_for_other_warps(rows: list[dict]) -> None:
    found = [row for row in rows if row["op"] in MOVERS and not ("fp32" in row["kernel"] and row["op"] == "pooling")]
    assert found and not [row for row in found if row["registers"] > REGISTERS]


@pytest.mark.parametrize("op", ["contrastive", "pairwise_sigmoid", "attention"])
def test_hopper_multiplies_bf16_by_wgmma(rows: list[dict], op: str) -> None:
    found = [row for row in rows if row["op"] == op and row["capability"] == 90 and "bf16" in row["kernel"]]
    # Tiles of fewer rows than wgmma's 64: 12 tokens, and the gradients of wide heads.
    found = [row for row in found if not re.search(" L12 |_backward.* K(80|128) ", row["kernel"])]
    if not found and op not in {row["op"] for row in rows}:
        pytest.skip(f"{op} has no Triton backend here")
    assert found and all(row["matmul"] == "wgmma" for row in found), found

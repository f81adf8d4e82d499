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

ROOT = Path(__file__).parents[1]
# Bytes a thread may spill, the first that fits (op, kernel, capabilities); all others none. Heads of 80 and 128
# are rare, and fp32 on a GPU is for checking.
SPILLS = [
    ("attention", r"_backward fp32", CAPABILITIES, 2048),
    ("attention", r"_backward bf16 K(80|128) ", (80,), 2048),
    ("attention", r"_backward bf16 K(80|128) ", (90,), 128),
    ("attention", r"_(forward|backward) bf16", (80,), 160),
]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """In a process of its own: here the kernels may be interpreted, which is settled when they are imported."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--json"], cwd=ROOT, env=environment, capture_output=True, text=True
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
    def allowed(row: dict) -> int:
        fits = (b for op, k, on, b in SPILLS if op == row["op"] and re.match(k, row["kernel"]) and row["capability"] in on)
        return next(fits, 0)

    bad = [
        row
        for row in rows
        if row["spilled"] > allowed(row) or row["shared"] > SHARED[row["capability"]] or not row["registers"]
    ]
    assert not bad


@pytest.mark.parametrize("op", ["contrastive", "attention"])
def test_hopper_multiplies_bf16_by_wgmma(rows: list[dict], op: str) -> None:
    found = [row for row in rows if row["op"] == op and row["capability"] == 90 and "bf16" in row["kernel"]]
    found = [row for row in found if "L12" not in row["kernel"]]  # wgmma takes 64 rows; 12 tokens take a tile of 16
    if not found and op not in {row["op"] for row in rows}:
        pytest.skip(f"{op} has no Triton backend here")
    assert found and all(row["matmul"] == "wgmma" for row in found), found

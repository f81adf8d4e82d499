"""Every Triton kernel compiled ahead of time, without a GPU: ``python -m bench.compiled [--json]``.

Each op's ``triton.py`` lists its variants in ``compiled()``; they are built for compute capability 8.0, 9.0 and 10.0, and the
ptxas that Triton ships reports registers and spills. Pointers and sizes count as multiples of 16, as they are in training.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import ModuleType

from clipfast import kernels

CAPABILITIES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have (CUDA C++ Programming Guide)


@dataclass
class Row:
    op: str
    kernel: str
    capability: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread, stores and loads
    shared: int  # bytes of a program
    matmul: str  # the instruction behind tl.dot: wgmma, tcgen05, mma or none


def modules(ops: list[str]) -> Iterator[tuple[str, ModuleType]]:
    """The ops that have a Triton backend, and it."""
    for name in ops:
        backend = kernels.OPS[name].backend("triton")
        if isinstance(backend, ModuleType):
            yield name, backend


def build(op: str, variant: tuple, capability: int) -> Row:
    """Compile one variant of ``compiled()``; RuntimeError when ptxas refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, signature, constants, warps, stages = variant
    sixteen = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constants, sixteen)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, num_stages=stages))
    ptx = built.asm["ptx"]
    said = _ptxas(ptx, triton.knobs.nvidia.ptxas_blackwell.path if capability >= 100 else triton.knobs.nvidia.ptxas.path)
    found = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if not found or not spilled:
        raise RuntimeError(f"{op} {name}: expected registers and spills from ptxas, got {said!r}")
    matmul = next((i for i in ("wgmma", "tcgen05.mma", "mma.sync") if i in ptx), "none").partition(".")[0]
    return Row(op, name, capability, int(found[1]), sum(map(int, spilled)), built.metadata.shared, matmul)


def _ptxas(ptx: str, ptxas: str) -> str:
    """What ``ptxas -v`` says of the code."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1] if target else ''}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stderr + done.stdout


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("ops", nargs="*", default=list(kernels.OPS), help="which ops (all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(kernels.OPS):
        sys.exit(f"bench.compiled: expected ops of {', '.join(kernels.OPS)}, got {', '.join(sorted(unknown))}")
    if triton.knobs.runtime.interpret:
        sys.exit("bench.compiled: expected kernels to compile, got TRITON_INTERPRET=1; unset it")
    rows = [
        build(op, variant, capability)
        for op, backend in modules(arguments.ops)
        for variant in backend.compiled()
        for capability in CAPABILITIES
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = [tuple(f.name for f in fields(Row)), *(tuple(map(str, astuple(row))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()

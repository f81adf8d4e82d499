"""Every GPU kernel compiled ahead of time, without a GPU: ``python -m bench.compiled [--json] [ops]``.

An op's ``triton.py`` lists its variants in ``compiled(capability)``; they are built for compute capability 8.0, 9.0 and 10.0,
and the ptxas that Triton ships reports registers and spills. Pointers and sizes count as multiples of 16, as they are in
training. The kernels of its ``cuda.cu`` are compiled for the same by nvcc, where there is one, and by the flags of the build.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import ModuleType

import torch

from clipfast import kernels
from clipfast.kernels import passed

CAPABILITIES = (80, 90, 100)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may have (CUDA C++ Programming Guide)
NVCC = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # as CMakeLists.txt has it


@dataclass
class Row:
    op: str
    backend: str  # triton or cuda
    kernel: str
    capability: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread, stores and loads
    shared: int  # bytes of a program; of CUDA C++ what is known before the launch
    matmul: str  # the instruction behind tl.dot: wgmma, tcgen05, mma or none


def modules(ops: list[str]) -> Iterator[tuple[str, ModuleType]]:
    """The ops that have a Triton backend, and it."""
    for name in ops:
        backend = kernels.OPS[name].backend("triton")
        if isinstance(backend, ModuleType):
            yield name, backend


def build(op: str, variant: tuple, capability: int) -> Row:
    """Compile one variant of ``compiled(capability)``; RuntimeError when ptxas refuses it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    name, kernel, signature, constants, warps, stages = variant
    sixteen = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(kernel, signature, constants, sixteen)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, num_stages=stages))
    ptx = built.asm["ptx"]
    said = _ptxas(ptx, get_ptxas(capability).path)
    found = re.search(r"Used (\d+) registers", said)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if not found or not spilled:
        raise RuntimeError(f"{op} {name}: expected registers and spills from ptxas, got {said!r}")
    return Row(op, "triton", name, capability, int(found[1]), sum(map(int, spilled)), built.metadata.shared, _matmul(ptx))


def _matmul(code: str) -> str:
    return next((i for i in ("wgmma", "tcgen05.mma", "mma.sync") if i in code), "none").partition(".")[0]


def _ptxas(ptx: str, ptxas: str) -> str:
    """What ``ptxas -v`` says of the code."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1] if target else ''}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return _said(command)


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stderr + done.stdout


def nvcc() -> str | None:
    """Where CUDA's compiler is, if there is one."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_cuda(op: str, capability: int) -> list[Row]:
    """Every kernel of an op's cuda.cu as nvcc's ptxas reports it; RuntimeError when it does not compile."""
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        # wgmma belongs to sm_90a alone: without the letter such a kernel is an empty one.
        architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [nvcc() or "nvcc", "--cubin", f"-arch={architecture}", *NVCC, "-Xptxas", "-v", "-I", str(include)]
        said = _said([*command, "-I", str(passed.ROOT), str(passed.source_of(op, "cuda")), "-o", f"{folder}/out.cubin"])
    return reported(op, capability, said)


def reported(op: str, capability: int, said: str) -> list[Row]:
    """The rows of what ``nvcc -Xptxas -v`` printed."""
    rows = []
    for name, about in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers[^\n]*)", said, re.DOTALL):
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", about)))
        registers, shared = re.search(r"Used (\d+) registers", about), re.search(r"(\d+) bytes smem", about)
        rows.append(Row(op, "cuda", name, capability, int(registers[1]), spilled, int(shared[1]) if shared else 0, "-"))  # type: ignore[index]
    if not rows:
        raise RuntimeError(f"{op}: expected registers and spills from nvcc, got {said!r}")
    if filt := shutil.which("c++filt"):
        plain = subprocess.run([filt, *(row.kernel for row in rows)], capture_output=True, text=True).stdout.splitlines()
        for row, text in zip(rows, plain, strict=True):
            row.kernel = re.sub(r"\([^()]*\)$", "", re.sub(r"^void |\(anonymous namespace\)::|clipfast::", "", text))
    return rows


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    parser.add_argument("--only", choices=["triton", "cuda"], help="one language (both)")
    parser.add_argument("ops", nargs="*", default=list(kernels.OPS), help="which ops (all)")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(kernels.OPS):
        sys.exit(f"bench.compiled: expected ops of {', '.join(kernels.OPS)}, got {', '.join(sorted(unknown))}")
    if triton.knobs.runtime.interpret:
        sys.exit("bench.compiled: expected kernels to compile, got TRITON_INTERPRET=1; unset it")
    rows = [
        build(op, variant, capability)
        for op, backend in (modules(arguments.ops) if arguments.only != "cuda" else ())
        for capability in CAPABILITIES
        for variant in backend.compiled(capability)
    ]
    with_cuda = [op for op in arguments.ops if arguments.only != "triton" and nvcc() and passed.source_of(op, "cuda").exists()]
    rows += [row for op in with_cuda for capability in CAPABILITIES for row in compile_cuda(op, capability)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = [tuple(f.name for f in fields(Row)), *(tuple(map(str, astuple(row))) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()

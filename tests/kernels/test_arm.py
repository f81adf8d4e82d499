"""The kernels in C++ on a 64-bit Arm processor: compiled across, for NEON, and run in qemu against the specs in float64.

``torchless.h`` stands for torch there, which neither a cross compiler nor qemu needs to know.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast.check import DTYPES, arguments, disagreements
from clipfast.kernels import OPS
from tests.kernels.rows import CASES, lacks

ROOT = Path(__file__).parents[2]
HEADERS = ("csrc/stable/library.h", "csrc/stable/ops.h", "csrc/stable/tensor.h", "headeronly/core/ScalarType.h")
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
SOURCES = sorted(ROOT.glob("kernels/*/cpu.cpp"))
TYPES = [torch.float32, torch.int32, torch.int8]
COMPILERS = {"gcc": ["aarch64-linux-gnu-g++"], "clang": ["clang++-16", "--target=aarch64-linux-gnu"]}
ARM = COMPILERS["gcc"][0]

crosses = pytest.mark.skipif(not shutil.which(ARM), reason=f"no cross compiler: apt-get install g++-{ARM[:-4]}")
runs = pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no emulator: apt-get install qemu-user")


def compiled(compiler: list[str], source: Path, folder: Path, *flags: str) -> Path:
    out = folder / f"{source.parent.name}-{source.stem}.o"
    where = ["-I", str(folder), "-I", str(ROOT / "tests/kernels"), "-I", str(ROOT / "kernels")]
    done = subprocess.run([*compiler, *FLAGS, *flags, *where, "-c", source, "-o", out], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("arm")
    for header in HEADERS:
        path = made / "torch" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "torchless.h"\n')
    (made / "driver.cpp").write_text('#define CLIPFAST_DRIVER\n#include "torchless.h"\n')
    return made


class Driver:
    """A process of which each request runs one operator."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, name: str, *given: Any) -> Any:
        sent, come = self.process.stdin, self.process.stdout
        assert sent and come
        sent.write(struct.pack("<q", len(name)) + name.encode() + struct.pack("<q", len(given)))
        for value in given:
            sent.write(_sent(value))
        sent.flush()
        results = [self._tensor() for _ in range(self._numbers(1)[0])]
        return results[0] if len(results) == 1 else tuple(results)

    def _numbers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}q", self._read(8 * count))

    def _read(self, size: int) -> bytes:
        read = self.process.stdout.read(size)  # type: ignore[union-attr]
        assert len(read) == size, "the driver ended"
        return read

    def _tensor(self) -> Tensor:
        (dimensions,) = self._numbers(1)
        shape, strides = self._numbers(dimensions), self._numbers(dimensions)
        memory = torch.frombuffer(bytearray(self._read(4 * _extent(shape, strides)) or bytes(4)), dtype=torch.float32)
        return memory.as_strided(shape, strides)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


def _sent(value: Any) -> bytes:
    if value is None:
        return struct.pack("<q", 0)
    if isinstance(value, float):
        return struct.pack("<qd", 3, value)
    if isinstance(value, int):
        return struct.pack("<qq", 2, value)
    if isinstance(value, list):
        return struct.pack("<qq", 4, len(value)) + b"".join(map(_sent, value))
    told = [1, TYPES.index(value.dtype), value.ndim, *value.shape, *value.stride()]
    memory = value.detach().as_strided((_extent(value.shape, value.stride()),), (1,))
    return struct.pack(f"<{len(told)}q", *told) + memory.numpy().tobytes()


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: compiled([ARM], s, folder, "-O1"), [folder / "driver.cpp", *SOURCES]))
    program = folder / "driver"
    subprocess.run([ARM, "-static", *objects, "-o", program], check=True)
    made = Driver(["qemu-aarch64", str(program)])
    yield made
    made.process.kill()
    made.process.wait()


@crosses
@runs
@pytest.mark.parametrize("op", [source.parent.name for source in SOURCES])
def test_matches_spec_on_arm(op: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of fp32 as on any processor, forward and backward, of which the larger ones are left out."""
    home, supports = OPS[op], OPS[op].compiled["cpu"]
    parts: dict[str, Callable] = {part: (lambda *a, name=name: driver(f"{name}_cpu", *a)) for part, name in home.parts.items()}
    arm = SimpleNamespace(supports=supports, **parts)
    real = home.backend
    monkeypatch.setattr(home, "backend", lambda name: arm if name == "cpu" else real(name))
    ran, told = 0, []
    for case in CASES[op]:
        given = arguments(op, CASES[op][case], DTYPES["fp32"], "cpu")
        if sum(v.numel() for v in given.values() if isinstance(v, Tensor)) < 40_000 and not lacks(op, "cpu", given):
            ran += 1
            told += [f"{case}: {wrong}" for wrong in disagreements(op, "cpu", given, twice=False)]
    assert not told and ran > 3, (ran, told)


@crosses
@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILERS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_compiles_beside_torch_and_vectorises(kind: str, source: Path, tmp_path: Path) -> None:
    """With torch's own headers and the flags of the build: products of four floats, and no register of x86's."""
    if not shutil.which(COMPILERS[kind][0]):
        pytest.skip(f"no {COMPILERS[kind][0]}")
    headers = ["-isystem", f"{Path(torch.__file__).parent}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    found = compiled(COMPILERS[kind], source, tmp_path, "-O3", "-fPIC", *headers)
    code = subprocess.run(["aarch64-linux-gnu-objdump", "-d", found], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bf(?:mla|mul)\s+v\d+\.4s", code)) >= 4

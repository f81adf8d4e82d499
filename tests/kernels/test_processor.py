"""``CLIPFAST_CPU``: every kernel in C++ for the sets of instructions below the machine's best, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.kernels import dispatch, processor

ROOT = Path(__file__).parents[2]
LESSER = [name for name in processor._machines()[1:] if name != "none"]
ROWS = """
from clipfast.check import DTYPES, arguments, disagreements
from clipfast.kernels import OPS, processor
from tests.kernels.rows import CASES, lacks

told, ran = [], 0
for op, cases in CASES.items():
    for case in cases:
        given = arguments(op, cases[case], DTYPES["fp32"], "cpu")
        if not lacks(op, "cpu", given):
            ran += 1
            told += [f"{op} {case}: {wrong}" for wrong in disagreements(op, "cpu", given)]
assert ran > 100, ran
print(processor.NAME, *told, sep="\\n")
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    given = {name: value for name, value in os.environ.items() if name not in ("CLIPFAST_CPU", *processor._TELLS)}
    given |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True)


@pytest.mark.parametrize("name", LESSER)
@pytest.mark.skipif(dispatch.library("cpu") is not None, reason="the kernels in C++ are not built")
def test_each_lesser_set_matches_the_specs(name: str) -> None:
    done = python(ROWS, CLIPFAST_CPU=name)
    assert done.stdout.splitlines() == [name], done.stdout + done.stderr[-2000:]


EPYC = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (EPYC, dict(vendor="AuthenticAMD", family=25, model=17, name="AMD EPYC")),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", dict(vendor="GenuineIntel", family=6, model=143)),
        (ARM, dict(vendor="0x41", family=8, model=0xD0C)),
        ("arm", {}),
    ],
)
def test_the_processor_is_what_the_system_tells(text: str, told: dict[str, object]) -> None:
    assert processor._told(text) == told


HOLDS = """
import clipfast, torch
from clipfast.kernels import dispatch
info = clipfast.info().splitlines()
print(torch.backends.cpu.get_cpu_capability(), dispatch.library("cpu"), sep="\\n")
print(next(line for line in info if line.startswith("processor")))
"""


def test_without_vectors_torch_runs_alone_and_info_says_so() -> None:
    capability, absent, row = python(HOLDS, CLIPFAST_CPU="none").stdout.splitlines()
    assert capability in ("NO AVX", "DEFAULT") and "got CLIPFAST_CPU=none" in absent
    assert row.split(maxsplit=1)[1] == "none, as CLIPFAST_CPU asks"


def test_what_the_machine_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of avx512, avx2, neon, none, got 'sse'"):
        processor._chosen("sse")
    with pytest.raises(ValueError, match="which this machine has"):
        processor._chosen("avx2" if processor.NAME == "neon" else "neon")


@pytest.mark.skipif(not LESSER, reason="this machine has one set alone")
def test_a_set_that_comes_too_late_is_refused() -> None:
    done = python("import torch; torch.ones(9).exp(); import clipfast", CLIPFAST_CPU=LESSER[0])
    assert done.returncode and "import clipfast before torch computes" in done.stderr.splitlines()[-1]

"""The CUDA C++ sources as nvcc sees them: they compile for three generations of GPU, and no kernel spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "kernels").glob("*/cuda.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xptxas", "-v", "-I", include]
    for architecture in ("sm_80", "sm_90", "sm_100"):
        command = ["nvcc", "--cubin", f"-arch={architecture}", *flags, source, "-o", tmp_path / "out.cubin"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
        assert spills and set(spills) == {"0"}, f"{architecture}: {done.stderr}"


def test_there_is_cuda_to_compile() -> None:
    assert SOURCES

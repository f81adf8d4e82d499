"""Build clipfast's compiled libraries with CMake and map the source folder kernels/ to clipfast.kernels.

``CLIPFAST_CUDA=auto|on|off`` decides on the CUDA library: ``auto`` (the default) builds it where nvcc is found. ``CUDAARCHS``,
CMake's own variable, says for which GPUs: ``90a-real`` alone takes a third of the time of all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
WINGS = sorted(f"clipfast.{home.parent.name}" for home in ROOT.glob("clipfast/*/__init__.py"))
OPS = sorted(home.parent.name for home in ROOT.glob("kernels/*/__init__.py"))


def nvcc() -> str | None:
    """The compiler, on the PATH or where the toolkit has it."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def with_cuda() -> bool:
    """Whether to build the CUDA library; says so where it is left out."""
    choice = os.environ.get("CLIPFAST_CUDA", "auto")
    if choice not in ("auto", "on", "off"):
        sys.exit(f"CLIPFAST_CUDA: expected auto, on or off, got {choice!r}")
    if choice == "on" and not nvcc():
        sys.exit("CLIPFAST_CUDA=on: expected nvcc on the PATH, found none; install the CUDA toolkit or set CLIPFAST_CUDA=off")
    if choice == "auto" and not nvcc():
        print("clipfast: no nvcc found, the CUDA library is left out (CPU and Triton kernels remain)")
    return choice != "off" and nvcc() is not None


class Build(build_ext):
    """Run CMake once for all libraries."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI in the name: the libraries know torch only, and one binary serves every Python.
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        self.work = ROOT / "build" / "cmake"
        # The cmake and ninja that were installed beside this Python first: a system's own may be too old for its nvcc.
        tools = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        if CUDA:  # CMake looks for it on the PATH alone
            tools = {"CUDACXX": nvcc() or ""} | tools
        cmake = shutil.which("cmake", path=tools["PATH"]) or "cmake"
        options = [f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DCLIPFAST_CUDA={'ON' if CUDA else 'OFF'}"]
        options += ["-GNinja", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run([cmake, *options, "-S", str(ROOT), "-B", str(self.work)], check=True, env=tools)
        subprocess.run([cmake, "--build", str(self.work)], check=True, env=tools)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.work / f"{ext.name.rpartition('.')[2]}.so", target)


CUDA = with_cuda() and any(ROOT.glob("kernels/*/cuda.cu"))
setup(
    packages=["clipfast", *WINGS, "clipfast.kernels", *(f"clipfast.kernels.{op}" for op in OPS)],
    package_dir={"clipfast": "clipfast", "clipfast.kernels": "kernels"},
    package_data={
        "clipfast.inputs": ["*.gz"],
        "clipfast.evaluate": ["*.toml"],
        "": ["*.json", "*.h", "*.cuh", "*.cpp", "*.cu"],  # passed.py reads the sources
    },
    ext_modules=[Extension(f"clipfast._C_{kind}", sources=[]) for kind in ("cpu", *(["cuda"] if CUDA else []))],
    cmdclass={"build_ext": Build},
)

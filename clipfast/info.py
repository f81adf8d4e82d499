"""What this installation has: versions, devices, and which backend would run each op."""

from __future__ import annotations

import ast
import importlib.metadata
import platform
from pathlib import Path

import torch

import clipfast.interop
from clipfast.inputs.image import jpeg_decoder
from clipfast.interop.accelerate import LIBRARIES
from clipfast.kernels import OPS, dispatch, passed, processor


def info() -> str:
    """A text to read or to put into a bug report: versions, device, op × backend with the reason where one is missing, and the
    libraries whose models ``accelerate`` knows.

    ``first choice`` is what runs on this machine's device unless its arguments are not supported; then the next choice runs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [f"{name:12} {version}" for name, version in _versions(device)]
    lines += ["", f"{'op':16} " + f"{'backend':10} on this machine's {device}"]
    for name, op in OPS.items():
        rank = 0
        for backend in dispatch.BACKENDS:
            found, reason = op.backend(backend), None
            if backend == device == "cuda":
                reason = passed.lacks(name, torch.device(device))
            if isinstance(found, str):
                state = f"absent: {found}"
            elif reason := reason or getattr(found, "LACKS", None):
                state = f"on request: {reason}"
            elif backend in dispatch.AUTOMATIC[device]:
                rank += 1
                state = "first choice" if rank == 1 else "next choice"
            else:
                state = f"on request: with clipfast.kernels.use({backend!r})"
            lines.append(f"{name:16} {backend:10} {state}")
    return "\n".join([*lines, "", *_accelerated()])


def _accelerated() -> list[str]:
    """A row for each library that ``accelerate`` knows: the first line of its file, which says what is; nothing is imported."""
    rows = []
    for library in LIBRARIES:
        source = (Path(clipfast.interop.__path__[0]) / f"{library}.py").read_text(encoding="utf-8")
        rows.append(f"{'accelerates':16} {(ast.get_docstring(ast.parse(source)) or library).splitlines()[0]}")
    return rows


def _versions(device: str) -> list[tuple[str, str]]:
    rows = [("python", platform.python_version())]
    for package in ("clipfast", "torch", "triton", "numpy", "tokenizers"):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "absent"))
    rows += [(f"_C_{kind}", dispatch.library(kind) or "loaded") for kind in ("cpu", "cuda")]
    rows.append(("jpeg", jpeg_decoder()))
    rows.append(("processor", f"{processor.NAME}{', as CLIPFAST_CPU asks' if processor.HELD else ''}"))
    if device == "cpu":
        rows.append(("bf16", _bf16()))
    rows.append(("device", f"{passed.device_name(device)}, {passed.driver() or f'{torch.get_num_threads()} threads'}"))
    return rows


def _bf16() -> str:
    """What the CPU has for products of bf16; whether a run takes them it measures, which no two calls would agree on."""
    if not processor.BF16:
        return "no instructions for its products: precision auto takes fp32"
    return f"{processor.BF16}; precision auto takes what a measurement finds faster for the model"

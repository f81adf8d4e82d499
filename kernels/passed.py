"""Which kernels this hardware has passed: by a committed record, or by ``clipfast check`` on this machine.

A CUDA C++ kernel is an automatic choice only where one of the two says so, and says that none beside it is the faster: no test
without a GPU sees its races and its waits. Triton's and the CPU's kernels are tested on every machine, by the interpreter and
as they are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from clipfast.kernels import processor

ROOT = Path(__file__).resolve().parent  # behind a link, where the folder is one
_LARGEST = 1 << 24  # bytes of the cache; a kernel takes 300
_SOURCES = {"cuda": "cuda.cu", "cpu": "cpu.cpp", "torch": "spec.py"}
# What a file takes from others of ours.
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
_IMPORT = re.compile(r"^from clipfast\.kernels([\w.]*) import (.+)", re.MULTILINE)


def source_of(op: str, backend: str) -> Path:
    """Where the backend's source is, if the op has it."""
    return ROOT / op / _SOURCES.get(backend, f"{backend}.py")


def beside(op: str) -> str:
    """The backend that a GPU runs where CUDA C++ is not the choice."""
    return "triton" if source_of(op, "triton").exists() else "torch"


@functools.cache
def fingerprint(op: str, backend: str) -> str | None:
    """SHA-256 of a kernel: its source and every file of ours that it includes; None where it has no source."""
    source = source_of(op, backend)
    if not source.exists():
        return None
    whole = hashlib.sha256()
    for path in sorted(_closure(source, set())):
        whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()


def _closure(source: Path, found: set[Path]) -> set[Path]:
    if source in found or not source.exists():
        return found
    found.add(source)
    text = source.read_text(encoding="utf-8")
    for name in _INCLUDE.findall(text):
        for folder in (source.parent, ROOT):
            if (folder / name).exists():
                _closure((folder / name).resolve(), found)
                break
    for module, names in _IMPORT.findall(text):
        folder = ROOT.joinpath(*module.split("."))
        for path in (folder.with_suffix(".py"), *(folder / f"{name}.py" for name in re.findall(r"\w+", names))):
            if path.stem not in ("available", "dispatch", "op", "passed"):  # who chooses a kernel is no part of it
                _closure(path, found)
    return found


def hardware(device: str | torch.device) -> str:
    """What a pass is for: a GPU's compute capability, or a processor's model and the instruction set that it computes with.

    GPUs of one capability have the same instructions, registers and shared memory: what an H200 has passed, an H100 has. They
    differ in speed: what is measured on the machine itself counts before what a record says.
    """
    if torch.device(device).type == "cuda":
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    return f"{device_name(device)}, {processor.NAME}"


def device_name(device: str | torch.device) -> str:
    """The model of GPU or processor: what a record is of."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    told = processor.cpuid()
    return ", ".join([told["name"], *(f"{key} {told[key]}" for key in ("family", "model") if key in told)])


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver; empty where there is none, ``unknown`` where it cannot be found out."""
    if not torch.cuda.is_available():
        return ""
    try:
        return re.search(r"Module.*?\s(\d+\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())[1]  # type: ignore[index]
    except (OSError, TypeError):
        pass
    smi = shutil.which("nvidia-smi")
    command = [smi or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.split() if smi else []
    return said[0] if said else "unknown"


def cache_file() -> Path:
    """Where ``clipfast check`` keeps what has passed: ``$XDG_CACHE_HOME/clipfast/passed.json``, else below ``~/.cache``."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "clipfast" / "passed.json"


def key(op: str, backend: str, device: str | torch.device) -> str:
    """A pass is good for this kernel, on this hardware, under this driver and this torch."""
    return f"{op} {backend} {fingerprint(op, backend)} on {hardware(device)}, driver {driver()}, torch {torch.__version__}"


def kept() -> dict[str, Any]:
    """What ``clipfast check`` kept here, by ``key``; nothing where there is no file, and of one nothing that is not ours."""
    try:
        path = cache_file()
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and path.stat().st_size < _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: own for key, own in found.items() if _is_result(own)} if isinstance(found, dict) else {}


def _is_result(value: Any) -> bool:
    """Of a kernel that was not timed there is no more than the count of its cases."""
    kinds = {"cases": (int,), "ms": (int, float), "speedup": (int, float), "size": (str,)}
    if not isinstance(value, dict) or "cases" not in value:
        return False
    return all(type(own) in kinds.get(name, ()) for name, own in value.items()) and not value.get("ms", 1) <= 0


def keep(results: dict[str, Any]) -> None:
    """Add to the file (a result of None is taken out), whole or not at all; OSError where it cannot be written."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {k: v for k, v in (kept() | results).items() if v is not None}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        json.dump(merged, file, indent=1)
    os.replace(file.name, path)
    lacks.cache_clear()


@functools.cache
def lacks(op: str, device: torch.device) -> str | None:
    """Why the CUDA C++ kernel of an op is no automatic choice on this GPU, or None; the files are read once.

    passed.json, which ``python -m bench.record`` makes: how many times as fast as the one beside it it is (null: not compared)
    on the hardware that has passed it, by kernel.
    """
    recorded = json.loads((ROOT / "passed.json").read_text(encoding="utf-8")).get(f"{op} cuda {fingerprint(op, 'cuda')}", {})
    other = beside(op)
    own, rival = (kept().get(key(op, backend, device)) for backend in ("cuda", other))
    name = hardware(device)
    if own is None and name not in recorded:
        return f"no GPU of {name} has passed it yet: run clipfast check, or force it with clipfast.kernels.use('cuda')"
    speed = recorded.get(name)
    if own and rival and own.get("size") and own["size"] == rival.get("size"):
        speed = rival["ms"] / own["ms"]
    return f"{other} is {1 / speed:.2f} times as fast on {name}" if speed and speed < 1 else None

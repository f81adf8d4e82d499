"""The CPU: its model, and the instruction set that this process computes with; the one place that reads ``CLIPFAST_CPU``."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

# What holds torch, oneDNN and MKL to a set, by the environment that they read when they first compute.
_TELLS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
SETS = {
    "avx512": ("avx512", "AVX512_CORE_FP16", "AVX512"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "neon": ("default", "ADVANCED_SIMD", ""),
    "none": ("default", "SSE41", "SSE4_2"),  # torch alone: none of our kernels is written for it
}
_SAID = {"avx512": "AVX512", "avx2": "AVX2"}  # by torch; it has several names for the others

# What the system tells: CPUID on Linux; an Arm core's numbers; "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD" on Windows.
_CPUID = {
    "vendor": r"(AuthenticAMD|GenuineIntel)|^CPU implementer\s*: (\w+)",
    "family": r"(?:^cpu family\s*:|Family|^CPU architecture\s*:) (\d+)",
    "model": r"(?:^model\s*:|Model|^CPU part\s*:) (0x[0-9a-f]+|\d+)",
    "name": r"^model name\s*: (.+)",
}


@functools.cache
def cpuid() -> dict[str, Any]:
    """Vendor, family, model and name of the processor, without what the system does not tell. Many models share a name: AMD's
    of Zen 3, 4 and 5 are all "AMD EPYC" in a virtual machine."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else platform.processor()
    return {"name": platform.processor() or platform.machine()} | _told(text)


def _told(text: str) -> dict[str, Any]:
    found = {key: re.search(pattern, text, re.MULTILINE) for key, pattern in _CPUID.items()}
    told = {key: next(filter(None, match.groups())).strip() for key, match in found.items() if match}
    return told | {key: int(told[key], 0) for key in ("family", "model") if key in told}


def _machines() -> list[str]:
    """What this machine has, the best first."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ["neon", "none"]
    has = {"avx512": torch.cpu._is_avx512_supported(), "avx2": torch.cpu._is_avx2_supported(), "none": True}
    return [name for name, there in has.items() if there]


def _chosen(asked: str | None) -> str:
    """The machine's best, or the set that is asked for, to which torch and its libraries are held."""
    has = _machines()
    if not asked:
        return has[0]
    if asked not in SETS:
        raise ValueError(f"CLIPFAST_CPU: expected one of {', '.join(SETS)}, got {asked!r}")
    if asked not in has:
        raise ValueError(f"CLIPFAST_CPU: expected one of {', '.join(has)}, which this machine has, got {asked!r}")
    tells = {name: value for name, value in zip(_TELLS, SETS[asked], strict=True) if value}
    os.environ.update(tells)
    said = torch.backends.cpu.get_cpu_capability()
    if said.startswith("AVX") and said != _SAID.get(asked):
        first = " ".join(f"{name}={value}" for name, value in tells.items())
        raise RuntimeError(
            f"CLIPFAST_CPU={asked}: torch computes with {said} already: import clipfast before torch computes, or set {first}"
        )
    return asked


def _bf16(name: str, held: str | None) -> str:
    """The instructions of this set that multiply matrices of bf16; "" where there are none. What holds oneDNN to AVX-512 keeps
    it from AMX."""
    if name != "avx512":
        return ""
    if not held and torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""


HELD = os.environ.get("CLIPFAST_CPU") or None
NAME = _chosen(HELD)
BF16 = _bf16(NAME, HELD)

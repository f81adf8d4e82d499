"""A Python that says it has a GPU: ``python tests/bench/stand_in.py -m MODULE ARGUMENTS`` rehearses a stage of bench.run.

Tensors "on cuda" are CPU tensors, Triton's kernels run in its interpreter, those in CUDA C++ are played by the specs, sizes are
tiny, and nothing is compiled or captured. With ``STAND_IN_FAULT=KIND ARGUMENTS`` the stage that has these arguments breaks as
soon as it has written its first result: ``kill``, ``hang``, ``raise`` (a CUDA error) or ``memory``.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

NAME, HARDWARE = "Stand-in GPU", "compute capability 9.0"


class OnTheCpu(TorchFunctionMode):
    """Whatever asks for the GPU is given the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = {k: _here(v) for k, v in (kwargs or {}).items()}
        return function(*map(_here, args), **kwargs)


def _here(value: Any) -> Any:
    gpu = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cuda"
    return "cpu" if gpu else value


class Stream:
    wait_stream = staticmethod(lambda *_: None)


class Event:
    def __init__(self, **_: Any) -> None:
        pass

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at) + 1e-6


def no_graph(*_: Any, **__: Any) -> Any:
    raise RuntimeError("nothing is captured or compiled in the stand-in")


def nothing(*_: Any, **__: Any) -> None:
    pass


def play() -> None:
    """torch as it is with a GPU."""
    properties = SimpleNamespace(L2_cache_size=1 << 16, multi_processor_count=2)
    fakes: dict[str, Any] = dict(
        is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda *_: NAME,
        get_device_capability=lambda *_: (9, 0), get_device_properties=lambda *_: properties,
        mem_get_info=lambda *_: (20 << 30, 20 << 30), memory_allocated=lambda *_: 0, max_memory_allocated=lambda *_: 1 << 20,
        Event=Event, Stream=Stream, current_stream=lambda *_: Stream(), stream=nullcontext, CUDAGraph=SimpleNamespace,
        graph=no_graph, synchronize=nothing, empty_cache=nothing, reset_peak_memory_stats=nothing, set_sync_debug_mode=nothing,
    )  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    generator, autocast = torch.Generator, torch.autocast

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return generator(_here(device))

    torch.Generator = Generator  # type: ignore[assignment,misc]
    torch.autocast = lambda device, *args, **options: autocast(_here(device), *args, **options)  # type: ignore[assignment,misc]
    torch.compile = lambda *_, **__: no_graph  # type: ignore[assignment]
    OnTheCpu().__enter__()


def shrink() -> None:
    """The kernels as on a GPU that has passed nothing yet, at sizes that the interpreter affords."""
    from clipfast import kernels
    from clipfast.kernels import dispatch, passed
    from clipfast.model import MODELS

    passed.hardware, passed.device_name = lambda device: HARDWARE, lambda device: NAME
    dispatch.AUTOMATIC["cpu"] = dispatch.AUTOMATIC["cuda"]
    real = dispatch.Backends.backend

    def backend(self: Any, name: str) -> Any:
        if name != "cuda" or not passed.source_of(self.name, "cuda").exists():
            return real(self, name)
        parts = {part: getattr(self.spec, part) for part in self.parts}
        return SimpleNamespace(supports=lambda x, *_: "no fp64" if x.dtype == torch.float64 else None, **parts)

    dispatch.Backends.backend = backend  # type: ignore[method-assign,assignment]

    from bench import measure, sizes

    measure.DTYPE = torch.float16  # the interpreter cannot multiply bf16
    measure.roofline = lambda: dict(bytes_per_s=1e10, flops_per_s=1e11)
    sizes.LOSSES, sizes.MORE_LOSSES, sizes.GROWTH, sizes.WIDTH = [16, 32], [], [16, 32], 16
    sizes.LAW = 0
    sizes.IMAGES, sizes.CAPTIONS, sizes.PAIRS = [("ViT-L/14", 2), ("ViT-B/32", 1)], 3, [2]
    tiny = dict(image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16, transformer_width=64)
    for name in ("ViT-B/32", "ViT-L/14"):
        MODELS[name] |= tiny | dict(transformer_heads=1, transformer_layers=1, embed_dim=16)
    for op, home in kernels.OPS.items():
        cases = dict(list(home.spec.CASES.items())[:2])
        home.spec.CASES = cases
        home.spec.BENCH_GPU = cases if hasattr(home.spec, "BENCH_GPU") else {}
        home.spec.BENCH = cases
        for table in (sizes.FIRST, sizes.PARTS):
            if op in table:
                table[op] = dict(list(cases.items())[:1])


def armed(kind: str) -> None:
    """Break behind the first result, or at the end of a stage that writes none."""
    from bench import lines

    real = lines.append

    def append(path: Any, what: str, **found: Any) -> None:
        real(path, what, **found)
        if path is not None and what not in ("machine", "tests", "library", "roofline"):
            strike(kind)

    lines.append = append


def strike(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(1e6)
    raise torch.OutOfMemoryError("CUDA out of memory") if kind == "memory" else RuntimeError("CUDA error: illegal access")


def main(arguments: list[str]) -> None:
    kind, _, whom = os.environ.get("STAND_IN_FAULT", "").partition(" ")
    play()
    shrink()
    faulty = bool(kind) and " ".join(arguments).endswith(whom)
    if faulty:
        armed(kind)
    if arguments[1] == "pytest":
        import pytest

        code = int(pytest.main(arguments[2:]))
        if faulty:
            strike(kind)
        sys.exit(code)
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    if faulty:
        strike(kind)


if __name__ == "__main__":
    main(sys.argv[1:])

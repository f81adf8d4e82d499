"""What the benchmarks measure with: time, peak memory, and the ceilings of this device."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, sleep
from typing import Any

import torch

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
SHORT = 2e-3  # seconds: below it the launches of a step weigh, and a GPU's calls are timed as captured graphs
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 1 << 20  # bytes from which on a block is a mapping of its own while memory is measured
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@functools.cache
def memory_lacks() -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if DEVICE == "cuda":
        return None
    try:
        _CLEAR.write_text("5")
        _resident("VmHWM")
    except (OSError, TypeError):
        return "the peak of a CPU's memory needs Linux: VmHWM in /proc/self/status, reset through /proc/self/clear_refs"
    return None


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes that ``call`` needs at its peak beyond what is held before it; None where ``memory_lacks()`` says why.

    On a GPU the allocator's bytes. On the CPU resident pages, to about 0.1 MB, whatever ran before: what earlier calls left
    free in the heap goes back to the system first, so that its reuse counts, and is taken, so that large blocks are new ones
    that go back when they are freed. Call it once before: what a library keeps for good is not of one call.
    """
    if memory_lacks():
        return None
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    mallopt, trim = (getattr(libc, name, lambda *_: None) for name in ("mallopt", "malloc_trim"))  # glibc's
    mallopt(_MMAP_THRESHOLD, _LARGE)  # larger blocks come from the system and go back: no gaps in the heap are counted
    gaps = _fill_gaps(libc)
    trim(0)
    try:
        _CLEAR.write_text("5")  # the peak is now what is resident
        before = _resident("VmHWM")
        call()
        return _resident("VmHWM") - before
    finally:
        for gap in gaps:
            libc.free(gap)
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adjustment ends after a few large blocks, and with it
        mallopt(_TRIM_THRESHOLD, 64 << 20)


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2: hblks counts the blocks that are mappings of their own, fordblks the free bytes of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    ]


def _fill_gaps(libc: Any) -> list[int]:
    """Blocks that fill every gap of ``_LARGE`` bytes in the heap, untouched, so that none of their pages is resident.

    glibc looks for a gap before it asks the system, and which one it takes follows from all that was freed before: the second
    of two equal calls may get another gap than the first, whose pages stay, and the peak is twice what is needed at a time.
    """
    if not (hasattr(libc, "mallinfo2") and hasattr(libc, "malloc_trim")):
        return []
    libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = _Mallinfo, ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.malloc_trim(0)  # the top of the heap is no gap then
    info, gaps = libc.mallinfo2(), []
    size, mappings = info.fordblks, info.hblks
    while size >= _LARGE:
        block = libc.malloc(size)
        if block and libc.mallinfo2().hblks == mappings:
            gaps.append(block)
        else:
            libc.free(block)
            size //= 2
    return gaps


def _resident(what: str) -> int:
    return int(re.search(rf"{what}:\s*(\d+) kB", _STATUS.read_text())[1]) << 10  # type: ignore[index]


@functools.cache
def _evictor() -> torch.Tensor:
    """A buffer of twice the last cache: whoever walks through it finds nothing else there."""
    if DEVICE == "cuda":
        size = torch.cuda.get_device_properties().L2_cache_size
    else:
        found = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        size = int(found.read_text().rstrip("K\n")) << 10 if found.exists() else 32 << 20
    return torch.ones(2 * min(size, 64 << 20), dtype=torch.uint8, device=DEVICE)


def seconds(call: Callable[[], Any], graph: bool = False, rest: float = 0.0) -> float:
    """The time of one call, from a cold cache; ``graph``: it is a captured graph; ``rest``: seconds of peace before it."""
    _evictor().bitwise_xor_(3)
    sleep(rest)
    if DEVICE == "cpu":
        start = perf_counter()
        call()
        return perf_counter() - start
    if not graph:  # a graph's launch hides behind the eviction; the launches of other calls are part of their time
        torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call as a CUDA graph to replay; None where it asks the device for something and cannot be one.

    It is tried first where such a question is an error: one inside a capture breaks that, and ``capture_end`` then throws
    before torch restores the stream, so that all later work of the process goes the wrong way.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):  # restores the stream whatever is thrown inside
            call()  # lazy initialisation first, on the stream of the capture
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            call()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                call()
    except RuntimeError:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return None
    return graph.replay


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def spread(times: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile, in ms."""
    fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    return dict(median=1e3 * median(times), p20=1e3 * fifths[0], p80=1e3 * fifths[3])


def roofline() -> dict[str, float]:
    """This device's ceilings now, the best of some rounds: a copy (read and written bytes/s), a matrix product (FLOP/s).

    In fp32 on a CPU, bf16 on a GPU, on random data: zeros run faster than anything real.
    """
    side, length = (8192, 1 << 29) if DEVICE == "cuda" else (2048, 1 << 26)
    x = torch.randn(side, side, device=DEVICE, dtype=DTYPE)
    source = x.flatten().repeat(length // side**2)
    target = torch.empty_like(source)
    copying = [seconds(lambda: target.copy_(source)) for _ in range(5)]
    product = torch.empty_like(x)
    multiplying = [seconds(lambda: torch.mm(x, x, out=product)) for _ in range(5)]
    if DEVICE == "cpu" and torch.backends.mkldnn.is_available():  # torch multiplies by MKL, which is slow on AMD
        multiplying += [seconds(lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")) for _ in range(5)]
    moved = 2 * source.numel() * source.element_size()
    return dict(bytes_per_s=moved / min(copying), flops_per_s=2 * side**3 / min(multiplying))


def achieved(floor: tuple[int, int], time: float, ceilings: dict[str, float]) -> dict[str, Any]:
    """What a call of ``time`` seconds with this floor (FLOPs, bytes) reaches of the roofline.

    ``limit`` is the ceiling that binds, ``rate`` what is reached of it (bytes/s or FLOP/s) and ``share`` how much that is.
    """
    flops, moved = floor
    compute, memory = flops / ceilings["flops_per_s"], moved / ceilings["bytes_per_s"]
    limit, rate = ("flops", flops / time) if compute > memory else ("bytes", moved / time)
    return dict(flops=flops, bytes=moved, limit=limit, rate=rate, share=max(compute, memory) / time)

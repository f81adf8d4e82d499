"""Whether products of bf16 are faster on this CPU at a model's own sizes: measured where it has instructions for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipfast.kernels import mlp, processor
from clipfast.model.transformer import Transformer

MARGIN = 1.2  # by which bf16 must win: what is a tie stays exact
# Weights of an MLP's first product below which fp32 is taken unmeasured, 256 channels: a run repeats bit for bit, and bf16 wins
# little (a Zen 4, forward and backward, 1,024 rows: 1.1 x for 64 channels, 1.3 for 128, 1.6 for 256, 1.7 for 512, 2.1 for 768).
LEAST = 1 << 18
ROUNDS = 5
WORK = 1 << 31  # multiply-adds of a call at most: 20 to 40 ms a core


class Timed(NamedTuple):
    """Seconds of one MLP."""

    fp32: float
    bf16: float

    @property
    def pays(self) -> bool:
        return self.fp32 >= MARGIN * self.bf16

    def __str__(self) -> str:
        return f"an MLP of the model takes {1e3 * self.fp32:.1f} ms in fp32, {1e3 * self.bf16:.1f} ms in bf16"


def widest(model: nn.Module) -> Transformer | None:
    """The transformer of a model whose blocks have the most weights."""
    found = [module for module in model.modules() if isinstance(module, Transformer) and len(module.resblocks)]
    return max(found, key=lambda t: t.width**2 * len(t.resblocks), default=None)


def lacks(transformer: Transformer | None) -> str | None:
    """Why fp32 is taken without a measurement, or None."""
    if not processor.BF16:
        return f"this processor ({processor.NAME}) has no instructions for products of bf16"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if transformer is None:
        return "the model has no transformer of ours"
    if 4 * transformer.width**2 < LEAST:
        return f"its blocks are narrower than {int((LEAST / 4) ** 0.5)} channels, got {transformer.width}"
    return None


def slow_in_bf16(model: nn.Module) -> str | None:
    """Why a model is not to infer in bf16 on this machine, or None."""
    transformer = widest(model)
    if not (reason := lacks(transformer)) and transformer is not None:
        found = _inferring(transformer.width, torch.get_num_threads())
        reason = None if found.pays else str(found)
    return reason


@lru_cache
def _inferring(width: int, threads: int) -> Timed:
    """Of an image, or of four captions."""
    return timed(width, 50, training=False)


def timed(width: int, rows: int, training: bool, clock: Callable[[], float] = perf_counter) -> Timed:
    """An MLP of that width for so many tokens, forward and in training backward; medians of calls in turn."""
    hidden, times = 4 * width, 3 if training else 1
    rows = max(1, min(rows, WORK // (2 * times * width * hidden)))
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x, fc, proj = normal(rows, width), normal(hidden, width) * width**-0.5, normal(width, hidden) * hidden**-0.5
    biases = normal(hidden), normal(width)

    def call(dtype: torch.dtype) -> Callable[[], None]:
        given = [x.clone(), fc.to(dtype), biases[0], proj.to(dtype), biases[1]]

        def run() -> None:
            with torch.set_grad_enabled(training):
                y = mlp(*(t.requires_grad_(training) for t in given))
                if training:
                    torch.autograd.grad(y, given, y.detach())

        return run

    return Timed(*_medians((call(torch.float32), call(torch.bfloat16)), clock))


def _medians(calls: Iterable[Callable[[], None]], clock: Callable[[], float]) -> list[float]:
    calls = list(calls)
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + ROUNDS):
        for call, seconds in zip(calls, found, strict=True):
            start = clock()
            call()
            seconds.append(clock() - start)
    return [median(seconds[1:]) for seconds in found]  # the first compiles

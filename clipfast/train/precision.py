"""What a run computes in: as its config says, as it was begun, or by a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from clipfast.kernels import processor
from clipfast.model.products import lacks, timed, widest
from clipfast.model.transformer import ResidualAttentionBlock
from clipfast.train.config import TrainConfig
from clipfast.train.job import Job

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CAPTION = 16  # tokens of a pair at the least that a tower multiplies at a time


class Begun(NamedTuple):
    """How a run computed before it was interrupted."""

    precision: str
    device: str  # its type


def first(config: TrainConfig, device: torch.device) -> str:
    """The precision of a config; of `auto` what holds until ``chosen`` is asked."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def products_alone(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether a lower precision is that of the blocks' products alone, and all else is fp32: on a CPU, where whatever is not a
    product is slower in bf16 (a step of the demo's model took half as long again)."""
    return dtype == torch.bfloat16 and device.type == "cpu"


@contextmanager
def products_in(dtype: torch.dtype | None, model: nn.Module) -> Iterator[None]:
    """The products of a model's blocks in that dtype, for a forward pass and its backward pass."""
    blocks = [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]
    for block in blocks:
        block.products = dtype
    try:
        yield
    finally:
        for block in blocks:
            block.products = None


def chosen(config: TrainConfig, model: nn.Module, parts: int, job: Job, begun: Begun | None) -> tuple[str, str]:
    """What a run takes, the same on all ranks, and what to tell of it ("": nothing).

    parts: micro-batches of a rank.
    begun: None of a new run. Who goes on on a CPU keeps what was chosen there, whatever this machine would choose.
    """
    taken = first(config, job.device)
    if config.precision != "auto":
        return taken, ""
    if job.device.type == "cpu" and begun and begun.device == "cpu":
        slow = begun.precision == "bf16" and not processor.BF16
        return begun.precision, "bf16, as the run began, though this processor has no instructions for it" if slow else ""
    if job.device.type == "cpu":
        taken, told = measured(model, config.batch_size // job.world // parts, job)
        if told:
            return taken, told
    return taken, f"{taken}, after {begun.precision} on a {begun.device}" if begun and begun.precision != taken else ""


def measured(model: nn.Module, pairs: int, job: Job) -> tuple[str, str]:
    """The faster precision on this CPU for so many pairs at a time, and the figures; no figures where fp32 is the only one."""
    transformer = widest(model)
    if any(job.gather(lacks(transformer))) or transformer is None:
        return "fp32", ""
    found = timed(transformer.width, pairs * CAPTION, training=True)
    found = type(found)(*job.most(*found))  # of the slowest rank, which all wait for
    taken = "bf16" if found.pays else "fp32"
    return taken, f"{taken}: {found}"

"""What several GPUs do together: ``torchrun --nproc-per-node=gpu -m bench.ranks LINES losses|ddp|fsdp`` (make gpu-multi).

Every rank's result is held against one process with the whole batch, then timed; rank 0 writes the lines. Written without
several GPUs at hand: on CPUs (gloo) a test runs it, over NCCL nobody has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench import sizes
from bench.lines import append
from bench.measure import DEVICE, DTYPE, seconds, spread
from clipfast.loss import clip_loss, siglip_loss

ROUNDS = 7


def batch(N: int, D: int) -> list[Tensor]:
    """The whole batch [N, D], the same on every rank, with a scale and a bias."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    image, text = (torch.randn(N, D, generator=generator, device=DEVICE) for _ in range(2))
    rows = F.normalize(image, dim=1), F.normalize(text + 0.1 * image, dim=1)
    return [*(x.to(DTYPE) for x in rows), torch.tensor(20.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)]


def loss_and_gradients(name: str, given: list[Tensor], group: Any = None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given[: 3 if name == "clip" else 4]]
    value = (clip_loss if name == "clip" else siglip_loss)(*leaves, group=group)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def losses(path: Path, rank: int, world: int) -> None:
    """Each loss over all ranks: how far its value and its gradients are from one process's, and its time."""
    N = sizes.LOSSES[-1] // world * world
    whole = batch(N, sizes.WIDTH)
    own = [x.chunk(world)[rank] if x.ndim else x for x in whole]
    for name in ("clip", "siglip"):
        got, expected = loss_and_gradients(name, own, dist.group.WORLD), loss_and_gradients(name, whole)
        # The mean over ranks, which DDP takes, is one process's gradient: a rank's own is `world` times its rows of it.
        apart = [(g.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30) for g, e in zip(
            [got[0], got[1] / world, got[2] / world],
            [expected[0], *(e.chunk(world)[rank] for e in expected[1:3])], strict=True)]  # fmt: skip
        worst = torch.stack(apart).max()
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        written(
            path, rank, f"loss {name}-{N}", lambda name=name: loss_and_gradients(name, own, dist.group.WORLD), N, worst.item()
        )


def step(path: Path, rank: int, world: int, parallel: str) -> None:
    """One update of ViT-B/32 as ``clipfast train`` makes it, under DDP or FSDP: its time; all ranks must have one loss."""
    from clipfast.data import Batch
    from clipfast.model import CLIP, MODELS
    from clipfast.train import TrainConfig
    from clipfast.train.engine import Engine
    from clipfast.train.job import joined

    B = sizes.PAIRS[0]
    with joined() as job:
        config = TrainConfig(model="ViT-B/32", steps=100, batch_size=B * world, parallel=parallel)
        torch.manual_seed(0)
        engine = Engine(config, job, CLIP(**MODELS["ViT-B/32"]))
        side = MODELS["ViT-B/32"]["image_resolution"]
        generator = torch.Generator().manual_seed(rank)
        pixels = torch.randint(0, 256, (B, 3, side, side), generator=generator, dtype=torch.uint8)
        lengths = torch.randint(5, 17, (B,), generator=generator)
        tokens = torch.zeros(B, 77, dtype=torch.int32)
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            row[:length] = torch.randint(1, 49000, (length,), generator=generator)
            row[0], row[length - 1] = 49406, 49407
        data = Batch(pixels, tokens, lengths)
        found = [engine.update(data, 1e-4)["loss"] for _ in range(2)]
        every: list[Any] = [None] * world
        dist.all_gather_object(every, found)
        wrong = 0.0 if all(one == every[0] for one in every) else float("nan")
        written(path, rank, f"{parallel} step ViT-B/32", lambda: engine.update(data, 1e-4), B * world, wrong)


def written(path: Path, rank: int, name: str, call: Any, items: int, error: float) -> None:
    """Time a call that all ranks make together, and let rank 0 append its row; ``error``: of the result, kept in the row."""
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        times.append(seconds(call))
    if rank == 0:
        append(path, "row", group="ranks", name=f"{name}, {dist.get_world_size()} ranks", ms=spread(times), memory=None,
               items_per_s=items / median(times), roofline=None, rivals={}, error=error)  # fmt: skip


def main(path: str, what: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if what == "losses":
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
        losses(Path(path), rank, world)
        dist.destroy_process_group()
    else:
        step(Path(path), rank, world, what)


if __name__ == "__main__":
    main(*sys.argv[1:])

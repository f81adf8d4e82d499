"""The contrastive losses, forward and backward, against every other way to compute them: time, memory, growth with N."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import sizes
from bench.measure import DEVICE, DTYPE, peak_memory, reason
from bench.rivals import imported, open_clip
from bench.sizes import GPU
from bench.test_kernels import floor
from clipfast.kernels import OPS
from clipfast.loss import clip_loss, siglip_loss

D, CHUNK = sizes.WIDTH, 1024
Loss = Callable[..., Tensor]


def features(N: int) -> tuple[Tensor, ...]:
    """Features of pairs as a half-trained model has them, a scale and a bias, all of which learn."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    image, text = (torch.randn(N, D, generator=generator, device=DEVICE) for _ in range(2))
    rows = F.normalize(image, dim=1), F.normalize(text + 0.1 * image, dim=1)
    scalars = torch.tensor(20.0, device=DEVICE), torch.tensor(-10.0, device=DEVICE)
    return tuple(x.requires_grad_() for x in (*(x.to(DTYPE) for x in rows), *scalars))


def chunked_clip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Cross-entropy in blocks of rows, the logits made again for backward: what a careful user of plain PyTorch writes."""

    def direction(rows: Tensor, columns: Tensor) -> Tensor:
        def block(part: Tensor, start: int) -> Tensor:
            target = torch.arange(start, start + len(part), device=part.device)
            return F.cross_entropy((scale * part @ columns.T).float(), target, reduction="sum")

        parts: Any = enumerate(rows.split(CHUNK))
        return sum(checkpoint(block, part, k * CHUNK, use_reentrant=False) for k, part in parts) / len(rows)

    return (direction(image, text) + direction(text, image)) / 2


def chunked_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    def block(part: Tensor, start: int) -> Tensor:
        logits = (scale * part @ text.T + bias).float()
        signs = torch.full_like(logits, -1.0)
        signs.diagonal(start).fill_(1.0)
        return -F.logsigmoid(signs * logits).sum()

    parts: Any = enumerate(image.split(CHUNK))
    return sum(checkpoint(block, part, k * CHUNK, use_reentrant=False) for k, part in parts) / len(image)


def inf_cl() -> Loss | str:
    """Inf-CL, of both directions."""
    found: Any = imported("inf_cl")
    if isinstance(found, str):
        return found

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        one, other = found.cal_flash_loss(image, text, scale=scale), found.cal_flash_loss(text, image, scale=scale)
        return (one.mean() + other.mean()) / 2

    return loss if GPU else "inf-cl runs on CUDA only"


def siglip_kernel(chunk: int = 0) -> Loss | str:
    """siglip-kernel with the backend and the chunks that it chooses itself (4,096 rows on Hopper), or with chunks of so many
    rows: 1,024 need the least memory, more are faster."""
    found: Any = imported("siglip_kernel")
    if isinstance(found, str):
        return found
    if not GPU:
        return "siglip-kernel runs on CUDA only"
    if chunk:
        return lambda i, t, s, b: found.fused_chunked_bf16_siglip_loss(i, t, s.log(), b, chunk_size=chunk)
    return lambda i, t, s, b: found.fused_siglip_loss(i, t, s.log(), b)


def contenders(name: str, N: int, compiled: bool) -> dict[str, Loss | str]:
    """Ours first. Eager is open_clip's module, its logits in the type of the features, as under autocast."""
    need, free = 16 * N * N, torch.cuda.mem_get_info()[0] if GPU else 20 << 30
    absent = open_clip if isinstance(open_clip, str) else f"about {need / 1e9:,.0f} GB for its logits" if need > free else ""
    eager: Loss | None = None
    if name == "clip":
        rivals, ours = {"chunked": chunked_clip, "inf-cl": inf_cl()}, lambda i, t, s, b: clip_loss(i, t, s)
        if not absent:
            module = open_clip.loss.ClipLoss()
            eager = lambda i, t, s, b: module(i, t, s)  # noqa: E731
    else:
        rivals, ours = {"chunked": chunked_siglip, "siglip-kernel": siglip_kernel()}, siglip_loss
        rivals |= {f"siglip-kernel {chunk:,}": siglip_kernel(chunk) for chunk in (1024, 16384)}
        eager = None if absent else open_clip.loss.SigLipLoss()
    found: dict[str, Loss | str] = {"ours": ours, "open_clip": eager or absent}
    if compiled:
        found["compiled open_clip"] = torch.compile(eager) if eager else absent
    return found | rivals


def forward_backward(loss: Loss, given: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A call of the loss and of its backward; returns the loss."""

    def run() -> Tensor:
        value = loss(*given)
        torch.autograd.grad(value, given, allow_unused=True)
        return value.detach()

    return run


@pytest.mark.parametrize("N", [*sizes.LOSSES, *(pytest.param(N, marks=pytest.mark.full) for N in sizes.MORE_LOSSES)])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss(compare, full: bool, name: str, N: int) -> None:
    given = features(N)
    compiles = GPU or (full and N == 4096)  # on a CPU it takes longer than all else
    runs = {k: v if isinstance(v, str) else forward_backward(v, given) for k, v in contenders(name, N, compiles).items()}
    ours: Any = runs.pop("ours")
    runs = {rival: run if isinstance(run, str) else agreeing(run, ours()) for rival, run in runs.items()}
    assert not str(runs["open_clip"]).startswith("it computes")
    op = "contrastive" if name == "clip" else "pairwise_sigmoid"
    least = floor(OPS[op].spec, dict(N=N, D=D))
    compare(ours, runs, rounds=1 if N == 16384 else None, items=N, floor=least, N=N, D=D)


def agreeing(rival: Callable[[], Tensor], expected: Tensor) -> Callable[[], Tensor] | str:
    """The rival, or why it is none: what it raises, or another loss."""
    try:
        got = rival()
    except Exception as error:  # noqa: BLE001 - whatever a rival raises is the reason
        return reason(error)
    close = torch.allclose(got.float(), expected.float(), rtol=2e-2 if GPU else 1e-5, atol=1e-4)
    return rival if close else f"it computes something else: {got.item()}, not {expected.item()}"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_growth(compare, full: bool, name: str) -> None:
    """Time and memory of all at every N that they can do, and the exponents of ours from 4,096 on: N² and N are the law."""
    grown = sizes.GROWTH + (sizes.MORE_GROWTH if full else [])
    longest = 2500 if full or GPU else 300  # ms of a rival: each doubling takes four times as long
    series: dict[str, list[dict[str, Any]]] = {}
    for N in grown:
        given = features(N)
        for contender, loss in contenders(name, N, False).items():
            last = series.setdefault(contender, [])
            too_long = contender != "ours" and last and last[-1]["ms"] > longest
            if isinstance(loss, str) or too_long or len(last) < grown.index(N):
                continue
            run, times = forward_backward(loss, given), []
            if not last:
                run()  # what a library keeps for good is not of one call
            memory = peak_memory(run)
            for _ in range(1 if last and last[-1]["ms"] > longest else 3):
                start = perf_counter()
                float(run())  # waits for the device
                times.append(perf_counter() - start)
            last.append(dict(N=N, ms=1e3 * median(times), bytes=memory))
    own = [point for point in series["ours"] if point["N"] >= sizes.LAW]
    exponents = {what: exponent(own, what) for what in ("ms", "bytes")}
    first = forward_backward(contenders(name, grown[0], False)["ours"], features(grown[0]))  # type: ignore[arg-type]
    compare(first, {}, rounds=3, D=D, series=series, exponents=exponents)


def exponent(points: list[dict[str, Any]], what: str) -> float:
    """The slope of the least-squares line through log(what) against log(N)."""
    x, y = ([math.log(p[k] or math.nan) for p in points] for k in ("N", what))
    centre = sum(x) / len(x), sum(y) / len(y)
    return sum((a - centre[0]) * (b - centre[1]) for a, b in zip(x, y, strict=True)) / sum((a - centre[0]) ** 2 for a in x)

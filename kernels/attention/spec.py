"""Multi-head self-attention (Vaswani et al. 2017, section 3.2) from one packed projection: definition, cases, floors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "L50 K64": dict(lengths=(50, 50), heads=2),
    "L1": dict(lengths=(1, 1), heads=3),
    "L3, causal": dict(lengths=(3, 3), heads=1, causal=True),
    "L17": dict(lengths=(17,) * 3, heads=3),
    "L77, causal": dict(lengths=(77,), heads=2, causal=True),
    "L197": dict(lengths=(197,)),
    "L257": dict(lengths=(257,)),
    "L577, causal": dict(lengths=(577,), causal=True),
    "L1024, causal": dict(lengths=(1024,), causal=True),
    "L131 K32": dict(lengths=(131,), K=32),
    "L577 K32, causal": dict(lengths=(577,), K=32, causal=True),
    "L257 K80": dict(lengths=(257,), K=80),
    "L77 K128, causal": dict(lengths=(77,), K=128, causal=True),
    "packed K96, causal": dict(lengths=(1, 40, 0, 77), heads=2, K=96, causal=True, packed=True),
    "packed K32": dict(lengths=(0, 33, 1), heads=2, K=32, packed=True),
    "L37 K80": dict(lengths=(37,), K=80),
    "L50 K96, causal": dict(lengths=(50,), K=96, causal=True),
    "L29 K128": dict(lengths=(29,), heads=2, K=128),
    "L11 K24": dict(lengths=(11,), K=24),
    "one sequence of rows": dict(lengths=(23,), heads=2, rows=True),
    "packed, causal": dict(lengths=(7, 0, 12, 1, 41, 0, 5), heads=2, causal=True, packed=True),
    "packed": dict(lengths=(19, 3, 1, 0, 17), heads=2, packed=True),
    "packed, long": dict(lengths=(3, 149, 0), packed=True, causal=True),
    "packed, all empty": dict(lengths=(0, 0), packed=True),
    "packed, slack": dict(lengths=(5, 33), packed=True, max_length=77),
    "batch inside": dict(lengths=(19, 19), heads=2, layout="batch inside"),
    "transposed": dict(lengths=(19, 19), heads=2, layout="transposed"),
    "packed, transposed": dict(lengths=(13, 8), packed=True, layout="transposed"),
    "no sequences": dict(lengths=()),
    "sharp": dict(lengths=(50,), spread=6.0),
}
BENCH: dict[str, dict[str, Any]] = {
    "demo image": dict(lengths=(17,) * 128, heads=3),
    "demo text": dict(lengths=(5, 6, 7, 9, 4, 12, 8, 5) * 16, heads=2, causal=True, packed=True),
    "B/32 text of 12": dict(lengths=(9, 12, 15, 7, 17, 10, 14, 12) * 8, heads=8, causal=True, packed=True),
    "B/32": dict(lengths=(50,) * 32, heads=12),
    "text of 77": dict(lengths=(77,) * 16, heads=8, causal=True),
    "B/16": dict(lengths=(197,) * 8, heads=12),
    "L/14": dict(lengths=(257,) * 4, heads=16),
    "L/14@336": dict(lengths=(577,) * 2, heads=16),
}
BENCH_GPU: dict[str, dict[str, Any]] = {  # what fills a GPU
    "B/32 x 1024": dict(lengths=(50,) * 1024, heads=12),
    "text of 12 x 4096": dict(lengths=(9, 12, 15, 7, 17, 10, 14, 12) * 512, heads=8, causal=True, packed=True),
    "text of 77 x 1024": dict(lengths=(77,) * 1024, heads=8, causal=True),
    "B/16 x 256": dict(lengths=(197,) * 256, heads=12),
    "L/14 x 256": dict(lengths=(257,) * 256, heads=16),
    "L/14@336 x 64": dict(lengths=(577,) * 64, heads=16),
}


def inputs(
    generator: torch.Generator,
    lengths: tuple[int, ...],
    heads=1,
    K=64,
    causal=False,
    packed=False,
    rows=False,
    layout="plain",
    spread=1.0,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Arguments of ``attention`` in fp64; ``rows``: a 2-D qkv without cu_seqlens."""
    L, B, device = max(lengths, default=5), len(lengths), generator.device
    flat = packed or rows
    shape = (sum(lengths) if flat else B * L, 3 * heads * K)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64, device=device) * spread**0.5
    if layout == "transposed":
        qkv = qkv.T.contiguous().T
    if not flat:
        qkv = qkv.view(L, B, -1).transpose(0, 1) if layout == "batch inside" else qkv.unflatten(0, (B, L))
    ends = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32) if packed else None
    return dict(qkv=qkv, heads=heads, causal=causal, cu_seqlens=ends, max_length=max_length)


def floors(itemsize: int, lengths: tuple[int, ...], heads=1, K=64, causal=False, **_: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) that forward and backward cannot do without: 2 and 5 GEMMs; qkv, out; qkv, out, dout, dqkv."""
    gemm = 2 * K * heads * sum(L * (L + 1) // 2 if causal else L * L for L in lengths)
    row = sum(lengths) * heads * K * itemsize
    return {"forward": (2 * gemm, 4 * row), "backward": (5 * gemm, 8 * row)}


def reference(
    qkv: Tensor, heads: int, causal: bool = False, cu_seqlens: Tensor | None = None, max_length: int | None = None
) -> Tensor:
    """What ``attention`` means: differentiable, in the dtype of its input."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [reference(qkv[a:b], heads, causal) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return torch.cat(parts) if parts else qkv[:, : qkv.shape[1] // 3]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)  # each [..., H, L, K]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~_before(scores), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def _before(scores: Tensor) -> Tensor:
    """[L, L], true where key j is not after query i."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def eager(qkv: Tensor, heads: int, causal=False, cu_seqlens: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """What a benchmark compares with: PyTorch's fused attention, with the transposes and the padding that it needs."""
    x, inside = qkv, None
    if cu_seqlens is not None:
        place = cu_seqlens[:-1, None] + torch.arange(max_length or int(cu_seqlens.diff().max()), device=qkv.device)
        inside = place < cu_seqlens[1:, None]
        x = F.embedding(place.clamp(max=len(qkv) - 1), qkv)  # its backward is faster than indexing's
    q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    return out if inside is None else out[inside]


def supports(*args: Any) -> None:
    return None


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, L, parts·C] as parts views of [B, H, L, K]."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _rows(*heads: Tensor) -> Tensor:
    """The inverse of ``_heads``: [B, L, parts·C]."""
    return torch.stack(heads).permute(1, 3, 0, 2, 4).flatten(2)


class _Padded:
    """The map between packed rows [T, ·] and padded ones [B, max_length, ·], made without asking the device for a length."""

    def __init__(self, cu_seqlens: Tensor, T: int, max_length: int) -> None:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
        column = torch.arange(max_length, device=cu_seqlens.device)
        self.valid = column < lengths[:, None]  # [B, max_length]
        self.source = (starts[:, None] + column).where(self.valid, 0)
        self.b = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=T)
        self.t = torch.arange(T, device=lengths.device) - starts[self.b]
        self.keys = self.valid[:, None, None, :].clone()  # [B, 1, 1, max_length]
        self.keys[..., :1] = True  # a row of an empty sequence has something to attend to; it is never read

    def pad(self, x: Tensor) -> Tensor:
        """Zeros, not repeated rows, where there is no token: a NaN of one sequence must not reach another."""
        return x[self.source].masked_fill(~self.valid[..., None], 0)

    def pack(self, x: Tensor) -> Tensor:
        return x[self.b, self.t]


def _scores(q: Tensor, k: Tensor, keys: Tensor | None, causal: bool) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if keys is not None:
        scores = scores.masked_fill(~keys, -torch.inf)
    return scores.masked_fill(~_before(scores), -torch.inf) if causal else scores


def forward(qkv: Tensor, cu_seqlens: Tensor | None, heads: int, causal: bool, max_length: int) -> tuple[Tensor, Tensor]:
    T, C = qkv.shape[:-1].numel(), qkv.shape[-1] // 3
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if T == 0:
        return qkv.new_empty((*qkv.shape[:-1], C)), qkv.new_empty((heads, 0), dtype=wide)
    padded = None if cu_seqlens is None else _Padded(cu_seqlens, T, max_length)
    if padded is None and qkv.device.type == "cpu":
        q, k, v = _heads(qkv if qkv.stride(-1) == 1 else qkv.contiguous(), 3, heads)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return _rows(out), lse.transpose(0, 1).reshape(heads, T).contiguous()
    q, k, v = _heads((padded.pad(qkv) if padded else qkv).to(wide), 3, heads)
    scores = _scores(q, k, padded.keys if padded else None, causal)
    lse = scores.logsumexp(-1)
    out = _rows(torch.exp(scores - lse[..., None]) @ v)
    if padded is None:
        return out.to(qkv.dtype), lse.transpose(0, 1).reshape(heads, T).contiguous()
    return padded.pack(out).to(qkv.dtype), padded.pack(lse.transpose(1, 2)).T.contiguous()


def backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor | None,
    heads: int,
    causal: bool,
    max_length: int,
) -> Tensor:
    T, wide = qkv.shape[:-1].numel(), lse.dtype
    if T == 0:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)
    padded = None if cu_seqlens is None else _Padded(cu_seqlens, T, max_length)
    if padded is None and qkv.device.type == "cpu":
        q, k, v = _heads(qkv if qkv.stride(-1) == 1 else qkv.contiguous(), 3, heads)
        (o,), (do,) = _heads(out, 1, heads), _heads(dout.contiguous(), 1, heads)
        lse = lse.view(heads, *qkv.shape[:2]).transpose(0, 1)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal)
        return _rows(dq, dk, dv)
    q, k, v = _heads((padded.pad(qkv) if padded else qkv).to(wide), 3, heads)
    (do,) = _heads((padded.pad(dout) if padded else dout).to(wide), 1, heads)
    p = _scores(q, k, padded.keys if padded else None, causal).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dqkv = _rows(ds @ k, ds.mT @ q, p.mT @ do)
    return (padded.pack(dqkv) if padded else dqkv).to(qkv.dtype)

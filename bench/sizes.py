"""The sizes of what is measured, where they differ between a CPU and a GPU or a GPU alone has them."""

from __future__ import annotations

from typing import Any

from bench.measure import DEVICE

GPU = DEVICE == "cuda"
# Of the losses: rows of a batch, more with --full, the rows of the growth curves, more of them with --full; the width.
LOSSES = [4096, 65536] if GPU else [1024, 4096, 8192]
MORE_LOSSES = [16384, 131072] if GPU else [16384]
GROWTH = [4096 << k for k in range(6)] if GPU else [1024 << k for k in range(4)]
MORE_GROWTH = [262144, 524288, 1048576] if GPU else [16384, 32768, 65536]
LAW = 4096  # rows from which on time grows as N² and memory as N
WIDTH = 768 if GPU else 512
# Of the towers: published size and images of a call (on a GPU the goals are for one image and for what fills it), captions of a
# call, pairs of a training step.
IMAGES = [("ViT-L/14", 256), ("ViT-B/32", 1)] if GPU else [("ViT-B/32", 8), ("RN50", 8)]
CAPTIONS = 256 if GPU else 32
PAIRS = [256] if GPU else [16, 64]

# A kernel's first light: sizes that fit no tile, then those of CLIP.
_PAIRS = {"no tile fits": dict(n=300, N=515, D=72, offset=7), "4k": dict(N=4096, D=768)}
FIRST: dict[str, dict[str, dict[str, Any]]] = {
    "attention": {
        "packed": dict(lengths=(3, 50, 1, 17), heads=2, causal=True, packed=True),
        "B/32": dict(lengths=(50,) * 8, heads=12),
        "text": dict(lengths=(77,) * 8, heads=8, causal=True),
        "B/16": dict(lengths=(197,) * 4, heads=12),
        "L/14": dict(lengths=(257,) * 4, heads=16),
        "L/14@336": dict(lengths=(577,) * 2, heads=16),
    },
    "contrastive": _PAIRS,
    "fused_mlp": {"no tile fits": dict(rows=301, C=192), "4k": dict(rows=4096, C=768)},
    "layer_norm": {"no tile fits": dict(shape=(37, 72), residual=True), "4k": dict(shape=(4096, 768), residual=True)},
    "mlp": {"no tile fits": dict(rows=301, C=72), "4k": dict(rows=4096, C=768)},
    "pairwise_sigmoid": _PAIRS,
    "pooling": {
        "packed": dict(lengths=[3, 50, 1, 17], C=128, heads=2, packed=True),
        "B/32": dict(lengths=[50] * 8, C=768, heads=12),
    },
}
# What our backends take by themselves; by the first of each op the faster one is chosen.
_64K = {"64k": dict(N=65536, D=768)}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "contrastive": _64K,
    "pairwise_sigmoid": _64K,
    "attention": {
        "50 x 1024": dict(lengths=(50,) * 1024, heads=12),
        "77 x 1024": dict(lengths=(77,) * 1024, heads=8, causal=True),
        "197 x 256": dict(lengths=(197,) * 256, heads=12),
        "257 x 256": dict(lengths=(257,) * 256, heads=16),
        "577 x 64": dict(lengths=(577,) * 64, heads=16),
    },
    "fused_mlp": {"B/16 x 256": dict(rows=256 * 197, C=768)},
    "layer_norm": {"B/16 x 256": dict(shape=(256, 197, 768), residual=True)},
}

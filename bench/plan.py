"""What a training job of many GPUs moves and computes in a step, and what bounds it: ``python -m bench.plan``.

The letters are kernels/__init__.py's: N pairs over all ranks, n of them on one, D the embedding's width. Nothing here is
measured: the counts are exact, the rates are given. Those below are the goals and ceilings of a Hopper GPU; where
bench/results holds a GPU's record, ``measured`` puts that record's in their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.record import records
from clipfast.model import CLIP, MODELS

TOKENS = 12  # of a caption with both specials, as people write them: text is packed


@dataclass
class Rates:
    """What one GPU and its link do in a second."""

    towers: float = 790e12 * 0.45  # FLOP/s in 16 bit, at the share of the ceiling that a good training loop reaches
    loss: float = 500e12  # FLOP/s of the contrastive kernel: the middle of the goal, 400 to 550
    link: float = 45e9  # bytes/s each way of a GPU's own 400 Gb/s adapter, between nodes: 50 less headers
    memory: float = 141e9  # bytes of an H200
    source: str = "goals and ceilings, none measured"


def measured() -> Rates:
    """The rates of a committed GPU record, or the goals."""
    rates = Rates()
    for name, record in records().items():
        loss = [
            row["roofline"]["rate"]
            for row in record.get("rows", [])
            if row.get("op") == "contrastive" and row.get("roofline") and row["roofline"]["limit"] == "flops"
        ]
        if record.get("machine", {}).get("kind") == "gpu" and loss:
            towers = 0.45 * record["roofline"]["flops_per_s"]
            rates = replace(rates, loss=max(loss), towers=towers, source=f"{name}.json ({record['machine']['device']})")
    return rates


def tower_flops(name: str) -> tuple[float, float]:
    """FLOPs of one image and one caption of a published size, forward."""
    return image_flops(MODELS[name]), text_flops(MODELS[name], TOKENS)


def image_flops(sizes: dict[str, Any]) -> float:
    """FLOPs of one image through a ViT of these sizes (clipfast.CLIP's arguments), forward."""
    if not isinstance(sizes["vision_layers"], int):
        raise ValueError(f"expected a ViT, got {sizes}: the convolutions of a ResNet are not counted here")
    patch, width = sizes["vision_patch_size"], sizes["vision_width"]
    patches = (sizes["image_resolution"] // patch) ** 2
    return 2 * patches * 3 * patch**2 * width + _tower(patches + 1, width, sizes["vision_layers"], width // 64)


def text_flops(sizes: dict[str, Any], tokens: int) -> float:
    """FLOPs of one caption of so many tokens, forward."""
    return _tower(tokens, *(sizes[f"transformer_{what}"] for what in ("width", "layers", "heads")))


def _tower(tokens: int, width: int, layers: int, heads: int) -> float:
    """A block is 24C² a token and 4LC a token for attention; the last block reads one token of L, which costs 4LC·H for scores
    and values over the inputs and 20C² for that token."""
    block = 24 * width**2 * tokens + 4 * tokens**2 * width
    return (layers - 1) * block + 4 * tokens * width * heads + 20 * width**2


def weights(name: str) -> int:
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in CLIP(**MODELS[name]).parameters())


def plan(name: str, gpus: int, batch: int, micro_batch: int, rates: Rates) -> dict[str, Any]:
    """Seconds and bytes of one step on one GPU.

    Cached gradients: every tower runs forward, then forward and backward (which is twice forward): 4 × forward, or 3 where
    the rank's rows are one micro-batch. The loss: 2·N²·D forward and 8·N²·D backward in the whole job, each block once. The
    links: texts are gathered in 16 bit, their gradients reduce-scattered in fp32, the weights' all-reduced in fp32 by a ring.
    """
    if batch % gpus:
        raise ValueError(f"expected a batch that {gpus} GPUs share evenly, got {batch}")
    n, D, P = batch // gpus, MODELS[name]["embed_dim"], weights(name)
    passes = 3 if micro_batch >= n else 4
    others = (gpus - 1) / gpus
    bytes_features, bytes_weights = others * batch * D * (2 + 2 + 4), 2 * others * P * 4  # texts twice: forward and backward
    towers = passes * n * sum(tower_flops(name)) / rates.towers
    loss = 10 * batch**2 * D / gpus / rates.loss
    features, gradients = bytes_features / rates.link, bytes_weights / rates.link
    last = towers * 2 / passes * min(1.0, micro_batch / n)  # the backward pass that the exchange of gradients hides behind
    return {
        "towers": towers,
        "loss": loss,
        "bytes_features": bytes_features,
        "bytes_weights": bytes_weights,
        "features": features,
        "gradients": gradients,
        "step": towers + max(loss, features) + max(0.0, gradients - last),
        "state": P * 4 * 4,  # fp32 weights, gradients and AdamW's two means: bytes
    }


def breaks(name: str, gpus: int, micro_batch: int, rates: Rates) -> dict[str, int]:
    """Where the plan breaks: the batch from which the loss costs more than the towers; that up to which the features' way over
    the links outlasts the loss's arithmetic; the number of GPUs, at the paper's batch, from which the exchange of gradients
    outlasts the towers."""
    D, flops = MODELS[name]["embed_dim"], sum(tower_flops(name))
    # 10·N²·D / (W·rate) = 4·N·F / (W·rate'): the number of GPUs cancels.
    loss_as_towers = 4 * flops / rates.towers * rates.loss / (10 * D)
    # 10·N²·D / (W·rate) = 8·N·D / link
    link_hidden = 8 * gpus * rates.loss / (10 * rates.link)
    found = 1
    while found < 32_768 and (p := plan(name, found, 32_768, micro_batch, rates))["gradients"] < p["towers"]:
        found *= 2
    return {"loss": round(loss_as_towers), "links": round(link_hidden), "gradients": found}


def table(gpus: int = 256, rates: Rates | None = None) -> str:
    """The plan as Markdown."""
    rates = rates or measured()
    lines = [
        f"{gpus} GPUs; rates: {rates.source}: towers {rates.towers / 1e12:.0f} TFLOP/s, loss {rates.loss / 1e12:.0f} TFLOP/s, "
        f"link {rates.link / 1e9:.0f} GB/s each way per GPU.",
        "",
        "| model, batch | towers | loss | features on a link | gradients on a link | step | pairs/s | 12.8 G pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14"):
        for batch in (32_768, 262_144, 1_048_576):
            p = plan(name, gpus, batch, 256, rates)
            pace = batch / p["step"]
            lines.append(
                f"| {name}, {batch:,} | {_ms(p['towers'])} | {_ms(p['loss'])} | {p['bytes_features'] / 1e6:,.0f} MB, "
                f"{_ms(p['features'])} | {p['bytes_weights'] / 1e9:.2f} GB, {_ms(p['gradients'])} | {_ms(p['step'])} | "
                f"{pace:,.0f} | {12.8e9 / pace / 3600:,.1f} h |"
            )
    lines += ["", "Where it breaks:", ""]
    for name in ("ViT-B/32", "ViT-L/14"):
        b = breaks(name, gpus, 256, rates)
        lines.append(
            f"- {name}: the loss costs as much as the towers from a batch of {b['loss']:,}; up to a batch of {b['links']:,} "
            f"the features take longer over the links than the loss computes; at a batch of 32,768 the exchange of gradients "
            f"outlasts the towers from {b['gradients']:,} GPUs on."
        )
    return "\n".join(lines)


def page() -> str:
    """bench/plan.md: made, never edited."""
    return f"# The paper's training on 256 GPUs, by calculation\n\nMade by `python -m bench.plan`.\n\n{table()}\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if math.isfinite(seconds) else "never"


if __name__ == "__main__":
    (Path(__file__).parent / "plan.md").write_text(page())
    print(page())

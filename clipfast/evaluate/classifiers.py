"""Top-1 and top-5 of a classifier: a model that gives logits, without texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clipfast.data import Tally, read_images
from clipfast.data.sources import Sample, Source


def classifier_source(
    model: nn.Module,
    preprocess: Callable[[Any], Tensor],
    source: Source,
    classes: Sequence[str] = (),
    *,
    batch_size: int = 64,
    threads: int = 2,
    tally: Tally | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 over a source whose samples have a class: a folder's name, a shard's .cls, the caption in a table.

    A class that is a number is the model's output of that number. `classes` names the outputs in their order; without, as many
    names as outputs are taken in sorted order, as torchvision's ImageFolder numbers them.

    Raises:
        ValueError: no images, an image without a class, classes that the outputs cannot be told of, or outputs that are no
            finite logits [B, classes]. Of equal logits the first output counts as the higher.
    """
    tally, labels, best, outputs = tally or Tally(), list[Any](), list[Tensor](), 0
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode(), tqdm(unit=" images", desc="classify") as bar:
            for samples, pixels in read_images(source.samples(), preprocess, batch_size, tally, threads):
                labels += map(_label, samples)
                logits = model(pixels.to(device))
                if logits.ndim != 2 or not logits.isfinite().all():
                    raise ValueError(f"expected finite logits [{len(pixels)}, classes], got {list(logits.shape)}")
                outputs = logits.shape[1]
                best.append(logits.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu())
                bar.update(len(samples))
    finally:
        model.train(training)
    tally.check()
    if not labels:
        raise ValueError("expected images to evaluate on, got none")
    hits = torch.cat(best) == _outputs(labels, classes, outputs)[:, None]
    shares = {f"top{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5)}
    return shares | {"images": len(labels), "classes": outputs}


def _label(sample: Sample) -> str | int:
    label = sample.meta.get("class", sample.caption)
    if not isinstance(label, str | int):
        raise ValueError(
            "expected the class of every image (its folder, a .cls in the shard, or a table's caption_column), but "
            f"{sample.key} has none"
        )
    return label


def _outputs(labels: Sequence[str | int], classes: Sequence[str], outputs: int) -> Tensor:
    """The output [images] that each label means."""
    names = [*dict.fromkeys(classes)]
    if names and len(names) != outputs:
        raise ValueError(f"expected a name for each of the {outputs} outputs, got {len(names)}; give them in a file of classes")
    seen = dict.fromkeys(labels)
    index: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    for label in seen.keys() - index.keys():
        if isinstance(label, int) or label.isdecimal():
            index[label] = int(label)
    if not names and not seen.keys() <= index.keys() and len(seen) == outputs:
        index = {name: number for number, name in enumerate(sorted(map(str, seen)))}
    if unknown := [label for label in seen if not 0 <= index.get(label, -1) < outputs]:
        raise ValueError(
            f"expected every class among the {outputs} outputs, by number or name, got {unknown[0]!r} ({len(unknown)} of "
            f"{len(seen)} classes); give the names of the outputs in their order, a line each, in a file of classes"
        )
    return torch.tensor([index[label] for label in labels])

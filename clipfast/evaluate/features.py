"""Features of texts and of a source's images, alone or as one of many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.data import Tally, read_images
from clipfast.data.sources import Sample, no_caption
from clipfast.inputs import Preprocess, tokenize
from clipfast.model import CLIP
from clipfast.model.fused import projected
from clipfast.train.job import Job

FEATURES = ("image", "hidden", "text")


@contextmanager
def inference(model: CLIP) -> Iterator[torch.device]:
    """Eval mode without gradients, then the mode that was there before: evaluation happens in the middle of training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model.logit_scale.device
    finally:
        model.train(training)


def encode_texts(
    model: CLIP, texts: Sequence[str], *, truncate: bool = True, batch_size: int = 256, tokenizer: Callable[..., Any] = tokenize
) -> Tensor:
    """Normalised text features [len(texts), D], float32; `tokenizer`: called as `clipfast.tokenize` is."""
    contrastive(model, "text features")
    with inference(model) as device:
        features = []
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            tokens, lengths = tokenizer(chunk, model.context_length, truncate=truncate, return_lengths=True)
            features.append(model.encode_text(tokens.to(device), normalize=True, lengths=lengths).float())
        return torch.cat(features)


def contrastive(model: CLIP, what: str) -> None:
    """Refuses a model that predicts captions, whose texts have no features beside those of images."""
    if (objective := getattr(model, "objective", "")) in ("words", "caption"):
        raise ValueError(
            f"expected a contrastive model for {what}, got one that predicts the {objective}; take zero-shot, which scores the "
            "classes by their likelihood"
        )


def encode_images(
    model: CLIP,
    preprocess: Preprocess,
    samples: Iterable[Sample],
    *,
    batch_size: int = 64,
    threads: int = 2,
    tally: Tally | None = None,
) -> Iterator[tuple[list[Sample], Tensor]]:
    """(samples, normalised image features [B, D] float32), in order, without what `tally` counts as unreadable."""
    tally = tally or Tally()
    for good, pixels in read_images(samples, preprocess, batch_size, tally, threads):
        with inference(model) as device:
            features = model.encode_image(pixels.to(device), normalize=True).float()
        yield good, features
    tally.check()


@contextmanager
def unprojected(model: CLIP) -> Iterator[int]:
    """The image tower without its projection: a ViT's class token after the last norm, a ResNet's pool before c_proj."""
    holder, name, kept = _projection(model)
    if isinstance(kept, nn.Linear):
        same = nn.Linear(kept.in_features, kept.in_features, device=kept.weight.device, dtype=kept.weight.dtype)
        with torch.no_grad():
            nn.init.eye_(same.weight)
            nn.init.zeros_(same.bias)
        put = same
    else:
        put = None
    setattr(holder, name, put)
    try:
        yield width(model, "hidden", kept)
    finally:
        setattr(holder, name, kept)


def _projection(model: CLIP) -> tuple[Any, str, Tensor | nn.Linear]:
    visual: Any = model.visual
    holder, name = (visual, "proj") if hasattr(visual, "proj") else (getattr(visual, "attnpool", None), "c_proj")
    kept = getattr(holder, name, None)
    if not isinstance(kept, Tensor | nn.Linear):
        raise TypeError(f"expected an image tower with a projection of its own, got {type(visual).__name__}; take projected")
    return holder, name, kept


def projects(model: CLIP) -> bool:
    """Whether the image tower has a projection of its own, and so features before it."""
    try:
        _projection(model)
    except TypeError:
        return False
    return True


def width(model: CLIP, feature: str, projection: Any = None) -> int:
    """How wide a feature is."""
    if feature != "hidden":
        return model.visual.output_dim
    kept = _projection(model)[2] if projection is None else projection
    return kept.in_features if isinstance(kept, nn.Linear) else len(kept)


def image_features(model: CLIP, pixels: Tensor, features: Sequence[str]) -> dict[str, Tensor]:
    """Of one pass through the tower: "image", projected and of unit length, and "hidden", what it was projected from."""
    with inference(model) as device:
        if "hidden" not in features:
            return {"image": model.encode_image(pixels.to(device), normalize=True).float()}
        kept = _projection(model)[2]
        with unprojected(model):
            hidden = model.encode_image(pixels.to(device), normalize=False)
        found = {"hidden": hidden.float()}
        if "image" in features:
            image = kept(hidden) if isinstance(kept, nn.Linear) else projected(hidden, kept)
            found["image"] = F.normalize(image, dim=-1).float()
        return found


def encode_samples(
    model: CLIP,
    preprocess: Preprocess,
    samples: Iterable[Sample],
    features: Sequence[str],
    *,
    batch_size: int = 64,
    threads: int = 2,
    tally: Tally | None = None,
) -> Iterator[tuple[list[Sample], dict[str, Tensor]]]:
    """(samples, each feature of them [B, D] float32), in order, without what `tally` counts as unusable.

    Where texts are wanted a sample without a caption is unusable; where only they are, no image is read. Whether there were
    too many of them in the end the caller asks (`Tally.check`).
    """
    tally = tally or Tally()
    seen = [own for own in features if own != "text"]
    chosen = _captioned(samples, tally, bool(seen)) if "text" in features else samples
    batches: Iterable[tuple[list[Sample], Tensor | None]]
    batches = read_images(chosen, preprocess, batch_size, tally, threads) if seen else _batches(iter(chosen), batch_size)
    for good, pixels in batches:
        found = {} if pixels is None else image_features(model, pixels, seen)
        if "text" in features:
            found["text"] = encode_texts(model, [sample.caption or "" for sample in good], batch_size=batch_size)
        yield good, found


def _captioned(samples: Iterable[Sample], tally: Tally, read: bool) -> Iterator[Sample]:
    """Those with a caption; of what is `read` later the good ones are counted there."""
    for sample in samples:
        good = not sample.error and bool((sample.caption or "").strip())
        tally.seen += not good or not read
        if good:
            yield sample
        else:
            tally.skip(sample, sample.error or no_caption(sample))


def _batches(samples: Iterator[Sample], size: int) -> Iterator[tuple[list[Sample], None]]:
    while batch := list(islice(samples, size)):
        yield batch, None


def together(job: Job, make: Callable[[], Any], part: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """What this rank makes, and the part of it that every rank tells; an error on one is one on all, so that none waits."""
    try:
        made = make()
        told = part(made)
    except Exception as error:
        made, told = None, error
    return made, job.gather(told)

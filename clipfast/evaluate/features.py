"""Features of texts and of a source's images, alone or as one of many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipfast.data import Tally, read_images
from clipfast.data.sources import Sample
from clipfast.inputs import Preprocess, tokenize
from clipfast.model import CLIP
from clipfast.train.job import Job


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


def encode_texts(model: CLIP, texts: Sequence[str], *, truncate: bool = True, batch_size: int = 256) -> Tensor:
    """Normalised text features [len(texts), D], float32."""
    if getattr(model, "objective", "") in ("words", "caption"):
        told = f"expected a contrastive model for text features, got one that predicts the {model.objective}"
        raise ValueError(f"{told}; score texts with clipfast.evaluate.class_likelihoods")
    with inference(model) as device:
        features = []
        for start in range(0, len(texts), batch_size):
            chunk = list(texts[start : start + batch_size])
            tokens, lengths = tokenize(chunk, model.context_length, truncate=truncate, return_lengths=True)
            features.append(model.encode_text(tokens.to(device), normalize=True, lengths=lengths).float())
        return torch.cat(features)


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


def together(job: Job, make: Callable[[], Any], part: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """What this rank makes, and the part of it that every rank tells; an error on one is one on all, so that none waits."""
    try:
        made = make()
        told = part(made)
    except Exception as error:
        made, told = None, error
    return made, job.gather(told)

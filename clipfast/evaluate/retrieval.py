"""Retrieval of texts by images and of images by texts (paper, appendix E)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clipfast.data.sources import Rows, Sample, Source
from clipfast.evaluate.features import contrastive, encode_images, encode_texts, together
from clipfast.evaluate.metrics import best_ranks, share
from clipfast.evaluate.zero_shot import Template, prompt
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """R@k in both directions: share of queries with a right answer among the k nearest; image [N, D], text [M, D].

    Rows with equal ids belong together (five captions of one image have its id); by default row i and row i do, and each query
    needs an answer. Scores exist in blocks only, never as N × M. Equal scores: the smaller index first.
    """
    if image_ids is None or text_ids is None:
        if len(image_features) != len(text_features):
            raise ValueError(
                f"expected as many texts as images, or ids, got {len(image_features)} images and {len(text_features)} texts"
            )
        image_ids = text_ids = torch.arange(len(image_features))
    results: dict[str, float] = {}
    for name, queries, others, query_ids, other_ids in (
        ("image_to_text", image_features, text_features, image_ids, text_ids),
        ("text_to_image", text_features, image_features, text_ids, image_ids),
    ):
        ranks = best_ranks(queries, others, query_ids, other_ids)
        results |= {f"{name}_R@{k}": share(ranks < k) for k in ks}
    return results


def captioned_once(source: Source) -> Source:
    """A table's rows about one image as one sample, their captions a line each."""
    if not isinstance(source, Rows):
        return source
    found: dict[str, list[Sample]] = {}
    for sample in source.rows:
        found.setdefault(sample.key, []).append(sample)
    return Rows([own[0]._replace(caption="\n".join(sample.caption or "" for sample in own)) for own in found.values()])


def retrieval_source(
    model: CLIP, preprocess: Preprocess, source: Source, template: Template = "{}", job: Job = ALONE, **reading: Any
) -> dict[str, float]:
    """R@1, 5, 10 over a source. Several captions of an image: several rows of a table, or several lines in a shard's .txt.

    `template`: what captions are put into; the paper's is "a photo of {}". `job`: each rank reads its share, and all have the
    result of the whole.
    """
    contrastive(model, "retrieval")

    def read() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        captions: dict[str, list[str]] = {}

        def first_of_each() -> Iterator[Sample]:
            for sample in source.samples(worker=job.rank, workers=job.world):
                new = sample.key not in captions
                captions.setdefault(sample.key, []).extend(line for line in (sample.caption or "").splitlines() if line.strip())
                if new:
                    yield sample

        images: dict[str, Tensor] = {}
        for samples, block in encode_images(model, preprocess, first_of_each(), **reading):
            images |= {sample.key: row for sample, row in zip(samples, block.cpu(), strict=True)}
        lines = [prompt(template, line) for own in captions.values() for line in own]
        blocks = encode_texts(model, lines).cpu().split([len(own) for own in captions.values()]) if lines else []
        return images, dict(zip(captions, blocks, strict=False))

    _, parts = together(job, read, lambda found: found)
    images: dict[str, Tensor] = {}
    for found, _ in reversed(parts):  # of rows about one image that came to several ranks, the first one's
        images |= found
    texts = [(key, block) for _, blocks in parts for key, block in blocks.items() if len(block) and key in images]
    if not texts:
        raise ValueError("expected images with captions, found none; give a table, or shards with .txt")
    number = {key: place for place, key in enumerate(images)}
    text_ids = torch.tensor([number[key] for key, block in texts for _ in block])
    scores = retrieval(
        torch.stack(list(images.values())), torch.cat([block for _, block in texts]), torch.arange(len(images)), text_ids
    )
    return scores | {"images": len(images), "captions": len(text_ids)}

"""Zero-shot classification and retrieval, as the paper measures them, and features of whole data sets written to disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .data import Tally, read_images
from .files import output_folder, replacing
from .image import Preprocess
from .job import ALONE, Job
from .model import CLIP
from .sources import Sample, Source
from .tokenizer import tokenize

TEMPLATES = ("a photo of a {}.",)
SCORES = 1 << 24  # elements of a block of scores: 64 MB in float32, whatever the size of the data set


@contextmanager
def _inference(model: CLIP) -> Iterator[torch.device]:
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
    with _inference(model) as device:
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
        with _inference(model) as device:
            features = model.encode_image(pixels.to(device), normalize=True).float()
        yield good, features
    tally.check()


def zero_shot_weights(
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """Classifier [classes, D]: each name in every template ("... {} ..."), features normalised, averaged, normalised again."""
    if not class_names or not templates:
        raise ValueError(f"expected class names and templates, got {len(class_names)} names and {len(templates)} templates")
    if bad := [template for template in templates if "{}" not in template]:
        raise ValueError(f"expected '{{}}' in every template, where the class name goes, got {bad[0]!r}")
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    features = encode_texts(model, prompts).view(len(class_names), len(templates), -1)
    return torch.nn.functional.normalize(features.mean(1), dim=-1)


def classify(model: CLIP, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """Probabilities [B, len(texts)], float32: softmax over the texts of scaled cosines; pixels [B, 3, R, R]."""
    if empty := [index for index, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"expected captions, but text {empty[0]} of {len(texts)} is empty; leave it out")
    text = encode_texts(model, texts, truncate=False)
    with _inference(model) as device:
        image = model.encode_image(pixels.to(device), normalize=True).float()
        return (model.logit_scale.exp().float() * image @ text.T).softmax(-1)


def zero_shot(
    features: Tensor, weights: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5), subset: Tensor | None = None
) -> dict[str, float]:
    """Share of images [B, D] whose class `targets` [B] is among the k of highest score against `weights` [classes, D].

    `subset`: class indices to choose among; every target must be one of them. Equal scores: the smaller class index first.
    """
    if subset is not None:
        place = torch.full((len(weights),), -1, dtype=torch.long, device=weights.device)
        place[subset] = torch.arange(len(subset), device=weights.device)
        weights, targets = weights[subset], place[targets.to(weights.device)]
        if (targets < 0).any():
            raise ValueError(
                f"expected every target among the {len(subset)} classes of the subset, {int((targets < 0).sum())} are not"
            )
    classes = torch.arange(len(weights))
    ranks = _best_ranks(features, weights, targets, classes)
    return {f"top{k}": _share(ranks < k) for k in ks}


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
        ranks = _best_ranks(queries, others, query_ids, other_ids)
        results |= {f"{name}_R@{k}": _share(ranks < k) for k in ks}
    return results


@torch.no_grad()
def _best_ranks(queries: Tensor, others: Tensor, query_ids: Tensor, other_ids: Tensor) -> Tensor:
    """[queries] int64 on the CPU: how many of `others` score higher than the best of those that share the query's id."""
    others, other_ids = others.to(queries.device), other_ids.to(queries.device)
    index, ranks = torch.arange(len(others), device=queries.device), []
    rows = max(1, SCORES // max(1, len(others)))
    for block, ids in zip(queries.split(rows), query_ids.to(queries.device).split(rows), strict=True):
        scores = block @ others.T
        right = ids[:, None] == other_ids
        if not scores.isfinite().all() or not right.any(1).all():
            raise ValueError("expected finite features and a right answer for every query; check the model and the ids")
        best, _ = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True)
        first = index.where(right & (scores == best), len(others)).amin(1, keepdim=True)
        ranks.append(((scores > best) | ((scores == best) & (index < first))).sum(1).cpu())
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.long)


def _share(hits: Tensor) -> float:
    if not len(hits):
        raise ValueError("expected images to evaluate on, got none")
    return hits.double().mean().item()


def zero_shot_source(
    model: CLIP,
    preprocess: Preprocess,
    source: Source,
    classes: dict[str, str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    job: Job = ALONE,
    **reading: Any,
) -> dict[str, float]:
    """Top-1 and top-5 over a source whose samples have a class: a folder's name or a shard's .cls.

    `classes`: name of the folder -> name in the prompts, in the order that .cls counts from 0; by default the folders' names.
    `job`: each rank reads its share; the result is that of all, and an error of one rank is raised on all.
    """

    def read() -> tuple[list[Tensor], list[Any]]:
        features, labels = [], []
        own = source.samples(worker=job.rank, workers=job.world)
        for samples, block in encode_images(model, preprocess, own, **reading):
            if lacking := [sample.key for sample in samples if "class" not in sample.meta]:
                raise ValueError(
                    f"expected the class of every image (its folder, or a .cls in the shard), but {lacking[0]} has none"
                )
            features.append(block)
            labels += [sample.meta["class"] for sample in samples]
        return features, labels

    (features, labels), everyone = _together(job, read, lambda found: sorted(set(found[1]), key=str))
    seen = set(chain.from_iterable(everyone))
    named = classes or {name: name for name in sorted(map(str, seen))}
    index = {name: number for number, name in enumerate(named)} | {number: number for number in range(len(named))}
    if unknown := seen - index.keys():
        raise ValueError(
            f"expected every class among the {len(named)} given, got {sorted(map(str, unknown))[:3]}; add them to the classes"
        )

    def hits() -> Counter[str]:
        if not labels:
            return Counter()
        targets, weights = (
            torch.tensor([index[label] for label in labels]),
            zero_shot_weights(model, [*named.values()], templates),
        )
        found = zero_shot(torch.cat(features), weights, targets)
        return Counter({name: round(share * len(labels)) for name, share in found.items()} | {"images": len(labels)})

    _, parts = _together(job, hits, lambda found: found)
    total = sum(parts, Counter[str]())
    if not total["images"]:
        raise ValueError("expected images to evaluate on, got none")
    return {f"top{k}": total[f"top{k}"] / total["images"] for k in (1, 5)} | {"images": total["images"], "classes": len(named)}


def retrieval_source(model: CLIP, preprocess: Preprocess, source: Source, job: Job = ALONE, **reading: Any) -> dict[str, float]:
    """R@1, 5, 10 over a source. Several captions of an image: several rows of a table, or several lines in a shard's .txt.

    `job`: each rank reads its share, and all have the result of the whole.
    """

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
        lines = [line for own in captions.values() for line in own]
        blocks = encode_texts(model, lines).cpu().split([len(own) for own in captions.values()]) if lines else []
        return images, dict(zip(captions, blocks, strict=False))

    _, parts = _together(job, read, lambda found: found)
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


def _together(job: Job, make: Callable[[], Any], part: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """What this rank makes, and the part of it that every rank tells; an error on one is one on all, so that none waits."""
    try:
        made = make()
        told = part(made)
    except Exception as error:
        made, told = None, error
    return made, job.gather(told)


def embed(
    model: CLIP,
    preprocess: Preprocess,
    source: Source,
    out: str | Path,
    *,
    dtype: str = "float32",
    part_size: int = 4096,
    origin: dict[str, Any] | None = None,
    **reading: Any,
) -> int:
    """Normalised image features of a source as out/part_00000.npy [rows, D], keys and captions in part_00000.jsonl; -> parts.

    A part is there whole or not at all, and is not made again. `origin` (what the features come from) is kept in embed.json,
    and a later call with another one is refused.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f"expected dtype float16 or float32, got {dtype!r}")
    origin = (origin or {}) | {"dtype": dtype, "part_size": part_size}
    samples, part = iter(source.samples()), 0
    with output_folder(out) as folder, tqdm(unit=" images", desc="embed") as bar:
        about = folder / "embed.json"
        if about.exists() and (before := json.loads(about.read_text())) != origin:
            raise ValueError(f"expected to go on with {before} in {folder}, got {origin}; choose another folder")
        while (first := next(samples, None)) is not None:
            chunk, name = chain([first], islice(samples, part_size - 1)), folder / f"part_{part:05}"
            part += 1
            if name.with_suffix(".npy").exists():
                bar.update(sum(1 for _ in chunk))
                continue
            vectors, lines = [np.zeros((0, model.visual.output_dim), dtype)], []
            for good, features in encode_images(model, preprocess, chunk, **reading):
                vectors.append(features.cpu().numpy().astype(dtype))
                lines += [json.dumps({"key": sample.key, "caption": sample.caption}) + "\n" for sample in good]
                bar.update(len(good))
            with replacing(about) as file:
                file.write(json.dumps(origin).encode())
            with replacing(name.with_suffix(".jsonl")) as file:
                file.write("".join(lines).encode())
            with replacing(name.with_suffix(".npy")) as file:  # last: it says that the part is finished
                np.save(file, np.concatenate(vectors))
    return part

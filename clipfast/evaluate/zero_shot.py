"""Zero-shot classification, as the paper measures it (section 3.1)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clipfast.data.sources import Source
from clipfast.evaluate.features import encode_images, encode_texts, inference, together
from clipfast.evaluate.likelihood import text_likelihoods
from clipfast.evaluate.metrics import best_ranks, share, top_k
from clipfast.inputs import Preprocess, tokenize
from clipfast.model import CLIP
from clipfast.train.job import ALONE, Job

TEMPLATES = ("a photo of a {}.",)
log = logging.getLogger(__name__)
PLACE = re.compile(r"\{[0c]?\}")  # {}, {0} or {c}, where the class name goes
Template: TypeAlias = str | Callable[[str], str]


def zero_shot_weights(
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[Template] | Template = TEMPLATES,
    batch_size: int = 256,
    tokenizer: Callable[..., Any] = tokenize,
) -> Tensor:
    """Classifier [classes, D]: each name in every template, features normalised, averaged, normalised again.

    `templates`: text with a place for the name, {}, {0} or {c}, or functions of the name, as open_clip's lists have them.
    `batch_size`: prompts at a time.
    """
    if isinstance(class_names, str):
        raise TypeError(f"expected a sequence of class names, got the text {class_names!r}; pass [{class_names!r}]")
    templates = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    if not len(class_names) or not templates:
        raise ValueError(f"expected class names and templates, got {len(class_names)} names and {len(templates)} templates")
    if bad := [name for name in class_names if not isinstance(name, str)]:
        raise TypeError(f"expected text as class names, got {bad[0]!r}")
    prompts = [prompt(template, name) for name in class_names for template in templates]
    features = encode_texts(model, prompts, batch_size=batch_size, tokenizer=tokenizer).view(
        len(class_names), len(templates), -1
    )
    return torch.nn.functional.normalize(features.mean(1), dim=-1)


def class_likelihoods(
    model: CLIP,
    features: Tensor,
    class_names: Sequence[str],
    templates: Sequence[Template] | Template = TEMPLATES,
    tokenizer: Callable[..., Any] = tokenize,
) -> Tensor:
    """[N, classes] float32 on the CPU, of a model that predicts words or captions: the log-likelihood of each class's prompt
    given the image features [N, D], the mean over the templates."""
    templates = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    texts = [prompt(template, name) for name in class_names for template in templates]
    return text_likelihoods(model, features, texts, tokenizer).view(len(features), len(class_names), -1).mean(2)


def prompt(template: Template, name: str) -> str:
    """The template with the name in every place; a name's own braces are left alone."""
    if not isinstance(template, str):
        if not callable(template):
            raise TypeError(f"expected a template as text or a function, got {type(template).__name__}")
        if not isinstance(made := template(name), str):
            raise TypeError(f"expected a template that gives text, got {made!r} for {name!r}")
        return made
    made, places = PLACE.subn(lambda _: name, template)
    if not places:
        raise ValueError(f"expected a place for the class name, {{}}, {{0}} or {{c}}, in every template, got {template!r}")
    return made


def classify(model: CLIP, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    """Probabilities [B, len(texts)], float32: softmax over the texts of scaled cosines; pixels [B, 3, R, R]."""
    if empty := [index for index, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"expected captions, but text {empty[0]} of {len(texts)} is empty; leave it out")
    text = encode_texts(model, texts, truncate=False)
    with inference(model) as device:
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
    ranks = best_ranks(features, weights, targets, classes)
    return {f"top{k}": share(ranks < k) for k in ks}


def zero_shot_source(
    model: CLIP,
    preprocess: Preprocess,
    source: Source,
    classes: dict[str, str] | None = None,
    templates: Sequence[Template] | Template = TEMPLATES,
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

    (features, labels), everyone = together(job, read, lambda found: sorted(set(found[1]), key=str))
    seen = set(chain.from_iterable(everyone))
    named = classes or {name: name for name in sorted(map(str, seen))}
    index = {name: number for number, name in enumerate(named)} | {number: number for number in range(len(named))}
    if unknown := seen - index.keys():
        raise ValueError(
            f"expected every class among the {len(named)} given, got {sorted(map(str, unknown))[:3]}; add them to the classes"
        )

    present = {index[label] for label in seen}
    if job.rank == 0 and (absent := [name for number, name in enumerate(named.values()) if number not in present]):
        log.warning("%d of %d classes have no image: %s", len(absent), len(named), ", ".join(absent[:5]))

    def hits() -> Counter[str]:
        if not labels:
            return Counter()
        targets, images, names = torch.tensor([index[label] for label in labels]), torch.cat(features), [*named.values()]
        if model.objective in ("words", "caption"):
            scores = class_likelihoods(model, images, names, templates)
            found = {f"top{k}": top_k(scores, targets, k) for k in (1, 5)}
        else:
            found = zero_shot(images, zero_shot_weights(model, names, templates), targets)
        return Counter({name: round(share * len(labels)) for name, share in found.items()} | {"images": len(labels)})

    _, parts = together(job, hits, lambda found: found)
    total = sum(parts, Counter[str]())
    if not total["images"]:
        raise ValueError("expected images to evaluate on, got none")
    return {f"top{k}": total[f"top{k}"] / total["images"] for k in (1, 5)} | {"images": total["images"], "classes": len(named)}

"""Recall of retrieval from features of both sides: ours in blocks, clip_benchmark's with every score in memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.measure import DEVICE
from clipfast.evaluate import retrieval

WIDTH, CAPTIONS, BATCH = 512, 5, 64  # 64: clip_benchmark's own
KS = (1, 5, 10)
# (images, with --full alone): of 25,000 images with five captions each the scores are 12.5 GB, about what clip_benchmark
# can hold in 32 GB of memory.
SIZES = [(1_000, False), (25_000, True)]


@pytest.mark.parametrize(("images", "long"), SIZES, ids=[f"{n}x{CAPTIONS * n}" for n, _ in SIZES])
def test_retrieval(compare, full: bool, images: int, long: bool) -> None:
    if long and not full:
        pytest.skip("takes minutes and 20 GB: ask with --full")
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    owner = torch.arange(images).repeat_interleave(CAPTIONS)
    noise = torch.randn(len(owner), WIDTH, generator=generator)
    text = F.normalize(image[owner] + 0.3 * noise, dim=-1)  # recalls of neither 0 nor 1
    ours_image, ours_text = image.to(DEVICE), text.to(DEVICE)

    def ours() -> dict[str, float]:
        return retrieval(ours_image, ours_text, torch.arange(images), owner, KS)

    try:
        from clip_benchmark.metrics import zeroshot_retrieval
    except ImportError as error:
        compare(ours, {"clip_benchmark": f"not installed: {error}"}, items=len(owner))
        return
    model = SimpleNamespace(encode_image=lambda rows: rows, encode_text=lambda rows: text.to(DEVICE)[rows])

    def batches() -> Iterator[tuple[torch.Tensor, list[list[int]]]]:
        for start in range(0, images, BATCH):
            rows = range(start, min(start + BATCH, images))
            yield image[start : start + BATCH], [[*range(CAPTIONS * row, CAPTIONS * (row + 1))] for row in rows]

    def theirs() -> dict[str, float]:
        return zeroshot_retrieval.evaluate(model, batches(), torch.tensor, DEVICE, amp=False, recall_k_list=[*KS])

    found, expected = ours(), theirs()
    for k in KS:
        assert found[f"image_to_text_R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-3)
        assert found[f"text_to_image_R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-3)
    assert 0.05 < found["text_to_image_R@1"] < 0.999
    compare(ours, {"clip_benchmark": theirs}, rounds=3, items=len(owner), floor=(4 * images * len(owner) * WIDTH, 0))

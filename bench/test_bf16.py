"""Products of bf16 on a CPU that has instructions for them: against our fp32, and open_clip under autocast.

No shares of the roofline: the ceiling that is measured is that of fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import DEVICE
from bench.rivals import open_clip, open_clip_model
from bench.test_towers import CAPTIONS
from clipfast.inputs.tokenizer import tokenize
from clipfast.kernels import processor
from clipfast.loss import clip_loss
from clipfast.model import CLIP, MODELS

NAME, LOW = "ViT-B/32", torch.bfloat16
pytestmark = pytest.mark.skipif(DEVICE != "cpu" or not processor.BF16, reason="of CPUs that multiply bf16")


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**MODELS[NAME]).eval()


@pytest.fixture(scope="module")
def theirs(model: CLIP) -> nn.Module | str:
    return open_clip_model(MODELS[NAME], model.state_dict())


@pytest.fixture(scope="module")
def served(model: CLIP) -> dict[str, CLIP]:
    return {"bf16": model.for_inference(bf16=True), "our fp32": model.for_inference(packed=True)}


def rivals(theirs: nn.Module | str, call: Callable[[Any], Any]) -> dict[str, Callable[[], Any] | str]:
    """open_clip's model in fp32 and as its trainer runs it in bf16."""
    if isinstance(theirs, str):
        return dict.fromkeys(("open_clip autocast", "open_clip"), theirs)

    def run(low: bool) -> None:
        with torch.autocast("cpu", LOW, enabled=low):
            found = call(theirs)
        if found.requires_grad:
            found.backward()

    return {"open_clip autocast": lambda: run(True), "open_clip": lambda: run(False)}


def encoded(compare: Callable, model: CLIP, served: dict[str, CLIP], theirs: Any, call: str, x: Tensor, **given: Any) -> None:
    ours, plain = (getattr(served[kind], call) for kind in ("bf16", "our fp32"))
    with torch.no_grad():
        cosine = torch.cosine_similarity(ours(x, **given), getattr(model, call)(x, **given)).min().item()
        assert cosine > 0.9995
        others = {"our fp32": lambda: plain(x, **given)} | rivals(theirs, lambda m: getattr(m.eval(), call)(x))
        compare(lambda: ours(x, **given), others, items=len(x), cosine_to_fp32=cosine)


@pytest.mark.parametrize("B", [1, 32])
def test_images(compare, model: CLIP, served: dict[str, CLIP], theirs: Any, B: int) -> None:
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    encoded(compare, model, served, theirs, "encode_image", image)


@pytest.mark.parametrize("B", [1, 32])
def test_texts(compare, model: CLIP, served: dict[str, CLIP], theirs: Any, B: int) -> None:
    text, lengths = tokenize((CAPTIONS * 2)[:B], return_lengths=True)
    encoded(compare, model, served, theirs, "encode_text", text, lengths=lengths)


def test_training_step(compare, model: CLIP, theirs: Any) -> None:
    """Forward and backward of both towers and the loss of 16 pairs; the peak is beyond the gradients of the step before."""
    from clipfast.train.engine import Towers  # here: it needs webdataset, which the rows above do not

    ours, B = copy.deepcopy(model).train(), 16
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    text, lengths = tokenize(CAPTIONS[:B], return_lengths=True)

    def step(dtype: torch.dtype | None) -> Callable[[], None]:
        towers = Towers(ours, dtype)

        def run() -> None:
            ours.zero_grad(set_to_none=True)
            with towers.lowered():
                clip_loss(*towers(image, text, lengths), ours.logit_scale.exp(), normalize=True).backward()

        return run

    def loss(other: Any) -> Tensor:
        other.train().zero_grad(set_to_none=True)
        features = (F.normalize(f, dim=-1) for f in (other.encode_image(image), other.encode_text(text)))
        return open_clip.loss.ClipLoss()(*features, other.logit_scale.exp())

    compare(step(LOW), {"our fp32": step(None)} | rivals(theirs, loss), rounds=3, items=B)

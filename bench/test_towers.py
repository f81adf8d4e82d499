"""The towers and a training step against open_clip on the same weights and data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.plan import image_flops, text_flops
from bench.rivals import open_clip_model
from clipfast.inputs.tokenizer import tokenize
from clipfast.loss import clip_loss
from clipfast.model import CLIP, MODELS
from clipfast.train import TrainConfig
from clipfast.train.engine import adamw
from demo import emoji
from demo.__main__ import recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Captions of the length that people write: 9 to 16 tokens with both specials, 12 on average, as COCO's are.
CAPTIONS = [
    "a dog runs over wet sand",
    "two cups of coffee on a wooden table by the window",
    "a red bus in the rain",
    "an old man reads a newspaper on a park bench",
    "three boats near the shore at dusk",
    "a plate of pasta with basil and cheese",
    "a girl in a yellow coat jumps over a puddle",
    "snow on the roofs of a small town",
    "a cat asleep on a warm laptop",
    "people wait for the train under a glass roof",
    "a close up of a green leaf",
    "a bicycle leans against a brick wall",
    "a chef slices tomatoes in a busy kitchen",
    "the moon above a dark row of trees",
    "an empty road through the desert at noon",
    "a child draws a house with a blue crayon",
]

# Published size and pairs of a training step; on a CPU, where open_clip takes 17 s for 64 of them, those with --full only.
STEPS = [
    pytest.param("ViT-B/32", B, id=f"ViT-B/32, {B} pairs", marks=[pytest.mark.full] if B == 64 else [])
    for B in ([256] if DEVICE == "cuda" else [16, 64])
]

NAMES = ["red heart", "grinning face", "fire engine", "hot beverage", "man cook", "alarm clock", "leaf", "cat", "guitar",
         "sun behind cloud", "backhand index pointing left"]  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Callable[[str], tuple[CLIP, nn.Module]]:
    """Ours and open_clip's of a published size, on the same random weights, in eval mode; no benchmark changes them."""

    @functools.cache
    def made(name: str) -> tuple[CLIP, nn.Module]:
        torch.manual_seed(0)
        ours = CLIP(**MODELS[name]).eval().to(DEVICE)
        return ours, open_clip_model(MODELS[name], ours.state_dict()).eval().to(DEVICE)

    return made


def text_floor(sizes: dict[str, Any], lengths: Tensor) -> tuple[int, int]:
    """(FLOPs, bytes) of captions through a tower of these sizes, forward; the bytes are the weights of its blocks."""
    weights = 12 * sizes["transformer_layers"] * sizes["transformer_width"] ** 2
    return int(sum(text_flops(sizes, n) for n in lengths.tolist())), 4 * weights


def image_floor(sizes: dict[str, Any], rival: nn.Module, image: Tensor) -> tuple[int, int]:
    """(FLOPs, bytes) of images through a tower of these sizes, forward; the bytes are its weights. A ResNet is counted as
    open_clip's runs, less its pool, of which next to nothing is needed."""
    weights = 4 * sum(p.numel() for p in rival.visual.parameters())  # type: ignore[union-attr]
    if isinstance(sizes["vision_layers"], int):
        return len(image) * int(image_flops(sizes)), weights
    training = rival.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rival.eval().visual(image[:1])  # type: ignore[operator]
    rival.train(training)
    pool = sum(counter.get_flop_counts()[f"{type(rival.visual).__name__}.attnpool"].values())
    return len(image) * (counter.get_total_flops() - pool), weights


def step_floor(sizes: dict[str, Any], rival: nn.Module, image: Tensor, lengths: Tensor) -> tuple[int, int]:
    """(FLOPs, bytes) of both towers and the loss: backward is twice forward; of the loss's four products see its spec. Weights
    are read twice, their gradients are written."""
    (images, image_bytes), (texts, text_bytes) = image_floor(sizes, rival, image), text_floor(sizes, lengths)
    return 3 * (images + texts) + 8 * len(image) ** 2 * sizes["embed_dim"], 3 * (image_bytes + text_bytes)


def compiled(call, wanted: bool):
    """The call under ``torch.compile``, warm, or the reason why that is not measured."""
    if not wanted and DEVICE == "cpu":  # where it takes a minute each
        return "compiled with --full only"
    torch._dynamo.reset()
    try:
        fast = torch.compile(call)
        fast()
    except Exception as error:  # a rival that cannot be had is a row with its reason, whatever the compiler raised
        return f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return fast


@pytest.mark.parametrize("name", ["ViT-B/32"])
def test_encode_text(compare, pair, full: bool, name: str) -> None:
    ours, theirs = pair(name)
    text, lengths = tokenize(CAPTIONS * 2, return_lengths=True)
    text = text.to(DEVICE)
    with torch.no_grad():
        got, expected = ours.encode_text(text, lengths=lengths), theirs.encode_text(text)
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        compare(
            lambda: ours.encode_text(text, lengths=lengths),
            {"open_clip": lambda: theirs.encode_text(text),
             "open_clip compiled": compiled(lambda: theirs.encode_text(text), full)},
            items=len(text), floor=text_floor(MODELS[name], lengths), mean_tokens=float(lengths.double().mean()),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_encode_image(compare, pair, full: bool, name: str) -> None:
    """Ours as ``for_inference`` gives it; beside it ours as loaded."""
    loaded, theirs = pair(name)
    ours = loaded.for_inference()
    image = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        got, expected = ours.encode_image(image), theirs.encode_image(image)
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        rivals = {"open_clip": lambda: theirs.encode_image(image), "our loaded": lambda: loaded.encode_image(image)}
        rivals["open_clip compiled"] = compiled(rivals["open_clip"], full)
        compare(lambda: ours.encode_image(image), rivals, items=len(image), floor=image_floor(MODELS[name], theirs, image))


@pytest.mark.parametrize(("name", "B"), STEPS)
def test_training_step(compare, pair, full: bool, name: str, B: int) -> None:
    """Forward and backward of both towers and the loss, on captions; the peak is beyond the gradients of the step before."""
    import open_clip

    ours, theirs = (copy.deepcopy(model).train() for model in pair(name))
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    text, lengths = tokenize((CAPTIONS * 16)[:B], return_lengths=True)
    text, loss_of_theirs = text.to(DEVICE), open_clip.ClipLoss()

    def of_ours() -> Tensor:
        return clip_loss(
            ours.encode_image(image), ours.encode_text(text, lengths=lengths), ours.logit_scale.exp(), normalize=True
        )

    def of_theirs() -> Tensor:
        features = theirs.encode_image(image), theirs.encode_text(text)
        return loss_of_theirs(*(F.normalize(f, dim=-1) for f in features), theirs.logit_scale.exp())

    def both_ways(model: nn.Module, loss_of):
        def run() -> None:
            model.zero_grad(set_to_none=True)
            loss_of().backward()

        return run

    rivals = {"open_clip": both_ways(theirs, of_theirs)}
    if isinstance(fast := compiled(of_theirs, full), str):
        rivals["open_clip compiled"] = fast
    else:
        rivals["open_clip compiled"] = both_ways(theirs, fast)
    least = step_floor(MODELS[name], theirs, image, lengths)
    mean_tokens = float(lengths.double().mean())
    compare(both_ways(ours, of_ours), rivals, rounds=1 if B == 64 else 2, items=B, floor=least, mean_tokens=mean_tokens)


def test_demo_training_step(compare) -> None:
    """The demo's config, one update on the same batch: our step, and open_clip's model, loss and scaling in the same loop."""
    import open_clip

    config = recipe(out="", seconds=300)
    torch.manual_seed(0)
    ours = CLIP(**config.model).to(DEVICE).train()  # type: ignore[arg-type]
    theirs = open_clip_model(config.model, copy.deepcopy(ours.state_dict())).to(DEVICE).train()
    side, B = config.model["image_resolution"], config.batch_size  # type: ignore[index]
    image = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    captions = [template.format(name) for name in NAMES for template in emoji.TRAIN_TEMPLATES][:B]  # 7 tokens, as the demo's
    text, lengths = tokenize(captions, config.model["context_length"], return_lengths=True)  # type: ignore[index]
    text = text.to(DEVICE)
    loss_of_theirs = open_clip.ClipLoss()

    def features_of_ours() -> Tensor:
        images, texts = ours.encode_image(image), ours.encode_text(text, lengths=lengths)
        return clip_loss(images, texts, ours.logit_scale.exp(), normalize=True)

    def features_of_theirs() -> Tensor:
        return loss_of_theirs(F.normalize(theirs.encode_image(image), dim=-1), F.normalize(theirs.encode_text(text), dim=-1),
                              theirs.logit_scale.exp())  # fmt: skip

    first = features_of_ours().item(), features_of_theirs().item()
    assert abs(first[0] - first[1]) <= 1e-5 * abs(first[1])
    compare(
        step(ours, features_of_ours, config), {"open_clip": step(theirs, features_of_theirs, config)}, items=B,
        floor=step_floor(config.model, theirs, image, lengths), mean_tokens=float(lengths.double().mean()),
    )  # fmt: skip


def step(model: nn.Module, loss_of, config: TrainConfig):
    """One update: the same optimiser for both."""
    optimizer = adamw(model, config)  # type: ignore[arg-type]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # type: ignore[union-attr,operator]

    return run

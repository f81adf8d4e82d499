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

from bench import sizes
from bench.measure import DEVICE, DTYPE, reason
from bench.plan import image_flops, text_flops
from bench.rivals import open_clip, open_clip_model, open_clip_task
from bench.sizes import GPU
from clipfast.inputs.tokenizer import tokenize
from clipfast.loss import clip_loss
from clipfast.model import CLIP, MODELS

TOLERANCE = 2e-2 if GPU else 1e-5  # on a GPU both sides run in bf16, as who trains and serves there does; on a CPU in fp32
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

STEPS = [pytest.param("ViT-B/32", B, id=f"ViT-B/32, {B} pairs") for B in sizes.PAIRS]
IMAGES = [pytest.param(name, B, id=f"{name}, {B} images" if GPU else name) for name, B in sizes.IMAGES]

NAMES = ["red heart", "grinning face", "fire engine", "hot beverage", "man cook", "alarm clock", "leaf", "cat", "guitar",
         "sun behind cloud", "backhand index pointing left"]  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Callable[[str], tuple[CLIP, nn.Module | str]]:
    """Ours and open_clip's of a published size, on the same random weights, in eval mode; no benchmark changes them. A str, the
    reason, where open_clip is not here."""

    @functools.cache
    def made(name: str) -> tuple[CLIP, nn.Module | str]:
        torch.manual_seed(0)
        ours = CLIP(**MODELS[name]).eval().to(DEVICE)
        theirs = open_clip_model(MODELS[name], ours.state_dict())
        return ours, theirs if isinstance(theirs, str) else theirs.eval().to(DEVICE)

    return made


def lowered(model: Any) -> Any:
    """A copy with the weights in the type of the benchmarks."""
    return model if isinstance(model, str) or not GPU else copy.deepcopy(model).to(DTYPE)


def against(theirs: Any, call: Callable[[], Any], full: bool) -> dict[str, Callable[[], Any] | str]:
    """open_clip's model as it is and compiled, or the reason why it does not run."""
    if isinstance(theirs, str):
        return {"open_clip": theirs, "open_clip compiled": theirs}
    return {"open_clip": call, "open_clip compiled": compiled(call, full)}


def text_floor(sizes: dict[str, Any], lengths: Tensor) -> tuple[int, int]:
    """(FLOPs, bytes) of captions through a tower of these sizes, forward; the bytes are the weights of its blocks."""
    weights = 12 * sizes["transformer_layers"] * sizes["transformer_width"] ** 2
    return int(sum(text_flops(sizes, n) for n in lengths.tolist())), DTYPE.itemsize * weights


def image_floor(sizes: dict[str, Any], rival: Any, image: Tensor) -> tuple[int, int] | None:
    """(FLOPs, bytes) of images through a tower of these sizes, forward; the bytes are its weights. A ResNet is counted as
    open_clip's runs, less its pool, of which next to nothing is needed; not where it does not run."""
    if isinstance(rival, str):
        return (len(image) * int(image_flops(sizes)), 0) if isinstance(sizes["vision_layers"], int) else None
    weights = DTYPE.itemsize * sum(p.numel() for p in rival.visual.parameters())
    if isinstance(sizes["vision_layers"], int):
        return len(image) * int(image_flops(sizes)), weights
    training = rival.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rival.eval().visual(image[:1])
    rival.train(training)
    pool = sum(counter.get_flop_counts()[f"{type(rival.visual).__name__}.attnpool"].values())
    return len(image) * (counter.get_total_flops() - pool), weights


def step_floor(sizes: dict[str, Any], rival: Any, image: Tensor, lengths: Tensor) -> tuple[int, int] | None:
    """(FLOPs, bytes) of both towers and the loss: backward is twice forward; of the loss's four products see its spec. Weights
    are read twice, their gradients are written."""
    if (of_images := image_floor(sizes, rival, image)) is None:
        return None
    (images, image_bytes), (texts, text_bytes) = of_images, text_floor(sizes, lengths)
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


def as_task(theirs: Any, image: Tensor, text: Tensor, expected: Callable[[], Tensor]) -> Callable[[], Tensor] | str:
    """The loss by open_clip's compiled task, warm and seen to be its model's, or the reason why that is not measured."""
    if isinstance(task := theirs if isinstance(theirs, str) else open_clip_task(theirs, image, text), str):
        return task

    def lowered_task() -> Tensor:
        with torch.autocast(DEVICE, DTYPE, enabled=GPU):
            return task()

    try:
        got, loss = lowered_task().item(), expected().item()
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the reason
        return reason(error)
    return lowered_task if abs(got - loss) <= TOLERANCE * abs(loss) else f"it computes something else: {got}, not {loss}"


@pytest.mark.parametrize("name", ["ViT-B/32"])
def test_encode_text(compare, pair, full: bool, name: str) -> None:
    ours, theirs = map(lowered, pair(name))
    text, lengths = tokenize((CAPTIONS * 16)[: sizes.CAPTIONS], return_lengths=True)
    text = text.to(DEVICE)

    def run() -> Tensor:
        return ours.encode_text(text, lengths=lengths)

    with torch.no_grad():
        if not isinstance(theirs, str):
            agree(run(), theirs.encode_text(text))
        rivals = against(theirs, lambda: theirs.encode_text(text), full)
        floor = text_floor(MODELS[name], lengths)
        compare(run, rivals, items=len(text), floor=floor, mean_tokens=float(lengths.double().mean()))


def agree(got: Tensor, expected: Tensor) -> None:
    assert (got.double() - expected.double()).norm() <= TOLERANCE * expected.double().norm(), "it computes something else"


@pytest.mark.parametrize(("name", "B"), IMAGES)
def test_encode_image(compare, pair, full: bool, name: str, B: int) -> None:
    """Ours as ``for_inference`` gives it; beside it ours as loaded."""
    loaded, theirs = map(lowered, pair(name))
    ours, side = loaded.for_inference(), MODELS[name]["image_resolution"]
    image = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    with torch.no_grad():
        if not isinstance(theirs, str):
            agree(ours.encode_image(image), theirs.encode_image(image))
        rivals = against(theirs, lambda: theirs.encode_image(image), full) | {"our loaded": lambda: loaded.encode_image(image)}
        floor = image_floor(MODELS[name], theirs, image)
        compare(lambda: ours.encode_image(image), rivals, items=len(image), floor=floor, graphs=B == 1)


@pytest.mark.parametrize(("name", "B"), STEPS)
def test_training_step(compare, pair, full: bool, name: str, B: int) -> None:
    """Forward and backward of both towers and the loss, on captions; the peak is beyond the gradients of the step before."""
    from clipfast.train.engine import Towers  # here: it needs webdataset, which the rows above do not

    ours, theirs = (m if isinstance(m, str) else copy.deepcopy(m).train() for m in pair(name))
    towers, side = Towers(ours, DTYPE if GPU else None), MODELS[name]["image_resolution"]
    image = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    text, lengths = tokenize((CAPTIONS * 16)[:B], return_lengths=True)
    text = text.to(DEVICE)

    def step_of_ours() -> None:
        ours.zero_grad(set_to_none=True)
        with towers.lowered():
            features = towers(image.to(DTYPE), text, lengths)
            clip_loss(*features, ours.logit_scale.exp(), normalize=True).backward()

    def of_theirs() -> Tensor:
        with torch.autocast(DEVICE, DTYPE, enabled=GPU):
            features = theirs.encode_image(image), theirs.encode_text(text)
            return open_clip.loss.ClipLoss()(*(F.normalize(f, dim=-1) for f in features), theirs.logit_scale.exp())

    def both_ways(loss_of):
        def run() -> None:
            theirs.zero_grad(set_to_none=True)
            loss_of().backward()

        return run

    losses = against(theirs, of_theirs, full) | {"open_clip task": as_task(theirs, image, text, of_theirs)}
    rivals = {rival: loss_of if isinstance(loss_of, str) else both_ways(loss_of) for rival, loss_of in losses.items()}
    least = step_floor(MODELS[name], theirs, image, lengths)
    mean_tokens = float(lengths.double().mean())
    compare(step_of_ours, rivals, rounds=3, items=B, floor=least, mean_tokens=mean_tokens)


def test_demo_training_step(compare) -> None:
    """The demo's config, one update on the same batch: our step, and open_clip's model, loss and scaling in the same loop."""
    from demo import emoji
    from demo.__main__ import recipe

    config = recipe(out="", seconds=300)
    torch.manual_seed(0)
    ours = CLIP(**config.model).to(DEVICE).train()  # type: ignore[arg-type]
    theirs: Any = open_clip_model(config.model, copy.deepcopy(ours.state_dict()))  # type: ignore[arg-type]
    side, B = config.model["image_resolution"], config.batch_size  # type: ignore[index]
    image = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    captions = [template.format(name) for name in NAMES for template in emoji.TRAIN_TEMPLATES][:B]  # 7 tokens, as the demo's
    text, lengths = tokenize(captions, config.model["context_length"], return_lengths=True)  # type: ignore[index]
    text = text.to(DEVICE)

    def features_of_ours() -> Tensor:
        images, texts = ours.encode_image(image), ours.encode_text(text, lengths=lengths)
        return clip_loss(images, texts, ours.logit_scale.exp(), normalize=True)

    if isinstance(theirs, str):
        compare(step(ours, features_of_ours, config), {"open_clip": theirs}, items=B)
        return
    theirs, loss_of_theirs = theirs.to(DEVICE).train(), open_clip.loss.ClipLoss()

    def features_of_theirs() -> Tensor:
        return loss_of_theirs(F.normalize(theirs.encode_image(image), dim=-1), F.normalize(theirs.encode_text(text), dim=-1),
                              theirs.logit_scale.exp())  # fmt: skip

    first = features_of_ours().item(), features_of_theirs().item()
    assert abs(first[0] - first[1]) <= 1e-5 * abs(first[1])
    compare(
        step(ours, features_of_ours, config), {"open_clip": step(theirs, features_of_theirs, config)}, items=B,
        floor=step_floor(config.model, theirs, image, lengths), mean_tokens=float(lengths.double().mean()),
    )  # fmt: skip


def step(model: nn.Module, loss_of, config: Any):
    """One update: the same optimiser for both."""
    from clipfast.train.engine import adamw

    optimizer = adamw(model, config)  # type: ignore[arg-type]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)  # type: ignore[union-attr,operator]

    return run

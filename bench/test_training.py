"""Training whole: the demo's run against an open_clip loop on the same data in memory, and the way from JPEGs to batches."""

from __future__ import annotations

import copy
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.rivals import open_clip, open_clip_model
from bench.test_end_to_end import photograph
from bench.test_towers import CAPTIONS, step_floor
from clipfast.data import DRAFT, Batch, DataConfig, random_square, training_batches
from clipfast.inputs.image import MEAN, STD, jpeg_decoder, read_rgb
from clipfast.model import CLIP
from clipfast.train import TrainConfig
from clipfast.train.engine import MAX_LOG_SCALE, Engine, adamw, learning_rate
from clipfast.train.job import joined
from demo import __main__ as demo
from demo import emoji

wds = pytest.importorskip("webdataset")
if isinstance(open_clip, str):
    pytest.skip(open_clip, allow_module_level=True)

STEPS = 200  # of the loss curves, with --full
TURN = 10  # steps of each contender at a time, as a run has them one after the other


def in_memory(config: TrainConfig, number: int) -> list[Batch]:
    """The demo's batches, made beforehand and kept as bytes: what is timed is the training."""
    try:
        emoji.prepare(emoji.DATA)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no drawings: {error}")
    std, mean = (torch.tensor(value).view(3, 1, 1) for value in (STD, MEAN))
    made = islice(demo.batches(emoji.load("train", emoji.DATA), config)(0), number)
    return [b._replace(pixels=((b.pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)) for b in made]


def open_clip_loop(config: TrainConfig, model: Any, batches: Iterator[Batch], device: torch.device) -> Iterator[float]:
    """open_clip's train_one_epoch without its logging: its model and loss, our optimiser (fused AdamW, the same groups)."""
    model, loss_of = model.to(device).train(), open_clip.ClipLoss()
    optimizer = adamw(model, config)
    std, mean = (torch.tensor(value, device=device).view(3, 1, 1) for value in (STD, MEAN))
    for step in count():
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, (step + 0.5) / config.total_steps)
        optimizer.zero_grad()
        pixels = (batch.pixels.to(device).float() / 255 - mean) / std
        features = model(pixels, batch.tokens.to(device))
        loss = loss_of(*features)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        yield loss.item()


def our_loop(config: TrainConfig, model: CLIP, batches: Iterator[Batch]) -> Iterator[float]:
    with joined() as job:
        engine = Engine(config, job, model)
        for step in count():
            yield engine.update(next(batches), learning_rate(config, (step + 0.5) / config.total_steps))["loss"]


def test_emoji_run(compare, full: bool) -> None:
    """``TURN`` steps of each in turn, from the same weights on the same batches. The loss curves must agree: of the steps that
    are timed, and with --full of 200."""
    rounds = 5
    # As many calls as `compare` makes: a warm-up, the rounds (with --full three times as many) and one for the memory.
    calls = 2 + rounds * (3 if full else 1)
    config = replace(demo.recipe("", 300), max_seconds=0.0, steps=STEPS, precision="fp32")  # as theirs
    data = in_memory(config, STEPS if full else TURN * calls)
    torch.manual_seed(config.seed)
    model = CLIP(**config.model)  # type: ignore[arg-type]
    theirs = open_clip_model(config.model, copy.deepcopy(model.state_dict()))  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    curves: dict[str, list[float]] = {"ours": [], "open_clip": []}
    loops = {"ours": our_loop(config, model, iter(data)), "open_clip": open_clip_loop(config, theirs, iter(data), device)}

    def steps(name: str, number: int = TURN) -> None:
        curves[name] += islice(loops[name], number)

    loss: dict[str, float] = {}  # of the record's row, filled in below
    mean_tokens = float(torch.cat([batch.lengths for batch in data]).double().mean())
    rivals = {"open_clip": lambda: steps("open_clip")}
    floors = [step_floor(config.model, theirs, b.pixels.float(), b.lengths) for b in data]
    least = tuple(TURN * sum(of) // len(data) for of in zip(*floors, strict=True))  # in all calls one batch costs as the next
    items = TURN * config.batch_size
    compare(lambda: steps("ours"), rivals, rounds=rounds, items=items, floor=least, mean_tokens=mean_tokens, loss=loss)
    for name in curves:
        steps(name, len(data) - len(curves[name]))
    ours, other = (np.array(curves[name]) for name in ("ours", "open_clip"))
    loss |= {"steps": len(ours), "first": ours[0], "last": ours[-1], "largest_difference": float(abs(ours - other).max())}
    assert len(ours) == len(other) == len(data) and abs(ours[:5] - other[:5]).max() < 1e-3
    if full:
        # Two runs in fp32 part after some steps, as rounding grows; so do open_clip's own in two orders of summation.
        means, others = (curve.reshape(-1, 20).mean(1) for curve in (ours, other))
        assert abs(means - others).max() < 0.03 and means[-1] < means[0] - 1


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """128 JPEGs of 500 x 375 with captions in a tar."""
    path, rng = tmp_path_factory.mktemp("photos") / "000.tar", np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(128):
            photo = io.BytesIO()
            photograph(rng).resize((500, 375), Image.Resampling.BICUBIC).save(photo, "JPEG", quality=90)
            for kind, content in (("jpg", photo.getvalue()), ("txt", CAPTIONS[number % len(CAPTIONS)].encode())):
                info = tarfile.TarInfo(f"{number:04}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As torch sets it in a loader's worker, for ours and the rival alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_photos_to_batches(compare, shard: str, one_thread: None) -> None:
    """Batches of 64 out of a tar in one process: decoding, random crop, tokens, collation. open_clip's pipeline as its data.py
    builds it, with the transform it trains with."""
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    transform = open_clip.image_transform(224, is_train=True)

    def rival() -> None:
        pipeline = wds.WebDataset(shard, shardshuffle=False).decode("pilrgb").rename(image="jpg;png;jpeg;webp", text="txt")
        pipeline = (
            pipeline.map_dict(image=transform, text=lambda text: tokenizer(text)[0]).to_tuple("image", "text").batched(64)
        )
        assert sum(len(image) for image, _ in pipeline) == 128

    ours = training_batches(DataConfig(shard, workers=0, shuffle_buffer=1), 224, 64)

    def run() -> None:
        assert sum(len(batch.pixels) for batch in islice(ours(0), 2)) == 128

    apart, bits = difference(shard)
    note = dict(jpeg=jpeg_decoder(), bits_per_pixel=bits, difference=apart)
    compare(run, {"open_clip": rival}, rounds=7, items=128, **note)
    assert apart["mean"] < 2  # of 255
    assert 1.5 < bits < 3  # 24 public photographs at this size and quality have 2.4 on average


def difference(shard: str) -> tuple[dict[str, float], float]:
    """Of our pixels from the crop that open_clip's transform makes of the same place; and the bits a pixel of the photos."""
    import random

    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    apart, bits = [], []
    for sample in wds.WebDataset(shard, shardshuffle=False):
        stored, key = sample["jpg"], sample["__key__"]
        ours = random_square(read_rgb(stored, DRAFT * 224), 224, random.Random(key))
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        left = int(random.Random(key).random() * (500 - 375 + 1))
        theirs = np.asarray(resized_crop(image, 0, left, 375, 375, [224, 224], InterpolationMode.BICUBIC))
        apart.append(abs(ours.astype(float) - theirs))
        bits.append(8 * len(stored) / (image.width * image.height))
    return {"mean": float(np.mean(apart)), "largest": float(np.max(apart))}, float(np.mean(bits))

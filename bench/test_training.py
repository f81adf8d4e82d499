"""Training whole: the demo's run against an open_clip loop on the same data in memory, and the way from JPEGs to batches."""

from __future__ import annotations

import copy
import io
import tarfile
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image

from bench.rivals import open_clip, open_clip_model
from bench.test_end_to_end import photograph
from bench.test_towers import CAPTIONS
from clipfast.data import Batch, DataConfig, random_square, training_batches
from clipfast.engine import Engine, adamw, learning_rate
from clipfast.job import joined
from clipfast.model import CLIP
from clipfast.train import TrainConfig
from demo import __main__ as demo
from demo import emoji

STEPS = 200  # of the loss curves


def in_memory(config: TrainConfig, number: int) -> list[Batch]:
    """The demo's batches, made beforehand: what is timed is the training."""
    emoji.prepare(emoji.DATA)
    return list(islice(demo.batches(emoji.load("train", emoji.DATA), config)(0), number))


def open_clip_loop(config: TrainConfig, model: Any, batches: Iterator[Batch], device: torch.device) -> Iterator[float]:
    """open_clip's train_one_epoch without its logging: its model and loss, our optimiser (fused AdamW, the same groups)."""
    model, loss_of = model.to(device).train(), open_clip.ClipLoss()
    optimizer = adamw(model, config)
    for step in count():
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, (step + 0.5) / config.total_steps)
        optimizer.zero_grad()
        image = F.normalize(model.encode_image(batch.pixels.to(device)), dim=-1)
        text = F.normalize(model.encode_text(batch.tokens.to(device)), dim=-1)
        loss = loss_of(image, text, model.logit_scale.exp())
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        yield loss.item()


def our_loop(config: TrainConfig, model: CLIP, batches: Iterator[Batch]) -> Iterator[float]:
    with joined() as job:
        engine = Engine(config, job, model)
        for step in count():
            yield engine.update(next(batches), learning_rate(config, (step + 0.5) / config.total_steps))["loss"]


def test_emoji_run(compare) -> None:
    """A few steps at a time of both, from the same weights on the same batches; the loss curves of all steps must agree."""
    from dataclasses import replace

    config = replace(demo.recipe("", 300), max_seconds=0.0, steps=STEPS)
    data = in_memory(config, STEPS)
    torch.manual_seed(config.seed)
    model = CLIP(**config.model)  # type: ignore[arg-type]
    theirs = open_clip_model(config.model, copy.deepcopy(model.state_dict()))  # type: ignore[arg-type]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    curves: dict[str, list[float]] = {"ours": [], "open_clip": []}
    loops = {"ours": our_loop(config, model, iter(data)), "open_clip": open_clip_loop(config, theirs, iter(data), device)}

    def steps(name: str, number: int = 4) -> None:
        curves[name] += islice(loops[name], min(number, STEPS - len(curves[name])))

    mean_tokens = float(torch.cat([batch.lengths for batch in data]).double().mean())
    rivals = {"open_clip": lambda: steps("open_clip")}
    compare(lambda: steps("ours"), rivals, rounds=9, items=4 * config.batch_size, mean_tokens=mean_tokens)
    for name in curves:
        steps(name, STEPS)
    ours, other = (np.array(curves[name]).reshape(-1, 20).mean(1) for name in ("ours", "open_clip"))
    assert abs(np.array(curves["ours"][:5]) - curves["open_clip"][:5]).max() < 1e-3
    # Two runs in fp32 part after some steps, as rounding grows; of open_clip's own on two orders of summation as well.
    assert abs(ours - other).max() < 0.03 and ours[-1] < ours[0] - 1


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


def test_photos_to_batches(compare, shard: str) -> None:
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

    compare(run, {"open_clip": rival}, rounds=5, items=128)
    assert difference(shard) < 2  # of 255, on average


def difference(shard: str) -> float:
    """Between our pixels and Pillow's, of the same crops."""
    import random

    found = []
    for sample in wds.WebDataset(shard, shardshuffle=False).decode("pilrgb"):
        image = sample["jpg"]
        ours = random_square(image, 224, random.Random(0)).permute(1, 2, 0).numpy()
        resized, rng = image.resize((298, 224), Image.Resampling.BICUBIC), random.Random(0)
        left, top = rng.randint(0, 298 - 224), rng.randint(0, 0)
        theirs = np.asarray(resized.crop((left, top, left + 224, top + 224)))
        found.append(abs(ours.astype(float) - theirs).mean())
    return float(np.mean(found))

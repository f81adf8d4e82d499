"""From files to vectors: what ``clipfast embed`` does with a folder of JPEGs and a table of captions, and open_clip's model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bench.measure import DEVICE, seconds
from bench.rivals import open_clip_model
from bench.test_text_and_images import captions
from clipfast.data.sources import read_table
from clipfast.evaluate import embed
from clipfast.inputs.image import MEAN, STD, Preprocess
from clipfast.model import CLIP, MODELS

NAME, PHOTOS = "ViT-B/32", 1024 if DEVICE == "cuda" else 48


def photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth shapes of every size with edges and a sensor's noise: they cost a JPEG decoder what scenes cost."""
    width, height = rng.choice([(640, 480), (480, 640), (640, 427), (500, 375)])
    picture = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48, 96):
        noise = Image.fromarray(rng.integers(0, 256, (cells * height // width, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / cells**0.5
    edges = picture.mean(2) > np.median(picture)
    picture = picture / picture.max() * 200 + 40 * edges[..., None] + rng.normal(0, 6, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.csv beside its JPEGs, of 80 kB on average."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "caption"))
        for i, caption in enumerate(captions(PHOTOS)):
            photograph(rng).save(folder / f"{i:05}.jpg", quality=90)
            rows.writerow((f"{i:05}.jpg", caption))
    return folder / "pairs.csv"


class Pairs(Dataset):
    """What a user of open_clip writes: its transform on every file of the table."""

    def __init__(self, table: Path) -> None:
        from torchvision import transforms as T

        with table.open(newline="") as file:
            self.rows = [(table.parent / row["path"], row["caption"]) for row in csv.DictReader(file)]
        steps = [T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), lambda image: image.convert("RGB")]
        self.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        path, caption = self.rows[i]
        return self.transform(Image.open(path)), caption


def test_embed(compare, table: Path, tmp_path: Path) -> None:
    """Both read, decode, encode and write vectors with captions; open_clip with as many workers as serve it best."""
    torch.manual_seed(0)
    ours, preprocess = CLIP(**MODELS[NAME]).eval().to(DEVICE), Preprocess(224)
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    theirs, ours = open_clip_model(MODELS[NAME], ours.state_dict()), ours.to(dtype)
    batch = 64 if DEVICE == "cuda" else 16  # on the CPU both are fastest with batches that leave something to overlap

    def run_ours() -> None:
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        embed(ours, preprocess, read_table(table), tmp_path / "ours", batch_size=batch, threads=2)

    if isinstance(theirs, str):
        compare(run_ours, {"open_clip": theirs}, rounds=3, items=PHOTOS, model=NAME)
        return
    theirs = theirs.eval().to(DEVICE, dtype)

    def run_theirs(workers: int) -> None:
        vectors, lines = [], []
        with torch.inference_mode():
            for images, texts in DataLoader(Pairs(table), batch_size=batch, num_workers=workers):
                features = theirs.encode_image(images.to(DEVICE, dtype))  # type: ignore[operator]
                vectors.append(F.normalize(features.float(), dim=-1).cpu().numpy())
                lines += texts
        np.save(tmp_path / "theirs.npy", np.concatenate(vectors))
        (tmp_path / "theirs.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in lines))

    run_ours(), run_theirs(0)
    got, expected = np.load(tmp_path / "ours" / "img_emb" / "img_emb_00000.npy"), np.load(tmp_path / "theirs.npy")
    assert got.shape == expected.shape == (PHOTOS, 512)
    assert np.abs(got - expected).max() <= (1e-4 if DEVICE == "cpu" else 2e-2)
    best = min((0, 1, 2, 8) if DEVICE == "cuda" else (0, 1, 2), key=lambda workers: seconds(lambda: run_theirs(workers)))
    compare(run_ours, {"open_clip": lambda: run_theirs(best)}, rounds=3, items=PHOTOS, model=NAME, workers=best)

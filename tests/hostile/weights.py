"""Checkpoints of every form, damaged: the weights that the form's own library reads, or one line."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clipfast import export, load
from clipfast.model import CLIP
from tests.hostile.harness import Attempt, mutated, one_line

SIZES = {"embed_dim": 16, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
SIZES |= {"context_length": 8, "vocab_size": 60, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
State = dict[str, Tensor]


class Scripted(torch.nn.Module):
    """A tree of modules with a CLIP's names, as the published archives have it."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            home: torch.nn.Module = self
            for part in path:
                if not hasattr(home, part):
                    home.add_module(part, torch.nn.Module())
                home = getattr(home, part)
            home.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def prepare(folder: Path) -> Attempt:
    torch.manual_seed(0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = CLIP(**SIZES)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    whole = folder / "whole"
    whole.mkdir()
    torch.save({"state_dict": state, "model_config": {"quick_gelu": True}, "epoch": 3}, whole / "zip.pt")
    torch.save(state, whole / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.trace(Scripted(state), torch.zeros(2)).save(str(whole / "jit.pt"))
    export(model, whole / "plain.safetensors", "safetensors")
    export(model, whole / "open_clip", "open_clip")
    export(model, whole / "transformers", "transformers")
    _clipfasts(model, whole / "own")
    readers: dict[str, Callable[[Path], Any]] = {
        "zip.pt": lambda p: torch.load(p, weights_only=True)["state_dict"],
        "legacy.pt": lambda p: torch.load(p, weights_only=True),
        "jit.pt": lambda p: dict(torch.jit.load(str(p)).state_dict()),
        "plain.safetensors": lambda p: safetensors.torch.load_file(p),
    }

    def attempt(rng: random.Random) -> str:
        name = rng.choice([*sorted(path.name for path in whole.iterdir())])
        shutil.rmtree(work := folder / "work", ignore_errors=True)
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, work)
        target = rng.choice([path for path in sorted(work.rglob("*")) if path.is_file()] or [work])
        data = target.read_bytes()
        changed = _inside(data, rng) if rng.random() < 0.4 and zipfile.is_zipfile(target) else mutated(data, rng)
        target.write_bytes(changed)
        shutil.rmtree(path := folder / name, ignore_errors=True)
        path.unlink(missing_ok=True)
        work.rename(path)
        try:
            got = load(path, "cpu", quick_gelu=True)[0].state_dict()
        except Exception as error:
            return one_line(error) or ("" if name in str(error) else f"the file is not named: {error}")
        finally:
            (shutil.rmtree if path.is_dir() else os.unlink)(path)
        if name in readers:
            path.write_bytes(changed)
            try:
                expected = readers[name](path)
            except Exception:
                expected = state  # what its own library cannot read, ours has read whole or not at all
        else:
            expected = state if changed == data or target.suffix != ".safetensors" else None
            if name == "own":
                expected = state
        if expected is None:  # a damaged value cannot be told from a good one
            return "" if got.keys() == state.keys() else "other tensors"
        return _apart(expected, got)

    return attempt


def _apart(expected: State, got: State) -> str:
    for name, tensor in got.items():
        own = expected.get(name)
        if own is None or own.shape != tensor.shape:
            return f"{name} is not what its library reads"
        if not torch.equal(own.float().nan_to_num(7.0), tensor.nan_to_num(7.0)):
            return f"{name} has other values"
    return ""


def _inside(data: bytes, rng: random.Random) -> bytes:
    """A zip with one of its entries damaged, or claimed to be something else, and the checksums right."""
    made, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(data))
    chosen = rng.choice(source.namelist())
    with zipfile.ZipFile(made, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename == chosen:
                if rng.random() < 0.1:
                    continue
                content = mutated(content, rng)
                if rng.random() < 0.1:
                    content = bytes(rng.choice((0, 1 << 20)))
            target.writestr(info.filename, content, rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
    return made.getvalue()


def _clipfasts(model: CLIP, path: Path) -> None:
    """A checkpoint as clipfast.train leaves it."""
    from clipfast.data import Batch
    from clipfast.train import TrainConfig, train

    def batches(step: int):  # type: ignore[no-untyped-def]
        tokens = torch.zeros(2, 8, dtype=torch.int32)
        tokens[:, 1] = 59
        while True:
            yield Batch(torch.zeros(2, 3, 32, 32), tokens, torch.full((2,), 2))

    run = {"steps": 1, "batch_size": 2, "lr": 0.0, "tensorboard": False, "progress": False}
    train(TrainConfig(model=SIZES, out=str(path.parent / "run"), **run), batches, model)  # type: ignore[arg-type]
    next((path.parent / "run" / "checkpoints").iterdir()).rename(path)
    shutil.rmtree(path.parent / "run")

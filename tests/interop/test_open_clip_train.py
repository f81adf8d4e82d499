"""open_clip_train's own functions, with a converted model and our loss in the places of theirs: the same run, step by step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import open_clip.transform
import pytest
import torch
from open_clip.transform import PreprocessCfg
from open_clip_train import train as trainer
from open_clip_train import zero_shot
from open_clip_train.data import DataInfo, SharedEpoch, get_csv_dataset
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from PIL import Image
from torch import Tensor

import clipfast
from clipfast import ClipLoss, SigLipLoss

# Both are of open_clip's code, on a machine without an accelerator and with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument", "ignore:Conversion of an array with ndim")

PAIRS, BATCH = 12, 4
CAPTIONS = [f"a drawing of {number} things" for number in range(PAIRS)]


def reference(**options: Any) -> Any:
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=64, head_width=32, patch_size=16)
    text = dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2)
    return open_clip.CLIP(32, vision, text, output_dict=True, **options)


def converted(model: Any) -> Any:
    ours = clipfast.convert(copy.deepcopy(model))
    ours.output_dict = True
    return ours


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for number in range(PAIRS):
        Image.fromarray(generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = [f"{folder / str(number)}.png\t{caption}" for number, caption in enumerate(CAPTIONS)]
    (folder / "pairs.csv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return folder / "pairs.csv"


def arguments(table: Path, *more: str) -> Any:
    data = ["--train-data", str(table), "--val-data", str(table), "--dataset-type", "csv", "--workers", "0"]
    training = ["--batch-size", str(BATCH), "--epochs", "1", "--lr", "1e-3", "--precision", "fp32", "--model", "ViT-B-32"]
    args = parse_args([*data, *training, *more])
    args.device, args.rank, args.local_rank, args.world_size, args.distributed = "cpu", 0, 0, 1, False
    args.distill, args.save_logs, args.checkpoint_path, args.wandb = False, True, str(table.parent), False
    args.log_every_n_steps = 1
    return args


def pairs(args: Any, model: Any) -> dict[str, DataInfo]:
    """open_clip's own reading of the table."""
    transform = open_clip.transform.image_transform_v2(PreprocessCfg(size=model.visual.image_size), is_train=False)
    made = {}
    for split, shuffled in (("train", True), ("val", False)):
        torch.manual_seed(1)
        made[split] = get_csv_dataset(args, transform, shuffled, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    return made


def optimiser(model: Any, args: Any) -> torch.optim.Optimizer:
    """main's two groups: what has one dimension, and what the model names, does not decay."""
    spared = model.no_weight_decay()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and name not in spared and "logit_scale" not in name for name, p in named]
    groups = [[p for (_, p), decay in zip(named, decays, strict=True) if decay is kind] for kind in (False, True)]
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1], "weight_decay": 0.2}], lr=args.lr
    )


def run(model: Any, loss: Any, args: Any) -> tuple[list[dict[str, float]], dict[str, float]]:
    """(what each step logs, what the evaluation says) of one epoch by open_clip_train."""
    steps: list[dict[str, float]] = []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: steps.append({name: value}))
    data, optimizer = pairs(args, model), optimiser(model, args)
    scheduler: Callable = cosine_lr(optimizer, args.lr, 1, PAIRS // BATCH)
    torch.manual_seed(2)
    trainer.train_one_epoch(model, data, loss, 0, optimizer, None, scheduler, None, args, tb_writer=writer)
    kept = [step for step in steps if {"train/contrastive_loss", "train/scale", "train/lr"} & step.keys()]
    return kept, trainer.evaluate(model, data, 1, args)


CASES: dict[str, tuple[Any, Any, dict[str, Any], tuple[str, ...]]] = {
    "clip": (ClipLoss, open_clip.loss.ClipLoss, {}, ()),
    "accumulated": (ClipLoss, open_clip.loss.ClipLoss, {}, ("--accum-freq", "3")),
    "siglip": (SigLipLoss, open_clip.loss.SigLipLoss, dict(init_logit_bias=-10.0), ("--grad-clip-norm", "1.0")),
}


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_and_its_evaluation(case: str, table: Path) -> None:
    mine, theirs, options, more = CASES[case]
    args, model = arguments(table, *more), reference(**options)
    steps, measured = run(converted(model), mine(), args)
    expected_steps, expected = run(model, theirs(), args)
    assert len(steps) == len(expected_steps) == 3 * (PAIRS // BATCH // args.accum_freq)
    for got, wanted in zip(steps, expected_steps, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    losses = [step["train/contrastive_loss"] for step in steps if "train/contrastive_loss" in step]
    assert len(set(losses)) == len(losses)  # every step moved the weights
    assert measured.keys() == expected.keys() and {"image_to_text_R@1", "clip_val_loss"} <= measured.keys()
    assert measured["clip_val_loss"] == pytest.approx(expected["clip_val_loss"], rel=1e-4)
    assert json.loads((table.parent / "results.jsonl").read_text().splitlines()[-1]).keys() == measured.keys()


def test_zero_shot_evaluation(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 12 classes in the place of ImageNet's 1,000, one image each."""
    args, model = arguments(table, "--zeroshot-frequency", "1"), reference().eval()
    monkeypatch.setattr(zero_shot, "IMAGENET_CLASSNAMES", CAPTIONS)
    monkeypatch.setattr(zero_shot, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:2])
    images = [image for image, _ in pairs(args, model)["val"].dataloader.dataset]
    found = []
    for tested in (converted(model).eval(), model):
        with torch.no_grad():  # the classes that a model sees in half of the images: the share is neither 0 nor 1
            scores = model(torch.stack(images), open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))
            seen = (scores["image_features"] @ scores["text_features"].T).argmax(1)
        targets = torch.where(torch.arange(PAIRS) < PAIRS // 2, seen, (seen + 6) % PAIRS)
        loader: Iterator[tuple[Tensor, Tensor]] | Any = [(torch.stack(images), targets)]
        data = {"imagenet-val": DataInfo(loader, shared_epoch=SharedEpoch(0))}
        found.append(trainer.evaluate(tested, data, 1, args, tokenizer=open_clip.get_tokenizer("ViT-B-32")))
    assert found[0] == found[1] and found[0].keys() == {"imagenet-zeroshot-val-top1", "imagenet-zeroshot-val-top5"}
    assert 0 < found[0]["imagenet-zeroshot-val-top1"] < 1


def test_what_main_asks_of_a_model() -> None:
    """Locked towers and checkpoints of activations: the same parameters train, and the loss is the same."""
    theirs, images = reference(), torch.randn(4, 3, 32, 32)
    ours, texts = converted(theirs), open_clip.get_tokenizer("ViT-B-32")(CAPTIONS[:4])
    for each in (ours, theirs):
        each.lock_image_tower(unlocked_groups=1, freeze_bn_stats=False)
        each.lock_text_tower(unlocked_layers=1, freeze_layer_norm=True)
        each.set_grad_checkpointing()
        each.train()
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (ours, theirs)]
    assert trained[0] == trained[1] and 0 < len(trained[0]) < len(list(theirs.parameters()))
    outputs = [each(images, texts) for each in (ours, theirs)]
    assert outputs[0].keys() == outputs[1].keys()
    losses = [ClipLoss()(**outputs[0], output_dict=True), open_clip.loss.ClipLoss()(**outputs[1], output_dict=True)]
    for each in losses:
        each["contrastive_loss"].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    for alone in (dict(image=images), dict(text=texts)):
        got, wanted = ours(**alone), theirs(**alone)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert ours.no_weight_decay() == theirs.no_weight_decay() and ours.visual.image_size == theirs.visual.image_size

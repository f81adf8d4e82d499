"""Training: the optimiser, the schedule, large batches in small memory, and runs that resume bit for bit."""

import ctypes
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.data import Batch
from clipfast.inputs.image import Preprocess
from clipfast.model import CLIP, MODELS
from clipfast.model.vit import drop_patches
from clipfast.train import TrainConfig, checkpoint, paper, train
from clipfast.train.engine import Engine, Objective, Towers, adamw, backward, learning_rate, split
from clipfast.train.job import Job
from clipfast.weights import distributed, load

SIZES = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16,
    "context_length": 12, "vocab_size": 64, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2,
}  # fmt: skip
RESNET = SIZES | {"vision_layers": (1, 1, 1, 1), "vision_width": 16, "vision_patch_size": None}


def pairs(step: int, rows: int = 8, labels: bool = False, side: int = 32) -> Batch:
    """Learnable pairs: the first word of the caption is the colour of the image."""
    random = torch.Generator().manual_seed(step)
    word = torch.randint(1, 9, (rows,), generator=random)
    lengths = torch.randint(3, 12, (rows,), generator=random)
    tokens = torch.randint(9, 60, (rows, 12), generator=random)
    tokens[:, 0], tokens[:, 1] = 61, word
    tokens[torch.arange(12) >= lengths[:, None] - 1] = 0
    tokens[torch.arange(rows), lengths - 1] = 63
    pixels = torch.randn(rows, 3, side, side, generator=random) * 0.1 + (word.float() - 4).view(-1, 1, 1, 1)
    return Batch(pixels, tokens.int(), lengths, word if labels else None)


def endless(step: int, **options) -> Iterator[Batch]:
    while True:
        yield pairs(step, **options)
        step += 1


def config(out: Path, **changes) -> TrainConfig:
    quick = {"model": SIZES, "batch_size": 8, "steps": 12, "lr": 1e-3, "tensorboard": False, "progress": False, "device": "cpu"}
    return TrainConfig(**(quick | {"out": str(out)} | changes))


def tiny(sizes: dict = SIZES, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(**sizes)


def gradients(model: CLIP, parts: list[Batch], dtype: torch.dtype | None = None) -> float:
    return backward(Towers(model, dtype), Objective(model), parts)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def dense_loss(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None) -> Tensor:
    """The paper's figure 3, written out; with labels the target is shared equally among the positives."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.eye(len(logits)) if labels is None else labels[:, None] == labels
    target = target.to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---- the update --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_gradient_of_parts_is_that_of_the_whole(parts, labels):
    model, batch = tiny().double(), pairs(0, labels=labels)  # in fp64, where nothing but a wrong sum makes a difference
    truth = deepcopy(model)
    features = truth.encode_image(batch.pixels), truth.encode_text(batch.tokens, lengths=batch.lengths)
    expected = dense_loss(*features, truth.logit_scale.exp(), batch.labels)
    expected.backward()

    assert gradients(model, split(batch, parts)) == pytest.approx(expected.item(), rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.norm() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-13, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


class Noisy(nn.Module):
    """A stand-in with dropout in one tower and batch norm in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.norm, self.text = nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Embedding(64, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.norm(self.image(pixels[:, :, :4, :4].flatten(1)))

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        features = F.dropout(self.text(tokens.long()).mean(1), 0.5, self.training)
        self.seen.append(features.detach())
        return features


def test_both_passes_draw_the_same_dropout_and_count_batch_norm_once():
    torch.manual_seed(0)
    model, batch = Noisy(), pairs(0)
    once = deepcopy(model)
    gradients(model, split(batch, 2))  # type: ignore[arg-type]
    first, second = model.seen[:2], model.seen[2:]
    assert len(second) == 2 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)
    for part in split(batch, 2):
        once.encode_image(part.pixels)
    assert torch.equal(once.norm.running_mean, model.norm.running_mean) and model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_frozen_tower_stays_as_it_is(tmp_path, micro_batch):
    model = tiny()
    model.visual.requires_grad_(False)
    before = deepcopy(model.state_dict())
    train(config(tmp_path, steps=2, micro_batch=micro_batch), endless, model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "token_embedding.weight" in changed and not any(name.startswith("visual.") for name in changed)


@pytest.mark.parametrize("sizes", [SIZES, RESNET], ids=["vit", "resnet"])
def test_decay_spares_gains_biases_and_the_scale(sizes):
    model = tiny(sizes)
    optimizer = adamw(model, TrainConfig(steps=1, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    spared = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    gains = {f"{name}.{kind}" for name, m in model.named_modules() if isinstance(m, norms) for kind in ("weight", "bias")}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert spared == gains | biases | {"logit_scale"} | ({"visual.class_embedding"} & set(dict(model.named_parameters())))
    assert set(decay.values()) == {0.0, 0.3}


def test_the_first_update_is_adamw_by_hand(tmp_path):
    model = tiny()
    weight = model.text_projection.detach().clone()
    gain = model.ln_final.weight.detach().clone()
    settings = config(tmp_path, steps=1, warmup=0.0, weight_decay=0.2)
    truth = deepcopy(model)
    gradients(truth, [pairs(0)])
    train(settings, endless, model)
    rate = 0.5e-3  # a run of one step takes the rate of its middle: half of the cosine
    for before, after, gradient, decay in (
        (weight, model.text_projection, truth.text_projection.grad, 0.2),
        (gain, model.ln_final.weight, truth.ln_final.weight.grad, 0.0),
    ):
        expected = before * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-6)
        torch.testing.assert_close(after.detach(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(4.9, math.log(100)), (-0.5, 0.0)])
def test_the_scale_is_clamped(tmp_path, start, end):
    model = tiny()
    with torch.no_grad():
        model.logit_scale.fill_(start)
    train(config(tmp_path, steps=1, lr=1e-6), endless, model)
    assert model.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_large_gradients_are_clipped(tmp_path):
    seen: list[float] = []

    def norm(step, model, metrics):
        seen.append(sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5)

    train(config(tmp_path / "a", steps=3, grad_clip=0.01), endless, tiny(), norm)
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(line["gradient_norm"] > 0.1 for line in log(tmp_path / "a"))


def test_the_schedule():
    steps = TrainConfig(steps=100, warmup=20, lr=2.0)
    share = TrainConfig(steps=100, warmup=0.2, lr=2.0)
    for settings in (steps, share):
        rates = [learning_rate(settings, (step + 0.5) / 100) for step in range(100)]
        assert rates[:20] == pytest.approx([2.0 * (step + 0.5) / 20 for step in range(20)])
        assert rates[20:] == pytest.approx([1 + math.cos(math.pi * (step + 0.5) / 80) for step in range(80)])
        assert learning_rate(settings, 1.0) == pytest.approx(0, abs=1e-12)
    assert learning_rate(TrainConfig(steps=10, warmup=0.0, lr=2.0), 0.0) == 2.0
    assert learning_rate(TrainConfig(steps=10, warmup=2000, lr=2.0), 1.0) == pytest.approx(2.0 / 200)


# ---- the run -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_it_learns(tmp_path, micro_batch):
    done = train(config(tmp_path, steps=40, micro_batch=micro_batch), lambda step: endless(step, labels=True))
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 41)) and done.steps == 40
    first, last = (sum(line["loss"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert first > 1.9 and last < first - 0.4  # ln 8 = 2.08 knows nothing; equal words keep the labelled loss above 0
    assert lines[-1].keys() == {
        *(
            "step",
            "loss",
            "scale",
            "lr",
            "gradient_norm",
            "samples_per_second",
            "seconds",
            "data_wait",
            "ranks",
            "peak_memory_gb",
        )
    }
    assert 0.1 < lines[-1]["peak_memory_gb"] < 100


def checkpointed(out: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    path = out / "checkpoints" / f"step_{step:08}"
    distributed.verify(path)
    entries = distributed.Reader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    checkpoint.load(distributed.Reader(path), tensors)
    return tensors


def steps(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (out / "checkpoints").iterdir())


class Interrupt(Exception):
    pass


def stop_at(last: int):
    def on_step(step, model, metrics):
        if step == last:
            raise Interrupt

    return on_step


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "micro_batch": 3, "grad_clip": 0.5}, {"model": RESNET}], ids=["plain", "all", "resnet"]
)
def test_a_resumed_run_ends_bitwise_equal(tmp_path, options):
    straight = train(config(tmp_path / "straight", **options), endless)
    part = config(tmp_path / "part", **options, checkpoint_every=5, resume="auto")
    with pytest.raises(Interrupt):
        train(part, endless, on_step=stop_at(7))  # what steps 6 and 7 did is lost, with their lines in the log
    resumed = train(part, endless)
    assert resumed.steps == straight.steps == 12
    for kind in ("model", "ema"):
        ours, theirs = getattr(resumed, kind), getattr(straight, kind)
        assert (ours is None) == (theirs is None) == (kind == "ema" and "ema" not in options)
        for name, value in ours.state_dict().items() if ours else ():
            assert torch.equal(value, theirs.state_dict()[name]), name
    ours, theirs = ([line["loss"] for line in log(tmp_path / name)] for name in ("part", "straight"))
    assert ours == theirs and len(ours) == 12
    saved, expected = (checkpointed(tmp_path / name, 12) for name in ("part", "straight"))
    assert saved.keys() == expected.keys() and any(name.startswith("optimizer.") for name in saved)
    for name, value in saved.items():
        assert torch.equal(value, expected[name]), name


class Dropout(CLIP):
    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        return F.dropout(super().encode_image(image, normalize), 0.5, self.training)


def test_a_resumed_run_draws_the_same_random_numbers(tmp_path):
    def fresh() -> CLIP:
        torch.manual_seed(0)
        return Dropout(**SIZES)

    straight = train(config(tmp_path / "straight", micro_batch=3), endless, fresh())
    with pytest.raises(Interrupt):
        train(config(tmp_path / "part", micro_batch=3, checkpoint_every=5), endless, fresh(), stop_at(5))
    torch.rand(3)
    resumed = train(config(tmp_path / "part", micro_batch=3, resume="auto"), endless, fresh())
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name


def test_another_order_of_the_data_on_resume_is_told(tmp_path, caplog):
    def batches(step: int) -> Iterator[Batch]:
        return endless(step)

    batches.order = {"data": "a.tar", "workers": 2}
    train(config(tmp_path, steps=2), batches)
    train(config(tmp_path, steps=3, resume="auto"), batches)
    train(config(tmp_path, steps=4, resume="auto"), endless)  # which does not say
    train(config(tmp_path, steps=5, resume="auto"), batches)
    told = partial(filter, lambda record: record.name == "clipfast.train.loop", caplog.records)
    assert not list(told())
    batches.order = {"data": "a.tar", "workers": 4}
    train(config(tmp_path, steps=6, resume="auto"), batches)
    (record,) = told()
    assert record.getMessage().endswith("some come twice or not: workers 2 -> 4")


def test_a_pretrained_start_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="expected the name or the file of weights as model beside pretrained"):
        train(config(tmp_path, pretrained=True), endless)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    train(config(tmp_path, steps=3), endless)
    path = tmp_path / "checkpoints" / "step_00000003" / "about.json"
    before = path.stat().st_mtime_ns
    again = train(config(tmp_path, steps=3, resume="auto"), endless, on_step=stop_at(4))
    assert again.steps == 3 and path.stat().st_mtime_ns == before and len(log(tmp_path)) == 3


def cut_model(out: Path) -> None:
    os.truncate(out / "model.pt", 5000)


def model_of_another(out: Path) -> None:
    """As long a run, but of other weights: its model.pt has the same step and size."""
    train(config(out / "other", seed=1), endless)
    (out / "other" / "model.pt").replace(out / "model.pt")
    shutil.rmtree(out / "other")


def model_of_an_earlier_step(out: Path) -> None:
    train(config(out / "other", steps=3), endless)
    (out / "other" / "model.pt").replace(out / "model.pt")
    shutil.rmtree(out / "other")


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize(
    "lose",
    [
        lambda out: (out / "model.pt").unlink(),
        lambda out: (out / "model.pt").write_bytes(b""),
        lambda out: torch.save({"state_dict": 3}, out / "model.pt"),
        cut_model,
        model_of_another,
        model_of_an_earlier_step,
    ],
    ids=["missing", "empty", "of something else", "cut", "of another run", "of an earlier step"],
)
def test_a_finished_run_without_its_result_makes_it(tmp_path, lose, ema):
    run = partial(config, tmp_path, ema=ema, checkpoint_every=6)
    train(run(), endless)
    expected, before = torch.load(tmp_path / "model.pt"), (tmp_path / "model.pt").stat().st_mtime_ns
    train(run(resume="auto"), endless)
    assert (tmp_path / "model.pt").stat().st_mtime_ns == before  # it is as it should be
    lose(tmp_path)
    (tmp_path / "model.pt.part").write_bytes(b"half")
    assert train(run(resume="auto"), endless).steps == 12
    made = torch.load(tmp_path / "model.pt")
    assert made["model_config"] == expected["model_config"] and made["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in made["state_dict"].items():
        assert torch.equal(value, expected["state_dict"][name]), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.json", "log.jsonl", "model.pt"]


def test_what_a_killed_run_left_half_done_is_removed_at_once_and_what_it_owes_is_made(tmp_path):
    run = partial(config, tmp_path, checkpoint_every=4, val_every=6)
    seen = []

    def validate(model: CLIP, job: Job) -> dict[str, float]:
        seen.append(model.text_projection.clone())
        return {"top1": len(seen) / 8}

    train(run(), endless, validate=validate)
    for name in ("log.jsonl", "eval.jsonl", "not_finite.jsonl", "config.json", "model.pt", "somebody's"):
        (tmp_path / f"{name}.part").write_text("half")
    for name in ("step_00000004", "step_00000016.part"):  # killed while one was removed, another written
        (tmp_path / "checkpoints" / name).mkdir()
    lines = (tmp_path / "eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text(lines[0] + lines[1][:5])
    (tmp_path / "config.json").unlink()

    train(run(resume="auto"), endless, validate=validate)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if not file.name.startswith(("_", "."))}
    kept = {f"checkpoints/step_{step:08}{file}" for step in (8, 12) for file in ("", "/about.json")}
    assert left == {"checkpoints", "log.jsonl", "eval.jsonl", "config.json", "model.pt", "somebody's.part", *kept}
    found = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert found == [{"step": 6, "top1": 1 / 8}, {"step": 12, "top1": 3 / 8}]
    assert len(seen) == 3 and torch.equal(seen[1], seen[2])


def test_the_average_of_the_weights(tmp_path):
    weights = []
    done = train(
        config(tmp_path, steps=4, ema=0.9),
        endless,
        on_step=lambda step, model, _: weights.append(deepcopy(model.text_projection)),
    )
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.9 * expected + 0.1 * weight
    assert done.ema is not None
    torch.testing.assert_close(done.ema.text_projection, expected)


HEADS = SIZES | {"transformer_heads": 2, "vision_heads": 4, "quick_gelu": False}


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.5}, {"model": HEADS}, {"model": RESNET}], ids=["vit", "ema", "heads", "resnet"]
)
def test_load_reads_what_training_wrote(tmp_path, options):
    done = train(config(tmp_path, steps=2, **options), endless)
    expected = (done.ema or done.model).eval()
    model, preprocess = load(str(tmp_path / "model.pt"), device="cpu")
    batch = pairs(5)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(batch.pixels), expected.encode_image(batch.pixels))
        torch.testing.assert_close(
            model.encode_text(batch.tokens, lengths=batch.lengths), expected.encode_text(batch.tokens, lengths=batch.lengths)
        )
    assert model.visual.input_resolution == 32


def test_the_time_limit_anneals_the_schedule(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("clipfast.train.loop.perf_counter", lambda: clock[0])

    def batches(step: int) -> Iterator[Batch]:
        for batch in endless(step):
            clock[0] += 2.5  # what the update costs
            yield batch

    def on_step(step, model, metrics):
        clock[0] += 100  # evaluation does not count

    done = train(config(tmp_path, steps=0, max_seconds=50, warmup=0.2), batches, on_step=on_step)
    assert (done.steps, done.seconds) == (20, 50.0)
    rates = [line["lr"] for line in log(tmp_path)]
    assert max(rates) == rates[4] == 1e-3 and rates[-1] < 0.02e-3 and rates[4:] == sorted(rates[4:], reverse=True)
    both = train(config(tmp_path / "both", steps=6, max_seconds=50), batches, on_step=on_step)
    assert both.steps == 6


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("sizes", [SIZES, RESNET], ids=["vit", "resnet"])
def test_the_bf16_gradient_points_where_the_fp32_one_does(sizes, number):
    exact, half = tiny(sizes), tiny(sizes)
    parts = split(pairs(0, rows=48), number)
    assert gradients(half, parts, torch.bfloat16) == pytest.approx(gradients(exact, parts), rel=5e-3)
    ours, theirs = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (half, exact))
    assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.995
    for (name, a), b in zip(half.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2, msg=name)


def test_bf16_trains_close_to_fp32(tmp_path):
    for precision in ("fp32", "bf16"):
        train(config(tmp_path / precision, steps=5, precision=precision, micro_batch=4), endless)
    exact, half = ([line["loss"] for line in log(tmp_path / precision)] for precision in ("fp32", "bf16"))
    assert half == pytest.approx(exact, rel=0.03) and half != exact


def test_tensorboard_and_progress(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(tmp_path, steps=3, tensorboard=True, progress=True), endless)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in log(tmp_path)])
    bar = capsys.readouterr().err
    assert "100%" in bar and "loss" in bar and "scale" in bar and "lr" in bar and "samples/s" in bar and " GB" in bar


# ---- options -----------------------------------------------------------------------------------------------------------------


def losses(out: Path, **options) -> list[float]:
    train(config(out, **{"steps": 5, "batch_size": 16} | options), lambda step: endless(step, rows=16))
    return [line["loss"] for line in log(out)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_and_compiled_blocks_train_the_same(tmp_path, precision, monkeypatch):
    """Compiled without code generation, whose speed is not asked here: what Dynamo makes of the blocks is."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    plain = losses(tmp_path / "plain", precision=precision)
    close = pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-2)
    assert losses(tmp_path / "again", precision=precision, gradient_checkpointing=True) == plain
    assert losses(tmp_path / "parts", precision=precision, gradient_checkpointing=True, micro_batch=5) == close
    assert losses(tmp_path / "compiled", precision=precision, compile=True) == close
    assert losses(tmp_path / "both", precision=precision, compile=True, gradient_checkpointing=True, micro_batch=5) == close


# Not by monkeypatch, which deletes these settings when it undoes its change.
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8)
def test_every_kind_of_block_is_compiled(tmp_path, monkeypatch):
    """First, middle and last of either tower, with a graph and without: more than Dynamo compiles of one function by itself."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    deep = SIZES | {"vision_layers": 3, "transformer_layers": 3}
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        assert losses(tmp_path / "compiled", model=deep, compile=True, micro_batch=5) == pytest.approx(
            losses(tmp_path / "plain", model=deep, micro_batch=5), rel=1e-5
        )


def test_fp16_with_a_scaler_trains_close_to_fp32_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=1024.0))  # these gradients are large
    exact, half = losses(tmp_path / "exact"), losses(tmp_path / "half", precision="fp16", micro_batch=6)
    assert half == pytest.approx(exact, rel=0.03) and half != exact
    about = distributed.read_about(tmp_path / "half" / "checkpoints" / "step_00000005")
    assert about["scaler"]["scale"] == 1024.0 and about["scaler"]["_growth_tracker"] == 5
    losses(tmp_path / "half", precision="fp16", micro_batch=6, steps=6, resume="auto")
    assert distributed.read_about(tmp_path / "half" / "checkpoints" / "step_00000006")["scaler"]["_growth_tracker"] == 6


def test_a_gradient_beyond_fp16_halves_the_scale_and_nothing_else(tmp_path, monkeypatch):
    model = tiny()
    engine = Engine(config(tmp_path, precision="fp16"), Job(0, 1, torch.device("cpu")), model)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = deepcopy(model.state_dict())
    metrics = engine.update(pairs(0), 1e-3)
    assert engine.updated and math.isfinite(metrics["loss"]) and engine.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patch_dropout(tmp_path):
    model = tiny(SIZES | {"vision_patch_size": 4})  # 64 patches
    seen: list[int] = []
    model.visual.transformer.resblocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    train(config(tmp_path, steps=2, patch_dropout=0.75, micro_batch=4), endless, model)
    assert set(seen) == {1 + 16}
    with torch.no_grad():
        model.eval().encode_image(pairs(0).pixels)
    assert seen[-1] == 65
    kept = []
    for _ in range(200):
        s = drop_patches(torch.arange(65.0).view(1, 65, 1), 0.75)
        assert s[0, 0] == 0 and len(s.unique()) == 17
        kept += s[0, 1:, 0].int().tolist()
    assert set(kept) == set(range(1, 65))


def test_siglip_learns_its_bias_and_keeps_it(tmp_path):
    settings = config(tmp_path, loss="siglip", steps=30, lr=3e-3)
    train(settings, endless)
    lines = log(tmp_path)
    assert lines[0]["scale"] == pytest.approx(10, rel=0.01) and lines[-1]["loss"] < lines[0]["loss"]
    assert -10 < checkpointed(tmp_path, 30)["logit_bias"] < -9
    load(str(tmp_path / "model.pt"), "cpu")


def test_a_locked_resnet_keeps_its_statistics(tmp_path):
    model = tiny(RESNET)
    before = deepcopy(model.visual.state_dict())
    train(config(tmp_path, model=RESNET, lock_image=True, steps=2), endless, model)
    assert all(torch.equal(value, before[name]) for name, value in model.visual.state_dict().items())


def test_a_profile_and_validations(tmp_path):
    seen = []

    def validate(model: CLIP, job: Job) -> dict[str, float]:
        seen.append(model.text_projection.clone())
        return {"top1": float(len(seen))}

    settings = config(tmp_path, steps=8, profile=True, val_every=3, ema=0.5)
    done = train(settings, endless, validate=validate)
    trace = json.loads((tmp_path / "trace_rank_0.json").read_text())
    assert any("_fused_adamw_" in str(event.get("name")) for event in trace["traceEvents"])
    assert [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()] == [
        {"step": 3, "top1": 1.0}, {"step": 6, "top1": 2.0},
    ]  # fmt: skip
    assert done.ema is not None and not torch.equal(seen[1], done.ema.text_projection)


def test_wandb_is_told(tmp_path, monkeypatch):
    told = []
    fake = SimpleNamespace(log=lambda values, step: told.append((step, values["loss"])), finish=lambda: told.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: told.append(options["project"]) or fake))
    train(config(tmp_path, steps=2, wandb="clips"), endless)
    assert told == ["clips", *((line["step"], line["loss"]) for line in log(tmp_path)), "finish"]


def test_the_data_is_waited_for(tmp_path, monkeypatch):
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    def slow(step: int) -> Iterator[Batch]:
        for batch in endless(step):
            clock[0] += 8.0
            yield batch

    monkeypatch.setattr("clipfast.train.loop.perf_counter", tick)
    train(config(tmp_path / "slow", steps=3), slow)
    train(config(tmp_path / "fast", steps=3), lambda step: repeat(pairs(0)))
    assert [line["data_wait"] for line in log(tmp_path / "slow")] == [0.9] * 3  # of ten ticks the update takes one
    assert [line["data_wait"] for line in log(tmp_path / "fast")] == [0.5] * 3


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc")
def test_training_on_a_cpu_keeps_its_memory(tmp_path):
    """What a step frees is there for the next one: 64 MB would be mapped and zeroed anew each time, in 16,384 pages."""
    # In a process of its own: what other tests have done to a heap is not of a training.
    faults = """
import resource, sys
from pathlib import Path
import torch
from clipfast.train import train
from tests.train.test_train import config, endless

train(config(Path(sys.argv[1]), steps=1), endless)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(1 << 24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", faults, str(tmp_path)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert int(told.stdout.split()[-1]) < 5 * 16_384  # it may first settle in another place


def test_bytes_are_normalised_on_the_device():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    images = torch.stack([Preprocess(32)(image.permute(1, 2, 0).numpy()) for image in pixels])
    towers, batch = Towers(tiny()), pairs(0, 2)
    for given in (pixels, images):
        image, _ = towers(given, batch.tokens, batch.lengths)
        torch.testing.assert_close(image, towers.model.encode_image(images))


def test_a_checkpoints_own_mean_and_deviation(tmp_path: Path) -> None:
    """As of LAION's ViT-L/14; the run keeps them, and so does what is loaded from it."""
    model = tiny()
    model.visual.preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3}
    batch = pairs(4)
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    image, _ = Towers(model)(raw, batch.tokens, batch.lengths)
    torch.testing.assert_close(image, model.encode_image((raw / 255 - 0.5) / 0.25))
    train(config(tmp_path / "run", steps=1), endless, model)
    for path in (tmp_path / "run" / "model.pt", tmp_path / "run" / "checkpoints" / "step_00000001"):
        assert load(path, "cpu")[1] == Preprocess(32, mean=(0.5,) * 3, std=(0.25,) * 3)


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------


def spoilt(*steps: int, by: float = math.nan):
    """The batches, those of some steps with one value in them that is no number."""

    def batches(start: int) -> Iterator[Batch]:
        for step, batch in enumerate(endless(start), start + 1):
            batch = batch._replace(keys=[f"{step}/{row}" for row in range(8)])
            if step in steps:
                batch.pixels[3, 0, 0, 0] = by
            yield batch

    return batches


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_a_loss_that_stays_not_finite_stops_the_run(tmp_path, by):
    model = tiny()
    with pytest.raises(FloatingPointError, match="loss nan, gradient norm nan at step 5, 2 in a row"):
        train(config(tmp_path, checkpoint_every=3, not_finite_steps=2), spoilt(4, 5, by=by), model)
    saved = checkpointed(tmp_path, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"]), name  # no update since
    lines = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5] and lines[0]["loss"] == "nan"
    assert lines[1]["keys_by_rank"] == [[f"5/{row}" for row in range(8)]]


def test_a_bad_step_now_and_then_is_skipped(tmp_path, caplog):
    done = train(config(tmp_path, not_finite_steps=2, micro_batch=3), spoilt(2, 4, 7))
    assert done.steps == 12 and caplog.text.count("no update") == 3
    assert all(parameter.isfinite().all() for parameter in done.model.parameters())


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path):
    train(config(tmp_path, steps=2), endless)
    with pytest.raises(FileExistsError, match="expected no earlier run"):
        train(config(tmp_path, steps=2), endless)
    with pytest.raises(ValueError, match="lr 0.001 -> 0.002, seed 0 -> 1"):
        train(config(tmp_path, steps=3, resume="auto", lr=2e-3, seed=1), endless)


def test_two_runs_in_one_folder_do_not_mix(tmp_path):
    def on_step(step, model, metrics):
        if step == 2:
            before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
            with pytest.raises(BlockingIOError, match=f"alone, got .* process {os.getpid()} on .* since .*; wait .* or choose"):
                train(config(tmp_path, resume="auto"), endless)
            assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    train(config(tmp_path, checkpoint_every=99), endless, on_step=on_step)
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 13))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "config.json", "log.jsonl", "model.pt"]


def test_a_run_does_not_mix_with_later_checkpoints_or_those_of_another(tmp_path):
    for name in ("run", "other"):
        train(config(tmp_path / name, checkpoint_every=4), endless)
    for path in ("run/checkpoints/step_00000008", "other/checkpoints/step_00000012"):
        with pytest.raises(FileExistsError, match="expected no other checkpoints in .*run than those before .*step 12"):
            train(config(tmp_path / "run", steps=16, resume=str(tmp_path / path)), endless)
    assert steps(tmp_path / "run") == [8, 12]


def test_the_logs_of_a_run_end_where_it_goes_on(tmp_path):
    settings = config(tmp_path, checkpoint_every=4, val_every=3, not_finite_steps=2, resume="auto")
    with pytest.raises(FloatingPointError):
        train(settings, spoilt(3, 6, 7), validate=lambda model, job: {"top1": 0.0})
    for name in ("log", "eval", "not_finite"):
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write('{"step": 1, "lo\n{"step": 1')  # what a full disk and a kill leave
    train(settings, endless, validate=lambda model, job: {"top1": 1.0})
    found = {
        name: [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("log", "eval", "not_finite")
    }
    assert found == {"log": list(range(1, 13)), "eval": [3, 6, 9, 12], "not_finite": [3]}


def test_which_checkpoints_are_kept(tmp_path):
    train(config(tmp_path, checkpoint_every=1, keep_last=2, keep_every=5), endless)
    assert steps(tmp_path) == [5, 10, 11, 12]
    resumed = train(config(tmp_path / "other", steps=6, resume=str(tmp_path / "checkpoints" / "step_00000005")), endless)
    assert resumed.steps == 6 and steps(tmp_path / "other") == [6]


def test_a_damaged_checkpoint_does_not_outlive_newer_ones(tmp_path):
    train(config(tmp_path, checkpoint_every=4, keep_last=1, keep_every=4), endless)
    DAMAGE["cut"](tmp_path / "checkpoints" / "step_00000012")
    going_on = config(tmp_path, checkpoint_every=2, keep_last=1, keep_every=4, resume="auto")
    with pytest.raises(Interrupt):
        train(going_on, endless, on_step=stop_at(10))
    assert steps(tmp_path) == [4, 8, 10]


DAMAGE = {
    "cut": lambda path: os.truncate(path / "__0_0.distcp", 5000),
    "flipped": lambda path: (path / "__0_0.distcp").open("r+b").write(b"\xff"),
    "missing": lambda path: (path / ".metadata").unlink(),
    "no json": lambda path: (path / "about.json").write_text("{"),
    "not ours": lambda path: (path / "about.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog, how):
    straight = train(config(tmp_path / "straight"), endless)
    train(config(tmp_path / "run", checkpoint_every=4), endless)
    assert steps(tmp_path / "run") == [8, 12]
    DAMAGE[how](tmp_path / "run" / "checkpoints" / "step_00000012")
    resumed = train(config(tmp_path / "run", resume="auto"), endless)
    assert "skipped a damaged checkpoint" in caplog.text and "step_00000012: expected a whole checkpoint" in caplog.text
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name
    distributed.verify(tmp_path / "run" / "checkpoints" / "step_00000012")  # written anew
    for step in steps(tmp_path / "run"):
        DAMAGE[how](tmp_path / "run" / "checkpoints" / f"step_{step:08}")
    with pytest.raises(ValueError, match="expected a whole checkpoint, got 2 damaged"):
        train(config(tmp_path / "run", resume="auto"), endless)


def test_a_checkpoint_of_another_architecture_lists_the_shapes(tmp_path):
    train(config(tmp_path, steps=1), endless)
    path = tmp_path / "checkpoints" / "step_00000001"
    engine = Engine(config(tmp_path), Job(0, 1, torch.device("cpu")), tiny(SIZES | {"vision_width": 128, "embed_dim": 32}))
    with pytest.raises(ValueError, match=r"visual.conv1.weight \(expected \[128, 3, 16, 16\], got \[64, 3, 16, 16\]\)"):
        checkpoint.load(distributed.Reader(path), engine.tensors({}))
    with pytest.raises(ValueError, match=r"architecture: .* visual.conv1.weight|model.visual.conv1.weight \(expected \[128"):
        train(config(tmp_path, model=SIZES | {"vision_width": 128}, resume="auto"), endless)
    with pytest.raises(ValueError, match=r"model .*'quick_gelu': False.* restore it"):  # no shape differs
        train(config(tmp_path, model=SIZES | {"quick_gelu": False}, resume="auto"), endless)
    with pytest.raises(ValueError, match=r"model.visual.transformer.resblocks.2.attn.in_proj_weight"):
        checkpoint.load(
            distributed.Reader(path), Engine(config(tmp_path), engine.job, tiny(SIZES | {"vision_layers": 3})).tensors({})
        )


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    train(config(tmp_path, steps=1), endless)
    path = tmp_path / "checkpoints" / "step_00000001"
    metadata = distributed.Reader(path).read_metadata()
    metadata.planner_data = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="holds builtins.print, which is no description of tensors"):
        distributed.Reader(path).read_metadata()
    assert "executed" not in capsys.readouterr().out


def limit_files(size: int) -> None:
    """No file may grow beyond so many bytes: what a full disk does, short of one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_training_goes_on(tmp_path, caplog):
    def on_step(step, model, metrics):
        while step == 5 and not (tmp_path / "run" / "checkpoints" / "step_00000003").exists():
            time.sleep(0.01)
        while step == 8 and "NOT SAVED" not in caplog.text:
            time.sleep(0.01)
        limit_files(20_000 if step in (5, 6, 7) else resource.RLIM_INFINITY)

    straight = train(config(tmp_path / "straight"), endless)
    try:
        done = train(config(tmp_path / "run", checkpoint_every=3, keep_last=9), endless, on_step=on_step)
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert steps(tmp_path / "run") == [3, 9, 12]
    assert "CHECKPOINT NOT SAVED at step_00000006" in caplog.text and "File too large" in caplog.text
    assert torch.equal(done.model.text_projection, straight.model.text_projection)
    distributed.verify(tmp_path / "run" / "checkpoints" / "step_00000003")

    try:
        with pytest.raises(OSError, match="CHECKPOINT NOT SAVED at step_00000012"):  # of the last one the run fails
            train(config(tmp_path / "end"), endless, on_step=lambda step, *_: limit_files(20_000))
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert not list((tmp_path / "end").rglob("*.part"))


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    try:
        done = train(config(tmp_path), endless, on_step=lambda step, *_: limit_files(10 if 3 <= step < 6 else 1 << 40))
    finally:
        limit_files(resource.RLIM_INFINITY)
    assert done.steps == 12 and [line["step"] for line in log(tmp_path)] == [1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert caplog.text.count("NO LOG from step 4 on") == 1 == caplog.text.count("NO LOG")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends_the_run(tmp_path, number):
    before = signal.getsignal(number)

    def on_step(step, model, metrics):
        if step == 4:
            os.kill(os.getpid(), number)

    done = train(config(tmp_path / "run"), endless, on_step=on_step)
    assert (done.steps, done.stopped) == (5, signal.Signals(number).name) and steps(tmp_path / "run") == [5]
    assert signal.getsignal(number) is before
    resumed, straight = train(config(tmp_path / "run", resume="auto"), endless), train(config(tmp_path / "straight"), endless)
    assert resumed.stopped == "" and torch.equal(resumed.model.text_projection, straight.model.text_projection)


def test_nothing_is_left_of_a_run_without_data(tmp_path):
    with pytest.raises(RuntimeError, match="ended before step 1"):
        train(config(tmp_path / "out"), lambda step: iter(()))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="ended before step 3"):
        train(config(tmp_path / "out"), lambda step: iter([pairs(0), pairs(1)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "expected an end of the training"),
        *(
            []
            if torch.cuda.is_available()
            else [({"device": "cuda"}, "expected a device of this machine, got cuda, .* take cpu")]
        ),
        ({"resume": "nowhere"}, "^nowhere: expected a whole checkpoint: .* take another"),
        ({"steps": -3}, r"expected steps in \[0, inf\), got -3"),
        ({"batch_size": 0}, r"expected batch_size in \[1, inf\), got 0"),
        ({"micro_batch": -2}, "expected micro_batch in"),
        ({"checkpoint_every": 0}, "expected checkpoint_every in"),
        ({"lr": math.nan}, "expected lr in"),
        ({"warmup": -1.0}, "expected warmup in"),
        ({"ema": 1.0}, r"expected ema in \[0, 1\), got 1.0"),
        ({"timeout": 0.0}, "expected timeout in"),
        ({"precision": "fp8"}, "expected precision auto, fp32, bf16 or fp16, got 'fp8'"),
        ({"loss": "cosine"}, "expected loss clip or siglip, got 'cosine'"),
        ({"lock_image": True, "lock_text": True}, "expected something to learn"),
        ({"patch_dropout": 1.0}, "expected patch_dropout in"),
        ({"model": RESNET, "patch_dropout": 0.5}, "expected a ViT for patch_dropout"),
        ({"wandb": "project"}, "expected the package wandb"),
        ({"optimizer": "lamb"}, "expected NVIDIA's apex"),
        ({"epochs": 2.0}, "expected epoch_samples"),
        ({"steps": 0, "max_seconds": 5.0, "warmup": 100}, "expected warmup as a share"),
        ({"model": "ViT-B/33"}, "expected a model of RN50, .*ViT-B/32.*, got 'ViT-B/33'"),
        ({"model": {"embed_dim": 3}}, "missing a required argument: 'image_resolution'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError, ImportError), match=message):
        train(config(tmp_path / "out", **settings), endless)
    assert not (tmp_path / "out").exists()


def test_the_recipe_of_the_paper():
    vit = paper("ViT-B/16")
    assert (vit.batch_size, vit.total_steps, vit.warmup, vit.lr, vit.weight_decay) == (32768, 390_625, 2000, 5e-4, 0.2)
    assert (vit.beta1, vit.beta2, vit.eps) == (0.9, 0.98, 1e-6)
    resnet = paper("RN50x64", seed=7)
    assert (resnet.lr, resnet.beta2, resnet.eps, resnet.seed) == (3.6e-4, 0.999, 1e-8, 7)
    assert paper("ViT-L/14@336px").total_steps == 12_208  # 4e8 / 32,768 = 12,207.03, rounded up
    assert {name: paper(name).lr for name in MODELS} == {
        "RN50": 5e-4, "RN101": 5e-4, "RN50x4": 5e-4, "RN50x16": 4e-4, "RN50x64": 3.6e-4,
        "ViT-B/32": 5e-4, "ViT-B/16": 5e-4, "ViT-L/14": 4e-4, "ViT-L/14@336px": 2e-5,
    }  # fmt: skip

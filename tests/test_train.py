"""Training: the optimiser, the schedule, large batches in small memory, and runs that resume bit for bit."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.data import Batch
from clipfast.model import CLIP, MODELS
from clipfast.train import TrainConfig, adamw, backward, learning_rate, paper, split, train
from clipfast.weights import load

SIZES = {
    "embed_dim": 32, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16,
    "context_length": 12, "vocab_size": 64, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2,
}  # fmt: skip
RESNET = SIZES | {"vision_layers": (1, 1, 1, 1), "vision_width": 16, "vision_patch_size": None}


def pairs(step: int, rows: int = 8, labels: bool = False) -> Batch:
    """Learnable pairs: the first word of the caption is the colour of the image."""
    random = torch.Generator().manual_seed(step)
    word = torch.randint(1, 9, (rows,), generator=random)
    lengths = torch.randint(3, 12, (rows,), generator=random)
    tokens = torch.randint(9, 60, (rows, 12), generator=random)
    tokens[:, 0], tokens[:, 1] = 61, word
    tokens[torch.arange(12) >= lengths[:, None] - 1] = 0
    tokens[torch.arange(rows), lengths - 1] = 63
    pixels = torch.randn(rows, 3, 32, 32, generator=random) * 0.1 + (word.float() - 4).view(-1, 1, 1, 1)
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
@pytest.mark.parametrize("micro_batch", [0, 8, 3, 1])
def test_the_gradient_of_parts_is_that_of_the_whole(micro_batch, labels):
    model, batch = tiny().double(), pairs(0, labels=labels)  # in fp64, where nothing but a wrong sum makes a difference
    truth = deepcopy(model)
    features = truth.encode_image(batch.pixels), truth.encode_text(batch.tokens, lengths=batch.lengths)
    expected = dense_loss(*features, truth.logit_scale.exp(), batch.labels)
    expected.backward()

    parts = split(batch, micro_batch)
    assert len(parts) == {0: 1, 8: 1, 3: 3, 1: 8}[micro_batch]
    assert backward(model, parts) == pytest.approx(expected.item(), rel=1e-12)
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
    backward(model, split(batch, 4))  # type: ignore[arg-type]
    first, second = model.seen[:2], model.seen[2:]
    assert len(second) == 2 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)
    for part in split(batch, 4):
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
    backward(truth, [pairs(0)])
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
    assert lines[-1].keys() == {"step", "loss", "scale", "lr", "gradient_norm", "samples_per_second", "seconds"}


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
    part = config(tmp_path / "part", **options, checkpoint_every=5, resume=True)
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
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"] for name in ("part", "straight")
    )
    for number, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][number][key]) for key, value in state.items())


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
    resumed = train(config(tmp_path / "part", micro_batch=3, resume=True), endless, fresh())
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[name]), name


def test_a_finished_run_resumes_to_nothing(tmp_path):
    train(config(tmp_path, steps=3), endless)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = train(config(tmp_path, steps=3, resume=True), endless, on_step=stop_at(4))
    assert again.steps == 3 and (tmp_path / "checkpoint.pt").read_bytes() == before and len(log(tmp_path)) == 3


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
    monkeypatch.setattr("clipfast.train.perf_counter", lambda: clock[0])

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


@pytest.mark.parametrize("micro_batch", [0, 24])
@pytest.mark.parametrize("sizes", [SIZES, RESNET], ids=["vit", "resnet"])
def test_the_bf16_gradient_points_where_the_fp32_one_does(sizes, micro_batch):
    exact, half = tiny(sizes), tiny(sizes)
    parts = split(pairs(0, rows=48), micro_batch)
    assert backward(half, parts, bf16=True) == pytest.approx(backward(exact, parts), rel=5e-3)
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
    assert "100%" in bar and "loss" in bar and "scale" in bar and "lr" in bar and "samples/s" in bar


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    def batches(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(endless(step), step + 1):
            yield batch._replace(pixels=batch.pixels * bad) if number == 4 else batch

    model = tiny()
    with pytest.raises(FloatingPointError, match="at step 4"):
        train(config(tmp_path, checkpoint_every=2), batches, model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path):
    train(config(tmp_path, steps=2), endless)
    with pytest.raises(FileExistsError, match="expected no earlier run"):
        train(config(tmp_path, steps=2), endless)
    with pytest.raises(ValueError, match="lr 0.001 -> 0.002, seed 0 -> 1"):
        train(config(tmp_path, steps=3, resume=True, lr=2e-3, seed=1), endless)


def test_a_cut_checkpoint_is_named(tmp_path):
    train(config(tmp_path, steps=1), endless)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"expected a whole checkpoint, cannot read {path}"):
        train(config(tmp_path, resume=True), endless)


def test_a_failing_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save = torch.save

    def full(state, file):
        if state.get("step") == 4:
            file.write(b"half")
            raise OSError("no space left on device")
        save(state, file)

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="no space"):
        train(config(tmp_path, checkpoint_every=2), endless)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob("*.part"))


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
        ({"precision": "fp8"}, "expected precision fp32, bf16 or auto, got 'fp8'"),
        ({"epochs": 2.0}, "expected epoch_samples"),
        ({"steps": 0, "max_seconds": 5.0, "warmup": 100}, "expected warmup as a share"),
        ({"model": "ViT-B/33"}, "expected a model of RN50, .*ViT-B/32.*, got 'ViT-B/33'"),
        ({"model": {"embed_dim": 3}}, "missing a required argument: 'image_resolution'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
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

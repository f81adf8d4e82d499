"""The training loop: a config, the recipe of the paper, and runs that resume bit for bit on any number of ranks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from inspect import signature
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch

from .checkpoint import Checkpoints, Reader, check_shapes, load, read_about
from .data import Batch
from .engine import Engine, learning_rate
from .files import output_folder, replacing
from .job import Job, joined, stop_signals
from .model import CLIP, MODELS
from .watch import Watch
from .weights import load as load_model

log = logging.getLogger(__name__)
CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
    "loss": ("clip", "siglip"),
    "optimizer": ("adamw", "lamb"),
}
RANGES: dict[str, tuple[float, float]] = {  # at least, below
    **dict.fromkeys(("batch_size", "checkpoint_every", "keep_last", "not_finite_steps", "timeout"), (1, math.inf)),
    **dict.fromkeys(
        ("steps", "epochs", "epoch_samples", "max_seconds", "micro_batch", "keep_every", "val_every"), (0, math.inf)
    ),
    **dict.fromkeys(("lr", "eps", "weight_decay", "warmup", "grad_clip"), (0, math.inf)),
    **dict.fromkeys(("beta1", "beta2", "ema", "patch_dropout"), (0, 1)),
}


@dataclass
class TrainConfig:
    """What one training run is. The run ends at `steps`, `epochs` or `max_seconds`, whichever comes first."""

    model: Annotated[str | dict[str, Any], "a published size, or the arguments of clipfast.CLIP (JSON)"] = "ViT-B/32"
    pretrained: Annotated[bool, "start from weights: those of `model`, a published name, a file or hf-hub:..."] = False
    out: Annotated[str, "folder of checkpoints, weights and logs"] = "run"
    steps: Annotated[int, "updates; 0: no limit"] = 0
    epochs: Annotated[float, "passes over epoch_samples; 0: no limit"] = 0.0
    epoch_samples: Annotated[int, "samples in one epoch"] = 0
    max_seconds: Annotated[
        float, "time for training; 0: no limit. Then the schedule follows the clock: not bit-reproducible"
    ] = 0.0
    loss: Annotated[str, "clip (softmax) or siglip (sigmoid)"] = "clip"
    batch_size: Annotated[int, "pairs that are contrasted with each other, over all ranks"] = 256
    micro_batch: Annotated[int, "pairs in memory of a rank at a time, same result; 0: all of them"] = 0
    optimizer: Annotated[str, "adamw, or lamb (needs NVIDIA's apex)"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 5e-4
    beta1: Annotated[float, "Adam's decay of the mean"] = 0.9
    beta2: Annotated[float, "Adam's decay of the square"] = 0.98
    eps: Annotated[float, "Adam's epsilon"] = 1e-6
    weight_decay: Annotated[float, "decoupled decay of all weights but gains, biases and the scale"] = 0.2
    warmup: Annotated[float, "linear warm-up: steps, or below 1 a share of the run"] = 0.1
    grad_clip: Annotated[float, "largest norm of the gradient; 0: any"] = 0.0
    ema: Annotated[float, "decay of the averaged weights, e.g. 0.999; 0: none"] = 0.0
    patch_dropout: Annotated[float, "share of the patches that the image tower does not see in training"] = 0.0
    lock_image: Annotated[bool, "leave the image tower as it is"] = False
    lock_text: Annotated[bool, "leave the text tower as it is"] = False
    precision: Annotated[str, "fp32, bf16, fp16 or auto (bf16 on a GPU that has it, else fp32)"] = "auto"
    parallel: Annotated[str, "on many ranks: ddp (a copy each) or fsdp (weights and optimiser in parts)"] = "ddp"
    gradient_checkpointing: Annotated[bool, "run transformer blocks again in the backward pass: less memory, more time"] = False
    compile: Annotated[bool, "torch.compile the transformers' blocks"] = False
    device: Annotated[str, "cpu, cuda, ... or auto"] = "auto"
    timeout: Annotated[float, "seconds after which a rank that does not answer ends the job"] = 600.0
    seed: Annotated[int, "of the initial weights and the order of the data"] = 0
    checkpoint_every: Annotated[int, "updates between checkpoints; there is always one at the end"] = 1000
    keep_last: Annotated[int, "newest checkpoints that are kept"] = 2
    keep_every: Annotated[int, "keep those of every so many updates as well; 0: none"] = 0
    resume: Annotated[str, "auto: go on from the newest whole checkpoint in `out`, if there is one; or the path of one"] = ""
    val_every: Annotated[int, "updates between validations; 0: none"] = 0
    not_finite_steps: Annotated[int, "steps in a row whose loss or gradient is not finite, skipped, before the run stops"] = 3
    tensorboard: Annotated[bool, "write TensorBoard scalars beside log.jsonl"] = True
    wandb: Annotated[str, "project of Weights & Biases to log to as well"] = ""
    progress: Annotated[bool, "show a progress bar"] = True
    profile: Annotated[bool, "write a trace of a few steps, for chrome://tracing or Perfetto"] = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} {', '.join(choices[:-1])} or {choices[-1]}, got {getattr(self, name)!r}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) < high:
                raise ValueError(f"expected {name} in [{low}, {high}), got {getattr(self, name)}")
        if self.epochs and not self.epoch_samples:
            raise ValueError("expected epoch_samples beside epochs: the number of samples in a shard is not known beforehand")
        if not (self.steps or self.epochs or self.max_seconds):
            raise ValueError("expected an end of the training: give steps, epochs or max_seconds")
        if self.warmup >= 1 and self.total_steps == math.inf:
            raise ValueError(f"expected warmup as a share of the run (below 1) without steps or epochs, got {self.warmup}")
        if self.lock_image and self.lock_text:
            raise ValueError("expected something to learn, got both lock_image and lock_text; leave one out")

    @property
    def total_steps(self) -> float:
        """Updates after which the run ends; infinite when only the time is limited."""
        by_epochs = math.ceil(self.epochs * self.epoch_samples / self.batch_size)
        return min(self.steps or math.inf, by_epochs or math.inf)


# What may differ between a run and its resumption: when it ends, and what does not touch the weights beyond rounding.
ENDS = {"steps", "epochs", "epoch_samples", "max_seconds"}
FREE_ON_RESUME = ENDS | {
    *("out", "device", "timeout", "checkpoint_every", "keep_last", "keep_every", "resume", "val_every", "not_finite_steps"),
    *("tensorboard", "wandb", "progress", "profile", "micro_batch", "parallel", "gradient_checkpointing", "compile"),
}


def paper(model: str = "ViT-B/32", **changes: Any) -> TrainConfig:
    """The recipe of "Learning Transferable Visual Models From Natural Language Supervision" (2021), tables 18 to 20.

    400 million pairs in batches of 32,768: 32 · 4e8 / 32,768 = 390,625 updates. ViT-L/14@336px is one more epoch of a trained
    ViT-L/14, to be passed to `train` as `model`.
    """
    rates = {"RN50x16": 4e-4, "RN50x64": 3.6e-4, "ViT-L/14": 4e-4, "ViT-L/14@336px": 2e-5}
    resnet = not isinstance(sizes(model)["vision_layers"], int)
    epochs = 1 if model == "ViT-L/14@336px" else 32
    run = {"epochs": epochs, "epoch_samples": 400_000_000, "batch_size": 32_768, "micro_batch": 256}
    adam = {"lr": rates.get(model, 5e-4), "beta2": 0.999 if resnet else 0.98, "eps": 1e-8 if resnet else 1e-6, "warmup": 2000}
    return TrainConfig(**{"model": model} | run | adam | changes)


def sizes(model: str | dict[str, Any]) -> dict[str, Any]:
    """CLIP's constructor arguments for the name of a published size, or the arguments themselves."""
    if isinstance(model, str) and model not in MODELS:
        raise ValueError(f"expected a model of {', '.join(MODELS)}, or a dict of sizes, got {model!r}")
    arguments = MODELS[model] if isinstance(model, str) else model
    signature(CLIP).bind(**arguments)  # TypeError names what is missing or unknown
    return arguments


Batches = Callable[[int], Iterator[Batch]]  # batches(step): endless, this rank's from that step on, so that runs can resume


class Trained(NamedTuple):
    model: CLIP
    ema: CLIP | None  # the averaged weights, when config.ema is set
    steps: int
    seconds: float  # spent on updates and waiting for data, without on_step, validation and checkpoints
    stopped: str = ""  # the signal that ended the run before its time


def train(
    config: TrainConfig,
    batches: Batches,
    model: CLIP | None = None,
    on_step: Callable[[int, CLIP, dict[str, float]], None] | None = None,
    validate: Callable[[CLIP, Job], dict[str, float]] | None = None,
) -> Trained:
    """Train `model` (new by default), alone or as one of torchrun's ranks; every rank calls this.

    Leaves in `out`: checkpoints/, config.json, log.jsonl and TensorBoard events, and at the end model.pt for `clipfast.load`.
    `on_step(step, model, metrics)` is called after each update on every rank, `validate(model, job)` every `val_every` updates
    with the (averaged) weights; their time does not count. SIGTERM and SIGUSR1 save and end the run in good order.

    Raises FloatingPointError when the loss stays not finite, FileExistsError when `out` holds a run that is not to be resumed,
    RuntimeError naming the ranks when some no longer answer, OSError when the last checkpoint could not be written.
    """
    with joined(config.device, config.timeout) as job, output_folder(config.out) as out, stop_signals() as stop:
        watch = Watch(out, asdict(config), job.rank, resumed=bool(config.resume), progress=config.progress,
                      tensorboard=config.tensorboard, wandb=config.wandb, profiled=config.profile)  # fmt: skip
        checkpoints = Checkpoints(out / "checkpoints", job, config.keep_last, config.keep_every)
        with closing(watch), closing(checkpoints):
            engine = Engine(config, job, model or new_model(config))
            order = getattr(batches, "order", {})
            step, seconds = first, _ = resumed(config, checkpoints, engine, order)

            def share(step: float) -> float:
                return max(step / config.total_steps, seconds / config.max_seconds if config.max_seconds else 0.0)

            bad, ended, stream, clock = 0, share(step) >= 1, batches(step), perf_counter()
            while not ended:
                batch = next(stream, None)
                waited = perf_counter() - clock
                if batch is None:
                    raise RuntimeError(f"expected endless batches, but they ended before step {step + 1}; repeat the data")
                rate = learning_rate(config, min(1.0, share(step + 0.5)))  # mid-step: neither first nor last rate is 0
                metrics = engine.update(batch, rate)

                elapsed, step = perf_counter() - clock, step + 1
                seconds, stopped = job.most(seconds + elapsed, bool(stop.name))  # all ranks end at the same step
                ended = bool(stopped) or share(step) >= 1
                metrics |= {"samples_per_second": config.batch_size / elapsed, "seconds": seconds}
                metrics |= {"data_wait": waited / elapsed, "ranks": job.world}
                watch.record(step, min(1.0, share(step)), metrics)
                bad = 0 if engine.updated else bad + 1
                if bad:  # the weights are untouched: the checkpoint and the model in memory stay good
                    told = f"loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} at step {step}"
                    watch.not_finite(step, metrics["loss"], metrics["gradient_norm"], job.gather(batch.keys))
                    log.warning("no update: %s; its samples are in not_finite.jsonl", told)
                    if bad >= config.not_finite_steps:
                        raise FloatingPointError(f"{told}, {bad} in a row; lower lr or see the samples in not_finite.jsonl")
                if step % config.checkpoint_every == 0 or ended:
                    tensors, about = engine.state(seconds)
                    checkpoints.save(step, tensors, about | {"order": order})
                if validate and config.val_every and step % config.val_every == 0:
                    watch.evaluated(step, validate(engine.snapshot(), job))
                if on_step:
                    on_step(step, engine.model, metrics)
                clock = perf_counter()
            checkpoints.wait()
            job.gather(checkpoints.failed)  # raises on all ranks what one of them could not write
        whole, average = engine.snapshot(averaged=False), engine.snapshot() if config.ema else None
        if job.rank == 0 and step > first:
            with replacing(out / "model.pt") as file:
                torch.save({"state_dict": (average or whole).state_dict(), "model_config": engine.model_config}, file)
        return Trained(whole if engine.sharded else engine.model, average, step, seconds, stop.name if step > first else "")


def new_model(config: TrainConfig) -> CLIP:
    """The model that a run starts from: of the configured sizes, its weights fixed by the seed, or `pretrained`."""
    if config.pretrained:
        if not isinstance(config.model, str):
            raise ValueError("expected the name or the file of weights as model beside pretrained, got sizes")
        return load_model(config.model, "cpu")[0].float()
    torch.manual_seed(config.seed)
    model = CLIP(**sizes(config.model))
    if config.loss == "siglip":
        torch.nn.init.constant_(model.logit_scale, math.log(10))  # Zhai et al. 2023, with a bias of -10
    return model


def resumed(config: TrainConfig, checkpoints: Checkpoints, engine: Engine, order: dict[str, Any]) -> tuple[int, float]:
    """Steps and seconds already done, the state that belongs to them loaded. Nothing is written.

    order: what the sequence of the batches depends on; a warning tells where the checkpoint's was another.
    """
    if not config.resume and checkpoints.steps():
        raise FileExistsError(f"expected no earlier run in {config.out}; resume it (auto), or choose another `out`")
    path = checkpoints.choose(config.resume)
    if path is None:
        return 0, 0.0
    about = read_about(path)
    own = path.resolve().parent == checkpoints.folder.resolve()
    if config.resume != "auto" and (others := [step for step in checkpoints.steps() if step > about["step"] or not own]):
        told = f"expected no other checkpoints in {config.out} than those before {path}, got one of step {others[-1]}"
        raise FileExistsError(f"{told}; go on from the newest (auto), or choose another `out`")
    tensors = engine.tensors(Reader(path).shapes())
    now, then = json.loads(json.dumps(asdict(config))), about["config"]
    if changed := [name for name in now if name not in FREE_ON_RESUME and now[name] != then.get(name)]:
        if "model" in changed:
            check_shapes(path, tensors)
        differ = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in changed)
        raise ValueError(f"expected the config of {path}, but {differ}; restore it, or choose another `out`")
    before = about.get("order") or order  # of our own batches alone
    if other := ", ".join(f"{name} {before.get(name)} -> {now}" for name, now in order.items() if now != before.get(name)):
        log.warning("the batches go on in another order than before %s, some come twice or not: %s", path, other)
    load(path, tensors)
    engine.loaded(tensors, about)
    return about["step"], about["seconds"]

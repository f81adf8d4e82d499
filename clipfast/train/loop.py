"""The training loop: runs that resume bit for bit on any number of ranks."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast.data import Batch
from clipfast.files import first_line, locked, output_folder, replacing
from clipfast.model import CLIP
from clipfast.train.checkpoint import Checkpoints, check_shapes, load
from clipfast.train.config import FREE_ON_RESUME, TrainConfig, arguments_for, sizes
from clipfast.train.engine import Engine, learning_rate
from clipfast.train.job import Job, joined, stop_signals
from clipfast.train.watch import Watch
from clipfast.weights import load as load_model
from clipfast.weights.distributed import Reader, read_about
from clipfast.weights.files import read as read_file

log = logging.getLogger(__name__)
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
    BlockingIOError when another process is at work in it,
    RuntimeError naming the ranks when some no longer answer, OSError when the last checkpoint could not be written.
    """
    place = joined(config.device, config.timeout)
    with place as job, output_folder(config.out) as out, alone_in(out, job), stop_signals() as stop:
        watch = Watch(out, asdict(config), job.rank, resumed=bool(config.resume), progress=config.progress,
                      tensorboard=config.tensorboard, wandb=config.wandb, profiled=config.profile)  # fmt: skip
        checkpoints = Checkpoints(out / "checkpoints", job, config.keep_last, config.keep_every)
        with closing(watch), closing(checkpoints):
            engine = Engine(config, job, model or new_model(config))
            order = getattr(batches, "order", {})
            step, seconds = first, _ = resumed(config, checkpoints, engine, order)
            told = engine.choose()
            watch.computes(engine.precision, told)
            if job.rank == 0:
                watch.tidy()
                checkpoints.tidy(first)

            def share(step: float) -> float:
                return max(step / config.total_steps, seconds / config.max_seconds if config.max_seconds else 0.0)

            def evaluate(step: int) -> None:
                if validate and config.val_every and step % config.val_every == 0:
                    watch.evaluated(step, validate(engine.snapshot(), job))

            if first and not job.share(watch.has_evaluated(first)):  # killed between that checkpoint and its validation
                evaluate(first)
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
                evaluate(step)
                if on_step:
                    on_step(step, engine.model, metrics)
                clock = perf_counter()
            if not watch.settings.exists():  # a run that was finished before
                watch.open(step + 1)
            checkpoints.wait()
            job.gather(checkpoints.failed)  # raises on all ranks what one of them could not write
        whole, average = engine.snapshot(averaged=False), engine.snapshot() if config.ema else None
        if job.rank == 0:
            result = {"state_dict": (average or whole).state_dict(), "model_config": engine.model_config}
            if step > first or not holds(out / "model.pt", result):  # killed before it was written
                with replacing(out / "model.pt") as file:
                    torch.save(result, file)
        return Trained(whole if engine.sharded else engine.model, average, step, seconds, stop.name if step > first else "")


@contextmanager
def alone_in(out: Path, job: Job) -> Iterator[None]:
    """`out` for this job alone; where another has it, BlockingIOError on rank 0 and ValueError on the others tell who."""
    with ExitStack() as stack:
        refusal = None
        if job.rank == 0:
            try:
                stack.enter_context(locked(out))
            except (BlockingIOError, ValueError) as error:
                refusal = error
        job.gather(refusal)
        yield


def holds(path: Path, result: dict[str, Any]) -> bool:
    """Whether a file is there, is whole, and has this model to the last bit."""
    try:
        if not path.is_file():
            return False
        state, told = read_file(path)
    except (OSError, ValueError):
        return False
    expected = {name: tensor.cpu() for name, tensor in result["state_dict"].items()}
    return (told, state.keys()) == (result["model_config"], expected.keys()) and all(
        isinstance(state[name], Tensor) and state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
        for name, tensor in expected.items()
    )


def new_model(config: TrainConfig) -> CLIP:
    """The model that a run starts from: of the configured sizes, its weights fixed by the seed, or `pretrained`."""
    if config.pretrained:
        if not isinstance(config.model, str):
            raise ValueError("expected the name or the file of weights as model beside pretrained, got sizes")
        return load_model(config.model, "cpu")[0].float()
    torch.manual_seed(config.seed)
    model = CLIP(**arguments_for(config.objective, sizes(config.model)))
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
    found: tuple[int, float] | Exception
    try:
        found = taken_over(path, config, checkpoints, engine, order)
    except Exception as error:
        found = error
    checkpoints.job.gather(found if isinstance(found, Exception) else None)  # what one rank cannot read stops all
    assert not isinstance(found, Exception)
    return found


def taken_over(
    path: Path, config: TrainConfig, checkpoints: Checkpoints, engine: Engine, order: dict[str, Any]
) -> tuple[int, float]:
    """Steps and seconds of a checkpoint that this run may go on from; its state is in `engine`."""
    about, reader = read_about(path), Reader(path)
    own = path.resolve().parent == checkpoints.folder.resolve()
    if config.resume != "auto" and (others := [step for step in checkpoints.steps() if step > about["step"] or not own]):
        told = f"expected no other checkpoints in {config.out} than those before {path}, got one of step {others[-1]}"
        raise FileExistsError(f"{told}; go on from the newest (auto), or choose another `out`")
    tensors = engine.tensors(reader.shapes())
    now, then = json.loads(json.dumps(asdict(config))), {"objective": "contrastive"} | about["config"]
    if changed := [name for name in now if name not in FREE_ON_RESUME and now[name] != then.get(name)]:
        if "model" in changed:
            check_shapes(reader, tensors)
        differ = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in changed)
        raise ValueError(f"expected the config of {path}, but {differ}; restore it, or choose another `out`")
    before = about.get("order") or order  # of our own batches alone
    if other := ", ".join(f"{name} {before.get(name)} -> {now}" for name, now in order.items() if now != before.get(name)):
        log.warning("the batches go on in another order than before %s, some come twice or not: %s", path, other)
    load(reader, tensors)
    try:
        engine.loaded(tensors, about)
    except RuntimeError as error:  # torch's, of random numbers
        told = f"{path}: expected the state of a run, got {first_line(error)}"
        raise ValueError(f"{told}; take another checkpoint, or remove this one") from error
    return about["step"], about["seconds"]

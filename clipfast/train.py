"""The training loop: a config, the update step top to bottom, checkpoints that resume bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .data import Batch, output_folder, replacing
from .loss import clip_loss
from .model import CLIP, MODELS

MAX_LOG_SCALE = math.log(100)  # the paper clips the temperature so that logits are never scaled by more than 100


@dataclass
class TrainConfig:
    """What one training run is. The run ends at `steps`, `epochs` or `max_seconds`, whichever comes first."""

    model: Annotated[str | dict[str, Any], "a published size, or the arguments of clipfast.CLIP (JSON)"] = "ViT-B/32"
    out: Annotated[str, "folder of checkpoint, weights and logs"] = "run"
    steps: Annotated[int, "updates; 0: no limit"] = 0
    epochs: Annotated[float, "passes over epoch_samples; 0: no limit"] = 0.0
    epoch_samples: Annotated[int, "samples in one epoch"] = 0
    max_seconds: Annotated[
        float, "time for training; 0: no limit. Then the schedule follows the clock: not bit-reproducible"
    ] = 0.0
    batch_size: Annotated[int, "pairs that are contrasted with each other"] = 256
    micro_batch: Annotated[int, "pairs in memory at a time, same result; 0: all of them"] = 0
    lr: Annotated[float, "peak learning rate"] = 5e-4
    beta1: Annotated[float, "Adam's decay of the mean"] = 0.9
    beta2: Annotated[float, "Adam's decay of the square"] = 0.98
    eps: Annotated[float, "Adam's epsilon"] = 1e-6
    weight_decay: Annotated[float, "decoupled decay of all weights but gains, biases and the scale"] = 0.2
    warmup: Annotated[float, "linear warm-up: steps, or below 1 a share of the run"] = 0.1
    grad_clip: Annotated[float, "largest norm of the gradient; 0: any"] = 0.0
    ema: Annotated[float, "decay of the averaged weights, e.g. 0.999; 0: none"] = 0.0
    precision: Annotated[str, "fp32, bf16 or auto (bf16 on a GPU that has it, else fp32)"] = "auto"
    device: Annotated[str, "cpu, cuda, ... or auto"] = "auto"
    seed: Annotated[int, "of the initial weights and the order of the data"] = 0
    checkpoint_every: Annotated[int, "updates between checkpoints; there is always one at the end"] = 1000
    resume: Annotated[bool, "go on from the checkpoint in `out` if there is one"] = False
    tensorboard: Annotated[bool, "write TensorBoard scalars beside log.jsonl"] = True
    progress: Annotated[bool, "show a progress bar"] = True

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "auto"):
            raise ValueError(f"expected precision fp32, bf16 or auto, got {self.precision!r}")
        if self.epochs and not self.epoch_samples:
            raise ValueError("expected epoch_samples beside epochs: the number of samples in a shard is not known beforehand")
        if not (self.steps or self.epochs or self.max_seconds):
            raise ValueError("expected an end of the training: give steps, epochs or max_seconds")
        if self.warmup >= 1 and self.total_steps == math.inf:
            raise ValueError(f"expected warmup as a share of the run (below 1) without steps or epochs, got {self.warmup}")

    @property
    def total_steps(self) -> float:
        """Updates after which the run ends; infinite when only the time is limited."""
        by_epochs = math.ceil(self.epochs * self.epoch_samples / self.batch_size)
        return min(self.steps or math.inf, by_epochs or math.inf)


# What may differ between a run and its resumption: when it ends, and what does not touch the weights.
ENDS = {"steps", "epochs", "epoch_samples", "max_seconds"}
FREE_ON_RESUME = ENDS | {"out", "device", "checkpoint_every", "resume", "tensorboard", "progress"}


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


Batches = Callable[[int], Iterator[Batch]]  # batches(step): endless, from the batch of that step on, so that runs can resume


class Trained(NamedTuple):
    model: CLIP
    ema: CLIP | None  # the averaged weights, when config.ema is set
    steps: int
    seconds: float  # spent on updates and waiting for data, without on_step and checkpoints


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up, then half a cosine down to 0; `progress` is the share of the run in [0, 1]."""
    warm = config.warmup if config.warmup < 1 else config.warmup / config.total_steps
    if progress < warm or warm >= 1:
        return config.lr * progress / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


def adamw(model: CLIP, config: TrainConfig) -> AdamW:
    """AdamW that decays matrices, convolutions and embeddings; gains, biases and logit_scale have fewer than two dimensions."""
    learning = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in learning if p.ndim >= 2], [p for p in learning if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)


def train(
    config: TrainConfig,
    batches: Batches,
    model: CLIP | None = None,
    on_step: Callable[[int, CLIP, dict[str, float]], None] | None = None,
) -> Trained:
    """Train `model` (new by default); leaves checkpoint.pt, model.pt, config.json, log.jsonl and TensorBoard events in `out`.

    `on_step(step, model, metrics)` is called after each update; its time does not count. Raises FloatingPointError when the
    loss is not finite, and FileExistsError when `out` holds a run that is not to be resumed.
    """
    torch.manual_seed(config.seed)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    pays = device.type == "cuda" and torch.cuda.is_bf16_supported()  # on CPUs bf16 is slower than fp32 (measured)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and pays)
    model = (model or CLIP(**sizes(config.model))).to(device).train()
    optimizer = adamw(model, config)
    ema: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None

    def share(step: float) -> float:
        return max(step / config.total_steps, seconds / config.max_seconds if config.max_seconds else 0.0)

    with output_folder(config.out) as out, closing(_Run(config, out, model, optimizer, ema)) as run:
        step, seconds = run.start()
        stream, clock = batches(step), perf_counter()
        while share(step) < 1:
            batch = next(stream, None)
            if batch is None:
                raise RuntimeError(f"expected endless batches, but they ended before step {step + 1}; repeat the data")

            rate = learning_rate(config, min(1.0, share(step + 0.5)))  # mid-step: neither first nor last rate is 0
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            loss = backward(model, split(batch, config.micro_batch), bf16)
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
            if not math.isfinite(loss + norm):  # the weights are untouched: the checkpoint and the model in memory stay good
                raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {step + 1}; lower lr or see that batch")
            if config.grad_clip:
                clip_grads_with_norm_(model.parameters(), config.grad_clip, torch.tensor(norm))
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            if ema:
                ema.update_parameters(model)

            metrics = {"loss": loss, "scale": model.logit_scale.exp().item(), "lr": rate, "gradient_norm": norm}
            elapsed = perf_counter() - clock
            step, seconds = step + 1, seconds + elapsed
            metrics |= {"samples_per_second": len(batch.pixels) / elapsed, "seconds": seconds}
            run.record(step, min(1.0, share(step)), metrics)
            if step % config.checkpoint_every == 0 or share(step) >= 1:
                run.save(step, seconds)
            if on_step:
                on_step(step, model, metrics)
            clock = perf_counter()
    return Trained(model, ema.module if ema else None, step, seconds)


def backward(model: CLIP, parts: Sequence[Batch], bf16: bool = False) -> float:
    """Add the gradient of the contrastive loss of all parts together to the parameters; returns the loss.

    Several parts: the features of all without a graph, the loss and its gradient for the features (and, once, for
    logit_scale), then each part again with a graph to carry that gradient on. It is the exact gradient of one large batch in
    the memory of one part. Batch norm alone sees parts.
    """
    if len(parts) == 1:
        loss = _loss(model, *features(model, parts[0], bf16), parts)
        loss.backward()
        return loss.item()

    before = [buffer.clone() for buffer in model.buffers()]
    states, cached = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            cached.append(features(model, part, bf16))
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)  # batch norm counts every part once, in the pass with a graph
    whole: list[Any] = [torch.cat(side).requires_grad_() for side in zip(*cached, strict=True)]
    loss = _loss(model, whole[0], whole[1], parts)
    loss.backward()
    split_gradients = [side.grad.split([len(part.pixels) for part in parts]) for side in whole]
    for part, state, *gradients in zip(parts, states, *split_gradients, strict=True):
        _set_random_state(state)  # the same dropout as in the first pass
        outputs = zip(features(model, part, bf16), gradients, strict=True)
        learning = [(output, gradient) for output, gradient in outputs if output.requires_grad]  # a frozen tower has none
        torch.autograd.backward([output for output, _ in learning], [gradient for _, gradient in learning])
    return loss.item()


def features(model: CLIP, part: Batch, bf16: bool) -> tuple[Tensor, Tensor]:
    """Image and text features [B, D] each, not normalised.

    bf16: the towers see copies of their weights, all but the norms', and so run in bf16 from end to end; autocast would mix
    types in the residual stream. Gradients go through the copies to the fp32 weights.
    """
    towers, device = _Towers(model), model.logit_scale.device
    inputs = part.pixels.to(device, non_blocking=True), part.tokens.to(device, non_blocking=True), part.lengths
    if not bf16:
        return towers(*inputs)
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d)) for p in m.parameters()}
    return functional_call(towers, {k: p if id(p) in norms else p.bfloat16() for k, p in towers.named_parameters()}, inputs)


class _Towers(nn.Module):
    """Both towers as one call, which is what functional_call takes."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode_image(pixels), self.model.encode_text(tokens, lengths=lengths)


def _loss(model: CLIP, image: Tensor, text: Tensor, parts: Sequence[Batch]) -> Tensor:
    labels = [part.labels.to(image.device) for part in parts if part.labels is not None]
    return clip_loss(image, text, model.logit_scale.exp(), labels=torch.cat(labels) if labels else None, normalize=True)


def split(batch: Batch, size: int) -> list[Batch]:
    """Parts of at most `size` rows; 0: one part."""
    fields: Any = [repeat(None) if field is None else field.split(size or len(field)) for field in batch]
    return [Batch(*part) for part in zip(*fields, strict=False)]


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def _beyond_shapes(model: CLIP) -> dict[str, Any]:
    """Arguments of CLIP that the shapes of its weights do not tell."""
    visual: Any = model.visual
    first = visual.transformer.resblocks[0].attn if hasattr(visual, "transformer") else visual.attnpool
    text: Any = model.transformer.resblocks[0].attn
    heads = {"vision_heads": first.heads, "transformer_heads": text.heads}
    return {"quick_gelu": model.quick_gelu, "image_resolution": visual.input_resolution} | heads


class _Run:
    """The files of a run and its progress bar."""

    board: Any = None
    bar: Any = None

    def __init__(self, config: TrainConfig, out: Path, model: CLIP, optimizer: AdamW, ema: Any) -> None:
        self.config, self.out, self.model, self.optimizer, self.ema = config, out, model, optimizer, ema
        self.log, self.checkpoint = out / "log.jsonl", out / "checkpoint.pt"

    def start(self) -> tuple[int, float]:
        """Steps and seconds already done. Nothing is written before the first update."""
        if not self.checkpoint.exists():
            return 0, 0.0
        if not self.config.resume:
            raise FileExistsError(f"expected no earlier run in {self.out}; resume it, or choose another `out`")
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            now, then = asdict(self.config), state["config"]
        except Exception as error:  # a cut file, or one of other contents, fails in many ways
            raise ValueError(f"expected a whole checkpoint, cannot read {self.checkpoint}; remove it to start anew") from error
        if changed := [name for name in now if name not in FREE_ON_RESUME and now[name] != then.get(name)]:
            differ = ", ".join(f"{name} {then.get(name)} -> {now[name]}" for name in changed)
            raise ValueError(f"expected the config of {self.checkpoint}, but {differ}; restore it, or choose another `out`")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        _set_random_state(state["rng"])
        return state["step"], state["seconds"]

    def save(self, step: int, seconds: float) -> None:
        """checkpoint.pt: all that resuming needs. model.pt: the (averaged) weights alone, for clipfast.load."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"ema": self.ema.state_dict() if self.ema else None, "rng": _random_state()}
        state |= {"config": asdict(self.config), "step": step, "seconds": seconds}
        with replacing(self.checkpoint) as file:
            torch.save(state, file)
        model = self.ema.module if self.ema else self.model
        with replacing(self.out / "model.pt") as file:
            torch.save({"state_dict": model.state_dict(), "model_config": _beyond_shapes(model)}, file)

    def record(self, step: int, share: float, metrics: dict[str, float]) -> None:
        if self.bar is None:
            self._open(step)
        with open(self.log, "a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\n")
        for name, value in metrics.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        self.bar.n = share
        text = f"step {step} loss {metrics['loss']:.3f} scale {metrics['scale']:.1f} lr {metrics['lr']:.1e}"
        self.bar.set_postfix_str(f"{text} {metrics['samples_per_second']:.0f} samples/s")

    def _open(self, step: int) -> None:
        """Open the logs without what an interrupted run wrote from this step on."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() and self.config.resume else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        with replacing(self.log) as file:
            file.write("".join(kept).encode())
        with replacing(self.out / "config.json") as file:
            file.write(json.dumps(asdict(self.config), indent=2).encode())
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.board = SummaryWriter(str(self.out), purge_step=step)
        shown = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=1.0, bar_format=shown, mininterval=0.5, disable=not self.config.progress)

    def close(self) -> None:
        for opened in (self.bar, self.board):
            if opened is not None:
                opened.close()

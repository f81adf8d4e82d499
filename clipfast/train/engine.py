"""One update of the weights, top to bottom: micro-batches of a contrastive batch over all ranks, gradients, optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipfast.data import Batch
from clipfast.inputs import MEAN, STD
from clipfast.loss import clip_loss, siglip_loss
from clipfast.model import CLIP
from clipfast.model.predict import predicted, targets
from clipfast.train import precision
from clipfast.train.config import TrainConfig
from clipfast.train.job import Job, alike, exchange, full, local, peak_memory, spread
from clipfast.train.precision import products_alone
from clipfast.weights import beyond_shapes, from_tensors

MAX_LOG_SCALE = math.log(100)  # the paper clips the temperature so that logits are never scaled by more than 100
NORMS = nn.LayerNorm, nn.BatchNorm2d
LEARNS = {  # beginnings of the names that a predicting model learns: its loss reads nothing else
    "words": ("visual.", "words."),
    "caption": ("visual.", "prefix.", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
}


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up, then half a cosine down to 0; `progress` is the share of the run in [0, 1]."""
    warm = config.warmup if config.warmup < 1 else config.warmup / config.total_steps
    if progress < warm or warm >= 1:
        return config.lr * progress / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


def adamw(model: nn.Module, config: TrainConfig, *more: nn.Parameter) -> AdamW:
    """AdamW that decays matrices, convolutions and embeddings; gains, biases and logit_scale have fewer than two dimensions."""
    return AdamW(_groups(model, config, more), config.lr, (config.beta1, config.beta2), config.eps, fused=True)


def lamb(model: nn.Module, config: TrainConfig, *more: nn.Parameter) -> Optimizer:
    """LAMB (You et al. 2020), which is NVIDIA apex's."""
    try:
        from apex.optimizers import FusedLAMB
    except ImportError as error:
        raise ImportError(
            "optimizer lamb: expected NVIDIA's apex, which is not on PyPI (that name is another project): build it from "
            "github.com/NVIDIA/apex, or take adamw"
        ) from error
    clip = config.grad_clip or math.inf  # its own clipping, which would otherwise cut at 1
    options = {"betas": (config.beta1, config.beta2), "eps": config.eps, "max_grad_norm": clip}
    return FusedLAMB(_groups(model, config, more), config.lr, **options)


def _groups(model: nn.Module, config: TrainConfig, more: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    learning = [p for p in (*model.parameters(), *more) if p.requires_grad]
    # Scalars apart: FSDP leaves them whole, and no fused update takes whole tensors and parts together.
    kinds = [[p for p in learning if min(p.ndim, 2) == n] for n in (2, 1, 0)]
    return [{"params": ps, "weight_decay": config.weight_decay if ps[0].ndim >= 2 else 0.0} for ps in kinds if ps]


class Towers(nn.Module):
    """Both towers as one call, which is what DDP and FSDP wrap.

    dtype: bf16 or fp16 for towers that see copies of their weights, all but the norms', and so run in it from end to end;
        autocast would mix types in the residual stream. Gradients go through the copies to the fp32 weights. On a CPU bf16 is
        that of the blocks' products alone.
    """

    def __init__(self, model: CLIP, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        device = model.logit_scale.device
        told = getattr(getattr(model, "visual", None), "preprocess", None)  # somebody's own tower says nothing: OpenAI's
        numbers = (MEAN, STD) if told is None else (told.mean, told.std)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in numbers)

    def forward(self, pixels: Tensor, tokens: Tensor, lengths: Tensor) -> Any:
        """Image and text features [B, D] each, not normalised; of a model that predicts, its summed loss []."""
        if pixels.dtype == torch.uint8:  # normalised here: a quarter of the bytes on the way from the workers
            pixels = (pixels.float() / 255 - self.mean) / self.std
        image = self.model.encode_image(pixels)
        if predicts(self.model):
            return predicted(self.model, image, tokens, lengths)
        return image, self.model.encode_text(tokens, lengths=lengths)

    @contextmanager
    def lowered(self) -> Iterator[None]:
        """The copies in place of the weights, for a forward pass and its backward pass, which may run parts of it again."""
        if products_alone(self.dtype, self.mean.device):
            with precision.products_in(self.dtype, self.model):
                yield
            return
        places = [] if self.dtype is None else [
            (module._parameters, name, p)
            for module in self.model.modules() if not isinstance(module, NORMS)
            for name, p in module._parameters.items() if p is not None
        ]  # fmt: skip
        for parameters, name, p in places:
            parameters[name] = p.to(self.dtype)  # type: ignore[assignment]
        try:
            yield
        finally:
            for parameters, name, p in places:
                parameters[name] = p


def predicts(model: Any) -> str:
    """Words or caption, if the model predicts them; somebody's own model contrasts."""
    kind = getattr(model, "objective", "contrastive")
    return kind if kind in ("words", "caption") else ""


class Objective(nn.Module):
    """The contrastive loss of a batch over all ranks of `group`, with the scalars that it learns."""

    def __init__(self, model: CLIP, kind: str = "clip", group: Any = None) -> None:
        super().__init__()
        self.kind, self.group = kind, group
        self.scale = model.logit_scale  # its logarithm
        self.bias = nn.Parameter(torch.full_like(self.scale, -10.0)) if kind == "siglip" else None

    def forward(self, image: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        """Features [n, D] of this rank and labels [n] -> the loss [] of the whole batch."""
        options: Any = {"labels": labels, "normalize": True, "group": self.group}
        if self.bias is not None:
            return siglip_loss(image, text, self.scale.exp(), self.bias, **options)
        return clip_loss(image, text, self.scale.exp(), **options)


def backward(towers: Towers, objective: Objective, parts: Sequence[Batch], wrapped: Any = None, times: Any = 1.0) -> float:
    """Add `times` the gradient of the loss of all parts of all ranks to the parameters; returns the loss.

    Several parts: the features of all without a graph, the loss and its gradient for the features (and, once, for the
    scalars), then each part again with a graph to carry that gradient on. It is the exact gradient of one large batch in the
    memory of one part. Batch norm alone sees parts. `wrapped` is `towers` under DDP or FSDP.
    """
    run = wrapped if wrapped is not None else towers
    device = objective.scale.device
    if kind := predicts(towers.model):
        return predict_backward(towers, kind, parts, run, objective.group, times)
    labels = torch.cat([part.labels for part in parts]).to(device) if parts[0].labels is not None else None  # type: ignore[arg-type,misc]

    def features(part: Batch) -> tuple[Tensor, Tensor]:
        return run(part.pixels.to(device, non_blocking=True), part.tokens.to(device, non_blocking=True), part.lengths)

    if len(parts) == 1:
        exchange(run, True)
        with towers.lowered():
            loss = objective(*features(parts[0]), labels)
            (loss * times).backward()
        return loss.item()

    before = [buffer.clone() for buffer in towers.buffers()]
    states, cached = [], []
    exchange(run, False)
    with torch.no_grad(), towers.lowered():
        for part in parts:
            states.append(random_state(device))
            cached.append(features(part))
        for buffer, value in zip(towers.buffers(), before, strict=True):
            buffer.copy_(value)  # batch norm counts every part once, in the pass with a graph
    whole: list[Any] = [torch.cat(side).requires_grad_() for side in zip(*cached, strict=True)]
    loss = objective(whole[0], whole[1], labels)
    (loss * times).backward()
    gradients = [side.grad.split([len(part.pixels) for part in parts]) for side in whole]
    for part, state, *wanted in zip(parts, states, *gradients, strict=True):
        set_random_state(state, device)  # the same dropout as in the first pass
        exchange(run, part is parts[-1])  # once a step: the gradients of the parts before the last only add up
        with towers.lowered():
            outputs = zip(features(part), wanted, strict=True)
            learning = [(output, gradient) for output, gradient in outputs if output.requires_grad]  # a locked tower has none
            torch.autograd.backward([output for output, _ in learning], [gradient for _, gradient in learning])
    return loss.item()


def predict_backward(towers: Towers, kind: str, parts: Sequence[Batch], run: Any, group: Any, times: Any) -> float:
    """`backward` of what is predicted row by row: a sum over the rows, over a count that the ranks share, so that each part
    carries its own share of the gradient and nothing is computed twice."""
    device = next(towers.parameters()).device
    found = torch.zeros(2, device=device, dtype=torch.float64)  # the loss, and how much there is to predict
    found[1] = sum(targets(kind, part.lengths) for part in parts)
    if group is not None:
        dist.all_reduce(found, group=group)
    count, ranks = max(1.0, found[1].item()), 1 if group is None else dist.get_world_size(group)
    for part in parts:
        exchange(run, part is parts[-1])
        with towers.lowered():
            own = run(part.pixels.to(device, non_blocking=True), part.tokens.to(device, non_blocking=True), part.lengths)
            (own * (ranks / count) * times).backward()  # DDP and FSDP take the mean over the ranks
        found[0] += own.detach()
    if group is not None:
        dist.all_reduce(found, group=group)
    return found[0].item() / count


def split(batch: Batch, parts: int) -> list[Batch]:
    """So many parts, equal up to one row. As many on every rank, whatever rows it lacks: FSDP's ranks must run in step."""
    rows = torch.arange(len(batch.pixels)).tensor_split(parts)
    ends = [(int(r[0]), int(r[-1]) + 1) if len(r) else (0, 0) for r in rows]
    fields = [repeat(None, parts) if field is None else [field[a:b] for a, b in ends] for field in batch]
    return [Batch(*part) for part in zip(*fields, strict=True)]  # type: ignore[arg-type]


def row_norms(gradient: Tensor) -> Tensor:
    """What has the gradient's norm: of a large one on a CPU those of its rows, as torch takes a whole one's in one thread."""
    large = gradient.is_cpu and gradient.ndim == 2 and gradient.numel() > 1 << 20
    return torch.linalg.vector_norm(gradient, dim=-1) if large else gradient


class Average:
    """The exponential moving average of the weights, this rank's parts of them under FSDP; it starts at the first update."""

    def __init__(self, model: CLIP, decay: float) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.weights, self.step = list(model.parameters()), get_ema_multi_avg_fn(decay)
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        if not self.values:
            self.values = [p.detach().clone() for p in self.weights]
        else:
            self.step([local(v) for v in self.values], [local(p.detach()) for p in self.weights], None)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values or [p.detach().clone() for p in self.weights], strict=True))


class Engine:
    """The model on its device and over the ranks, with all that an update needs and a checkpoint keeps."""

    def __init__(self, config: TrainConfig, job: Job, model: CLIP) -> None:
        if config.batch_size % job.world:
            raise ValueError(
                f"expected a batch_size that the {job.world} ranks can share evenly, got {config.batch_size}: take a multiple"
            )
        if (made := getattr(model, "objective", "contrastive")) != config.objective:
            told = f"expected a model made for the objective {config.objective}, got one for {made}"
            raise ValueError(f"{told}; let the config make it, or give CLIP its text or predicts")
        self.config, self.job = config, job
        rows = config.batch_size // job.world
        self.parts = -(-rows // min(config.micro_batch or rows, rows))
        self.precision = precision.first(config, job.device)
        self.begun: precision.Begun | None = None
        dtype, self.updated = precision.DTYPES.get(self.precision), True
        self.sharded = job.world > 1 and config.parallel == "fsdp"
        self.model = model.to(job.device).train()
        self.model_config = beyond_shapes(model)
        blocks = prepare(model, config)
        alone = products_alone(dtype, job.device)
        self.towers = Towers(model, dtype if alone or not self.sharded else None)
        self.objective = Objective(model, config.loss, job.group).to(job.device)
        self.scalars = list(self.objective.parameters())
        self.wrapped = spread(self.towers, blocks, self.scalars, config.parallel, job, None if alone else dtype)
        bias = [] if self.objective.bias is None else [self.objective.bias]
        self.optimizer = (adamw if config.optimizer == "adamw" else lamb)(model, config, *bias)
        # Statistics of batch norm, which the ranks average in each step.
        self.statistics = [b for b in model.buffers() if b.is_floating_point()]
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=dtype == torch.float16)
        self.average = Average(model, config.ema) if config.ema else None
        torch.manual_seed(config.seed + job.rank * 1_000_003)  # from here on each rank its own, as for dropout

    def choose(self) -> str:
        """Fix the precision that the config leaves open; what to tell of it. All ranks call it, before the first update."""
        self.precision, told = precision.chosen(self.config, self.model, self.parts, self.job, self.begun)
        if products_alone(dtype := precision.DTYPES.get(self.precision), self.job.device):
            self.towers.dtype = dtype
        return told

    def update(self, batch: Batch, rate: float) -> dict[str, float]:
        """One step; `updated` says afterwards whether loss and gradient were finite, for if not the weights are untouched."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        times = self.scaler.scale(torch.ones((), device=self.job.device))
        loss = backward(self.towers, self.objective, split(batch, self.parts), self.wrapped, times)
        self.job.mean([p.grad for p in self.scalars if p.grad is not None])
        self.job.mean(self.statistics)
        self.scaler.unscale_(self.optimizer)
        gradients = alike(
            [row_norms(p.grad) for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        )
        norms = torch.stack([full(get_total_norm(some)) for some in gradients])
        norm = norms.norm() if len(norms) > 1 else norms[0]
        # With fp16 a gradient that overflows is the scaler's to skip, and no fault.
        self.updated = math.isfinite(loss) and (self.scaler.is_enabled() or bool(norm.isfinite()))
        if self.updated:
            if self.config.grad_clip:
                for group in self.optimizer.param_groups:
                    clip_grads_with_norm_(group["params"], self.config.grad_clip, norm)
            self.scaler.step(self.optimizer)
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, MAX_LOG_SCALE)
            if self.average:
                self.average.update()
        self.scaler.update()
        found = {"loss": loss, "scale": self.model.logit_scale.exp().item(), "lr": rate, "gradient_norm": norm.item()}
        return found | {"peak_memory_gb": peak_memory(self.job.device) / 1e9}

    def snapshot(self, averaged: bool = True) -> CLIP:
        """A plain copy of the model, with the averaged weights where there are some; every rank must call it."""
        state = self.model.state_dict() | (self.average.tensors() if self.average and averaged else {})
        return from_tensors({name: full(tensor) for name, tensor in state.items()}, self.model_config)

    def state(self, seconds: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that resuming needs: tensors by name, and what goes into JSON."""
        about: dict[str, Any] = {"config": asdict(self.config), "seconds": seconds, "world": self.job.world}
        about |= {"precision": self.precision, "device": self.job.device.type}
        about |= {"scaler": self.scaler.state_dict(), "model_config": self.model_config}
        return self.tensors(), about

    def _learning(self) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters())
        if self.objective.bias is not None:
            named["logit_bias"] = self.objective.bias
        return {name: p for name, p in named.items() if p.requires_grad}

    def tensors(self, saved: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name.

        saved: names in one that is to be loaded. The optimiser's state, which is made in its first step, and the random numbers
            of a rank that was not there take part only if they were saved.
        """
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.objective.bias is not None:
            found["logit_bias"] = self.objective.bias.detach()
        if self.average:
            found |= {f"ema.{name}": tensor for name, tensor in self.average.tensors().items()}
        for kind, state in zip(("cpu", "gpu"), random_state(self.job.device), strict=False):
            if saved is None or f"rng.{self.job.rank}.{kind}" in saved:
                found[f"rng.{self.job.rank}.{kind}"] = state
        for name, p in self._learning().items():
            state = self.optimizer.state[p]
            if saved is not None:
                keys = [key.rpartition(".")[2] for key in saved if key.rpartition(".")[0] == f"optimizer.{name}"]
                state |= {key: p.new_zeros(()).float() if key == "step" else torch.zeros_like(p) for key in keys}
            found |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return found

    def loaded(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Take over what is not in place once `tensors` are filled."""
        if self.average:
            self.average.values = [tensors[f"ema.{name}"] for name in self.average.names]
        own = [tensors[name] for kind in ("cpu", "gpu") if (name := f"rng.{self.job.rank}.{kind}") in tensors]
        if own:
            set_random_state(own, self.job.device)
        # Earlier versions said nothing of it, and computed as this one does before it measures.
        self.begun = precision.Begun(about.get("precision", self.precision), about.get("device", self.job.device.type))
        if about["scaler"]:
            self.scaler.load_state_dict(about["scaler"])


def prepare(model: CLIP, config: TrainConfig) -> list[nn.Module]:
    """What the config asks of the towers; returns the blocks that FSDP gathers one by one."""
    visual: Any = model.visual
    vit = hasattr(visual, "transformer")
    if config.lock_image:
        model.visual.requires_grad_(False).eval()  # batch norm, too, stays as it is
    for name, p in model.named_parameters() if config.lock_text else ():
        if not name.startswith(("visual.", "logit_scale")):
            p.requires_grad_(False)
    for name, p in model.named_parameters() if config.objective in LEARNS else ():
        if not name.startswith(LEARNS[config.objective]):
            p.requires_grad_(False)  # DDP waits for the gradient of each that has one
    if config.patch_dropout:
        if not vit:
            raise ValueError("expected a ViT for patch_dropout, got a ResNet; leave it out")
        visual.patch_dropout = config.patch_dropout
    model.set_grad_checkpointing(config.gradient_checkpointing)
    transformers = [model.transformer, *([visual.transformer] if vit else [])]
    blocks = [block for transformer in transformers for block in transformer.resblocks]
    if config.compile:
        # A block's one function has 24 variants: in either tower the first, middle and last block, with a graph and without,
        # for one shape and then for any. Dynamo stops at 8 and would leave the rest as they are.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # type: ignore[attr-defined]
        for block in blocks:
            block.compile()
    return blocks


def random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that layers draw from: the CPU's, and this rank's GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state(states[1], device)

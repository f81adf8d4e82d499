"""What one training run is, and the recipe of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature
from typing import Annotated, Any

from clipfast.model import CLIP, MODELS
from clipfast.weights.names import DEEPEST, LONGEST

CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
    "objective": ("contrastive", "bag", "words", "caption"),
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
MOST = {  # of the sizes that every model has
    **{"vision_layers": DEEPEST, "transformer_layers": DEEPEST, "context_length": LONGEST},
    **dict.fromkeys(("embed_dim", "image_resolution", "vision_width", "vocab_size"), 1 << 24),
    **dict.fromkeys(("transformer_width", "transformer_heads"), 1 << 24),
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
    objective: Annotated[
        str, "contrastive; bag: the same with a bag-of-words text tower; words, caption: predict the caption's words, or itself"
    ] = "contrastive"
    loss: Annotated[str, "clip (softmax) or siglip (sigmoid), of the contrastive objectives"] = "clip"
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
    precision: Annotated[str, "fp32, bf16, fp16 or auto: bf16 on a GPU that has it, or a CPU where it is faster"] = "auto"
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
        if self.objective in ("words", "caption") and (self.loss != "clip" or self.lock_text):
            got = f"loss {self.loss}, lock_text {self.lock_text}"
            raise ValueError(f"expected neither a contrastive loss nor lock_text for objective {self.objective}, got {got}")
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
    for name, most in MOST.items():
        value = arguments[name]
        numbers = value if name == "vision_layers" and isinstance(value, list | tuple) else [value]
        if not all(type(own) is int and 0 <= own <= most for own in numbers):
            raise ValueError(f"expected {name} of a model to be a number of at most {most:,}, got {str(value)[:60]}")
    return arguments


def arguments_for(objective: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """CLIP's constructor arguments for a model that has what the objective trains."""
    if objective == "bag":
        return arguments | {"text": {**(arguments.get("text") or {}), "bag": True}}
    return arguments | ({"predicts": objective} if objective in ("words", "caption") else {})

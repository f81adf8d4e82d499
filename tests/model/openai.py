"""OpenAI's own classes (clip-anytorch) as the oracle: pairs of small models on equal weights, and what it means to be equal."""

from __future__ import annotations

import copy
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import packaging.version
import torch
from torch import Tensor, nn

import bench.rivals  # noqa: F401 - makes torchvision importable beside a CPU torch
from clipfast.model import CLIP

if "clip" not in sys.modules:  # it asks for pkg_resources, which setuptools has no more; others look for it and want all of it
    sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)  # type: ignore[assignment]
import clip.model as openai  # noqa: E402

sys.modules.pop("pkg_resources", None)

TEXT = dict(context_length=16, vocab_size=60, transformer_width=64, transformer_heads=2, transformer_layers=2)
VIT = TEXT | dict(embed_dim=24, image_resolution=32, vision_layers=2, vision_width=128, vision_patch_size=8)
RESNET = TEXT | dict(embed_dim=24, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None)
FAMILIES: dict[str, dict[str, Any]] = {"vit": VIT, "resnet": RESNET}
END = 59


def randomised(model: nn.Module) -> nn.Module:
    """The model with noise on every parameter and batch statistic, so that none can be ignored."""
    generator = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.ndim:
            noise = torch.randn(value.shape, generator=generator) * (0.05 if value.ndim > 1 else 0.1)
            value.data += noise.abs() if name.endswith("running_var") else noise
    return model


def pair(sizes: dict[str, Any], change: Callable[[Any], Any] = lambda model: None) -> tuple[Any, Any]:
    """OpenAI's model and ours, in eval mode, on equal weights, both after ``change`` (from equal seeds)."""
    torch.manual_seed(0)
    theirs = randomised(openai.CLIP(**sizes)).eval()
    ours = CLIP(**sizes).eval()
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        torch.manual_seed(2)
        change(model)
    return theirs, ours


def images(sizes: dict[str, Any], number: int = 2) -> Tensor:
    side = sizes["image_resolution"]
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(3))


def texts() -> Tensor:
    """[2, 16] of random ids, the end token after 7 and after 16 tokens, zero behind."""
    text = torch.randint(1, END, (2, 16), generator=torch.Generator().manual_seed(4))
    text[0, 6], text[0, 7:], text[1, -1] = END, 0, END
    return text


def tensors(found: Any) -> list[Tensor]:
    """Every tensor of a nest of tuples, lists and dicts, in order."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, dict):
        return [t for value in found.values() for t in tensors(value)]
    return [t for value in found for t in tensors(value)] if isinstance(found, (tuple, list)) else []


def form(found: Any) -> Any:
    """The same nest with shape and dtype in place of every tensor."""
    if isinstance(found, Tensor):
        return f"{found.dtype} {list(found.shape)}".removeprefix("torch.")
    if isinstance(found, dict):
        return {key: form(value) for key, value in found.items()}
    if isinstance(found, (tuple, list)):
        return type(found)(form(value) for value in found)
    return found if found is None or isinstance(found, (bool, int, float, str)) else type(found).__name__


def difference(expected: Any, got: Any, bound: float = 1e-5) -> str:
    """What differs, in words; empty where form and values are equal, each tensor to ``bound`` of its norm.

    A tensor that is nearly zero beside the others of its nest (the gradient of a bias of keys) is compared on their scale. NaN
    is a difference.
    """
    if form(expected) != form(got):
        if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
            pairs = {k: (form(expected[k]), form(got[k])) for k in expected if form(expected[k]) != form(got[k])}
            return f"forms (expected, got) {pairs}"
        return f"expected {form(expected)}, got {form(got)}"
    wanted, found = ([_values(t) for t in tensors(nest) if t.numel()] for nest in (expected, got))
    if not wanted:
        return ""
    off, norms = (torch.stack(torch._foreach_norm(t)) for t in (torch._foreach_sub(wanted, found), wanted))
    wrong = off > bound * norms + 1e-2 * bound * norms.max()
    if not wrong.any() and norms.isfinite().all():
        return ""
    named = [k for k, v in expected.items() if isinstance(v, Tensor) and v.numel()] if isinstance(expected, dict) else []
    names = named if len(named) == len(wanted) else range(len(wanted))
    shares = {name: f"{o / n:.1e}" for name, o, n, w in zip(names, off, norms, wrong, strict=True) if w or not n.isfinite()}
    return f"values differ by these shares of the norm: {shares}"


def _values(t: Tensor) -> Tensor:
    t = t.detach().to_dense().double()
    return t.masked_fill(t == -torch.inf, -9)  # of masks


def gradients(module: nn.Module, outputs: Any, *inputs: Tensor) -> dict[str, Tensor | None]:
    """The gradient of a fixed random weighting of the outputs: of every parameter by its name and of the inputs."""
    generator = torch.Generator().manual_seed(5)
    module.zero_grad()
    for t in inputs:
        t.grad = None
    losses = [(o * torch.randn(o.shape, generator=generator)).sum() for o in tensors(outputs) if o.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    found = {name: None if p.grad is None else p.grad.detach().clone() for name, p in module.named_parameters()}
    return found | {f"input {i}": t.grad for i, t in enumerate(inputs)}


def outcome(call: Callable[[Any], Any], model: nn.Module) -> Any:
    """What the call returns; for a call that raises, the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of hooks and of old functions, which are the same for both
        try:
            return call(model)
        except Exception as error:  # whatever comes is what is compared
            return error


def encoded(image: Tensor | None = None, text: Tensor | None = None) -> Callable[[Any], Any]:
    """A call that gives the features of both towers and every gradient, the images' too."""

    def call(model: Any) -> tuple[list[Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
        pixels = None if image is None else image.clone().requires_grad_()
        torch.manual_seed(6)
        outputs = [] if pixels is None else [model.encode_image(pixels)]
        outputs += [] if text is None else [model.encode_text(text)]
        found = gradients(model, outputs, *(() if pixels is None else (pixels,)))
        return [o.detach() for o in outputs], found, {name: b.clone() for name, b in model.named_buffers()}

    return call


def compare(call: Callable[[Any], Any], theirs: Any, ours: Any, bound: float = 1e-5) -> str:
    """What differs between the outcomes of a call on OpenAI's model, which must be one, and on ours; empty for nothing."""
    return difference_of(outcome(call, theirs), outcome(call, ours), bound)


def difference_of(expected: Any, got: Any, bound: float = 1e-5) -> str:
    """See ``compare``; of a tuple each part is compared on its own scale."""
    if isinstance(expected, Exception):
        raise AssertionError(f"OpenAI's model raises {type(expected).__name__}: {expected}") from expected
    if isinstance(got, Exception):
        *_, last = traceback.extract_tb(got.__traceback__)
        return f"raises {type(got).__name__}: {str(got)[:300]} ({last.filename}:{last.lineno})"
    parts = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    return "; ".join(filter(None, (difference(e, g, bound) for e, g in parts)))


def moved(call: Callable[[Any], Any], before: Any, after: Any) -> bool:
    """Whether the change shows in OpenAI's own results: a check of the test itself."""
    return bool(difference(outcome(call, before), outcome(call, after)))


def twin(model: nn.Module) -> Any:
    return copy.deepcopy(model)

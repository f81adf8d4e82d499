"""Tiny models of transformers, what goes into them, how outputs are compared, and what every library's tests do to models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from clipfast.interop import restore

L, R = 12, 32
TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=60, max_position_embeddings=L,
    projection_dim=16, bos_token_id=0, pad_token_id=1, eos_token_id=59,
)  # fmt: skip
IMAGE = dict(
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=R,
    patch_size=8,
    projection_dim=16,
)
BERT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=60, max_position_embeddings=20,
    project_dim=32, projection_dim=16,
)  # fmt: skip


def model_of(name: str, text: dict | None = None, image: dict | None = None, double: bool = True, **more: Any) -> Any:
    """A tiny model of random weights, in eval mode."""
    kind = getattr(transformers, name)
    text, image = TEXT | (text or {}), IMAGE | (image or {})
    torch.manual_seed(0)
    if name == "VisionTextDualEncoderModel":
        towers = transformers.CLIPVisionConfig(**image), transformers.BertConfig(**BERT)
        config: Any = kind.config_class.from_vision_text_configs(*towers, projection_dim=16)
    elif "Text" in name:
        config = kind.config_class(**text, **more)
    elif "VisionModel" in name:
        config = kind.config_class(**image, **more)
    else:
        text = BERT if name in ("AltCLIPModel", "ChineseCLIPModel") else text
        text = text | dict(projection_size=32) if "Siglip" in name else text
        config = kind.config_class(text_config=text, vision_config=image, projection_dim=16, **more)
    model = kind(config).eval()
    for parameter in model.parameters():  # biases start at zero and gains at one
        nn.init.normal_(parameter, std=0.2)
    return model.double() if double else model


def texts() -> tuple[Tensor, Tensor]:
    """Token ids [3, L], which end at 7, L - 1 and 3, and their mask."""
    ids = torch.randint(3, 58, (3, L), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([7, L - 1, 3])
    behind = torch.arange(L) > ends[:, None]
    ids[range(3), ends] = 59
    return ids.masked_fill(behind, 1), (~behind).long()


def images(dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(2, 3, R, R, generator=torch.Generator().manual_seed(2)).to(dtype)


def inputs_of(model: Any, masked: bool = False) -> dict[str, Any]:
    name, (ids, mask) = type(model).__name__, texts()
    found: dict[str, Any] = {}
    if "Vision" not in name and "Image" not in name or name == "VisionTextDualEncoderModel":
        found |= dict(input_ids=ids) | (dict(attention_mask=mask) if masked else {})
    if "Text" not in name or name == "VisionTextDualEncoderModel":
        found |= dict(pixel_values=images())
    if name == "Siglip2Model":
        found["pixel_values"] = torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(2), dtype=torch.double)
        shapes = torch.tensor([[4, 4], [2, 6]])
        found |= dict(spatial_shapes=shapes, pixel_attention_mask=(torch.arange(16) < shapes.prod(1)[:, None]).long())
    return found


def tensors_of(output: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {prefix: output}
    items = output.items() if isinstance(output, dict) else enumerate(output or ())
    return {name: t for key, value in items for name, t in tensors_of(value, f"{prefix}.{key}").items()}


def compare(output: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Every tensor of two outputs, and that there are the same ones."""
    got, wanted = tensors_of(output), tensors_of(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = (got[name] - tensor).norm()
        assert difference <= tolerance * (1 + tensor.norm()), f"{name}: {difference}"


def compare_gradients(model: nn.Module, before: nn.Module) -> None:
    for (key, parameter), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if other.grad is not None:  # of a key's bias it is zero
            assert (parameter.grad - other.grad).norm() <= 1e-9 * (1e-3 + other.grad.norm()), key


class Doubled(nn.Module):
    """What somebody puts in the place of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:  # attention reads its projection's weights
        return getattr(super().__getattr__("inner"), name) if name in ("weight", "bias") else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@contextmanager
def doubled(name: str, *models: nn.Module) -> Iterator[None]:
    """The modules of that name are replaced, for a while."""
    kept = [model.get_submodule(name) for model in models]
    for model, one in zip(models, kept, strict=True):
        model.set_submodule(name, Doubled(one))
    yield
    for model, one in zip(models, kept, strict=True):
        model.set_submodule(name, one)


def changed_copies(model: Any) -> Iterator[tuple[Any, Any]]:
    """A copy of an accelerated model and one that was pickled, each with other weights and beside its twin, restored."""
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        twin = copy.deepcopy(other)
        restore(twin)
        yield other, twin

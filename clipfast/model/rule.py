"""The one rule that decides between the two ways through a tower.

The fused way reads weights and calls no module. So it may run only over modules that are exactly torch's or ours, bear no hook
and hold plain tensors; what was replaced, wrapped or hooked runs as itself, with OpenAI's shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Classes whose forward pass the fused way knows, each with the methods as they were known: (class that has it, name, method).
_KNOWN: dict[type, list[tuple[type, str, Any]]] = {}
_TENSORS = {Tensor, nn.Parameter, type(None)}
_GLOBAL = (
    hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks, hooks._global_backward_pre_hooks
)  # fmt: skip


def know(*kinds: type, methods: tuple[str, ...] = ("forward",)) -> None:
    """Enter classes as they are now: one whose method somebody replaces later is plain no more."""
    for kind in kinds:
        homes = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
        _KNOWN[kind] = [(base, name, vars(base)[name]) for base in homes for name in methods if name in vars(base)]


know(
    nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.Embedding, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.MultiheadAttention,
    nn.ReLU, nn.Sequential, nn.SiLU, NonDynamicallyQuantizableLinear,
)  # fmt: skip


def plain(kind: type) -> bool:
    """Whether a class is known, and its methods are those that are known."""
    known = _KNOWN.get(kind)
    return known is not None and all([getattr(home, name) is method for home, name, method in known])


def untouched(*modules: nn.Module) -> bool:
    """Whether every one of these modules is of a plain class, with a plain forward pass, plain tensors and no hook."""
    if not watched():
        for module in modules:
            own = module.__dict__
            if not plain(type(module)) or _hooked(own) or "forward" in own:
                return False
            for tensor in own["_parameters"].values():
                if type(tensor) not in _TENSORS and type(tensor).__name__ != "DTensor":
                    return False
        return True
    return False


def whole(module: nn.Module, kind: type) -> bool:
    """Whether a block or a transformer, which is called as a module on either way, is exactly ours and bears no hook but those
    with which FSDP gathers its weights."""
    own = module.__dict__
    if not plain(kind):
        return False
    if type(module) is kind:
        return not (_hooked(own) or "forward" in own)
    if type(module).__bases__[-1] is not kind or not type(module).__module__.startswith("torch.distributed.fsdp"):
        return False
    called = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    return not (own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own) and all(
        str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in called
    )


def watched() -> bool:
    """Whether somebody looks into every module: hooks on all of them, or an export, which is of torch's own operators."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch.jit.is_tracing() or any(_GLOBAL)


def _hooked(own: dict[str, Any]) -> bool:
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"])

"""Other libraries' models on our kernels: the ``forward`` of the modules that are known is swapped, and nothing else changes.

How a library's file plugs in. ``clipfast/interop/<library>.py`` offers

    def swaps(model: nn.Module) -> Iterator[Swap]

which yields a ``Swap`` for each module inside ``model`` (itself included) whose class it knows: with a ``forward``, a function
of the file's top level, called as ``forward(module, *args, **kwargs)`` in the place of the module's own; or with None for a
module that is left as it is. ``says`` is then on what the module runs, or why not. Its name stands in ``LIBRARIES``; the
file is imported only where the library is. The rules that every such function keeps:

- Weights are read from their modules at each call, never kept: so a model that is moved, cast, loaded or copied stays right.
- At each call it asks whether it may read them, by the one rule ``clipfast.model.rule.untouched`` (and ``bare``
  of modules that are swapped in their turn). Where it may not, or the arguments ask for what it does not compute, it returns
  ``original(module, *args, **kwargs)``, which is the class's own forward pass, and raises the class's own errors.
- Modules whose weights it does not read it calls, so that their hooks fire with the shapes that they expect.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from clipfast.model import CLIP

# The file of each library, and the module that is loaded wherever that library's models are.
LIBRARIES = {
    "open_clip": "open_clip.transformer",
    "timm": "timm.models.vision_transformer",
    "transformers": "transformers.modeling_utils",
}


class Swap(NamedTuple):
    """What a library's file says of one module."""

    module: nn.Module
    forward: Callable[..., Any] | None  # forward(module, *args, **kwargs); None: the module is left as it is
    says: str  # on what it runs; or why it is left
    lacks: str | None = None  # why a module with a ``forward`` runs as itself for now
    method: str = "forward"  # what ``forward`` stands for, where a class computes elsewhere than in its forward pass


class Forward:
    """The ``forward`` of an accelerated module, or another method of it.

    It knows its module by a weak reference, so that no cycle keeps the model alive; in a copy, or out of a pickle, it belongs
    to the module of that copy.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], method: str = "forward") -> None:
        self._module, self.function, self.method = weakref.ref(module), function, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self) -> tuple:
        return Forward, (self._module(), self.function, self.method)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The class's own method, where ``inspect.signature`` looks for the arguments."""
        module: Any = self._module()
        return getattr(type(module), self.method).__get__(module)

    @property
    def __code__(self) -> Any:
        """Where ``torch.export`` says that the model's inputs come from."""
        return self.__wrapped__.__code__

    def __repr__(self) -> str:
        return f"<clipfast {self.function.__name__} of {type(self._module()).__name__}>"


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass that the module's class has."""
    return type(module).forward(module, *args, **kwargs)


def bare(module: nn.Module, kind: type, but: str = "") -> bool:
    """Whether a module is exactly of this class, bears no hook, and has its class's forward pass or an accelerated one: whether
    one may go past it to the modules in it. ``but``: a Python module whose forward hooks do not count."""
    own = module.__dict__
    hooked = own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    hooked = hooked or any(not but or getattr(hook, "__module__", "") != but for hook in own["_forward_hooks"].values())
    return type(module) is kind and not hooked and type(own.get("forward")) in (type(None), Forward)


class Way(NamedTuple):
    """How a class runs, in a library's file; the fields of ``Swap``, of every module of that class."""

    forward: Callable[..., Any]
    says: str
    lacks: Callable[[Any], str | None] = lambda module: None
    method: str = "forward"

    def swap(self, module: nn.Module) -> Swap:
        return Swap(module, self.forward, self.says, self.lacks(module), self.method)


class Line(NamedTuple):
    """One module of a report."""

    name: str  # its path in the model; "" for the model itself
    kind: str  # the name of its class
    says: str  # on what it runs, or why it is left


@dataclass
class Report:
    """What ``accelerate`` did. ``str`` of it is the table; ``bool`` of it is whether anything was accelerated."""

    model: str  # the class of the model
    accelerated: list[Line] = field(default_factory=list)
    left: list[Line] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.accelerated)

    def __str__(self) -> str:
        title = f"{self.model}: {len(self.accelerated)} modules accelerated, {len(self.left)} left as they are"
        return "\n".join([title, *_rows("runs", self.accelerated), *_rows("left", self.left)])


def _rows(what: str, lines: list[Line]) -> Iterator[str]:
    """Modules of one class of which the same is said are one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        rows.setdefault(line[1:], []).append(line.name or "(itself)")
    for (kind, says), names in rows.items():
        where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}, {len(names)} of them"
        yield f"  {what}  {kind} ({where}): {says}"


def accelerate(model: nn.Module) -> Report:
    """Let the modules of ``model`` that are known run on our kernels, in place; undone by ``restore``.

    Only their ``forward`` is swapped: class, keys, parameters, hooks and ``save_pretrained`` stay, and outputs are equal to
    rounding, gradients too. A module that is replaced, wrapped or hooked afterwards runs as itself, and the fused way is taken
    again when that ends. Copies and pickles of the model are accelerated as well (a pickle needs clipfast where it is read).

    Returns:
        A ``Report``: which modules run on what, and why others do not. Of an unknown model it says so.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    restore(model)
    report = Report(type(model).__name__)
    names = {id(module): name for name, module in model.named_modules()}
    for swap in _swaps(model):
        name = names.pop(id(swap.module), None)
        if name is None:  # of which another file has spoken
            continue
        line = Line(name, type(swap.module).__name__, swap.says)
        if swap.forward is None:
            report.left.append(line)
        elif swap.method in swap.module.__dict__:
            report.left.append(line._replace(says=f"its {swap.method} is already replaced by somebody else's"))
        else:
            setattr(swap.module, swap.method, Forward(swap.module, swap.forward, swap.method))
            if swap.lacks is None:
                report.accelerated.append(line)
            else:
                report.left.append(line._replace(says=f"runs as itself for now: {swap.lacks}"))
    if not report.accelerated and not report.left:
        report.left.append(Line("", report.model, f"nothing is known of it, nor of what is in it (known: {_known()})"))
    return report


def restore(model: nn.Module) -> None:
    """Undo ``accelerate``: every module has the forward pass of its class again.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a model, an nn.Module, got {type(model).__name__}; of a pipeline, pass its models one by one"
        )
    for module in model.modules():
        for method in [name for name, own in module.__dict__.items() if type(own) is Forward]:
            delattr(module, method)


def _swaps(model: nn.Module) -> Iterator[Swap]:
    for module in model.modules():
        if isinstance(module, CLIP):
            yield Swap(module, None, "it is clipfast's own, and runs on its kernels as it is")
    for library, loaded in LIBRARIES.items():
        if loaded not in sys.modules:
            continue
        try:
            known = importlib.import_module(f"clipfast.interop.{library}")
        except ImportError as error:  # a version that has other classes
            yield Swap(model, None, f"{library} cannot be accelerated: {error}")
            continue
        yield from known.swaps(model)


def _known() -> str:
    return f"clipfast, {', '.join(LIBRARIES)}"

"""An op as PyTorch knows it: operators with schema, fake and gradient where somebody traces, and a plain call elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from clipfast.kernels.dispatch import Backends, forced

OPS: dict[str, Op] = {}
LIBRARY = torch.library.Library("clipfast", "DEF")
_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, type(None)}


class Op(Backends):
    """One op: its schemas ``clipfast::<name>`` and, with a backward pass, ``clipfast::<name>_backward``, and its backends.

    ``forward``, ``backward``: schema and fake; the first argument is a tensor. ``compiled`` gives the ``supports`` of each C++
    backend, whose pair of ops takes the same arguments under ``<name>_<kind>``. ``autograd``: ``setup(ctx, inputs, output)``
    and ``gradients(ctx, *grads)``, which calls ``backward``; a gradient that is not there may come as None. ``differentiable``:
    False of an op for inference, which refuses to be asked for gradients.
    """

    def __init__(
        self,
        home: str,
        forward: tuple[str, Callable],
        backward: tuple[str, Callable] | None = None,
        compiled: dict[str, Callable] | None = None,
        autograd: tuple[Callable, Callable] | None = None,
        differentiable: bool = True,
    ) -> None:
        self.differentiable = differentiable
        name = home.rpartition(".")[2]
        super().__init__(home, {"forward": name} | ({"backward": f"{name}_backward"} if backward else {}), compiled or {})
        for (part, name), (schema, fake) in zip(self.parts.items(), filter(None, (forward, backward)), strict=True):
            LIBRARY.define(name + schema)
            LIBRARY.impl(name, functools.partial(self._run, part), "CompositeExplicitAutograd")
            torch.library.register_fake(f"clipfast::{name}", fake, lib=LIBRARY)
            for kind in self.compiled:
                LIBRARY.define(f"{name}_{kind}{schema}")
        if autograd:
            setup, gradients = autograd
            torch.library.register_autograd(f"clipfast::{self.name}", gradients, setup_context=setup, lib=LIBRARY)
            self._function = _function(functools.partial(self._run, "forward"), setup, gradients)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run the op, differentiably where it has ``autograd``."""
        if not _plain(args):
            return getattr(torch.ops.clipfast, self.name)(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return self._function.apply(*args)
        return self._run("forward", *args)

    def backward(self, *args: Any) -> Any:
        """Run the op's backward pass."""
        return self._run("backward", *args) if _plain(args) else getattr(torch.ops.clipfast, self.parts["backward"])(*args)

    def _run(self, part: str, *args: Any) -> Any:
        run, device = getattr(self.choose(*args)[1], part), args[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):  # an op computes in the types it is given: its matrix products too
            return run(*args)


def _plain(args: tuple) -> bool:
    """Whether nobody traces, watches or transforms these tensors, so that torch's dispatcher has nothing to add to a call.

    A call through it costs 10 µs more, 40 with the backward pass, for an operator in Python (measured): 5 % of a step of the
    demo's model.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and all([type(a) in _PLAIN or (type(a) is list and all([type(b) in _PLAIN for b in a])) for a in args])
        and not args[0].is_meta
    )


def _function(run: Callable, setup: Callable, gradients: Callable) -> type[torch.autograd.Function]:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            output = run(*args)
            setup(ctx, args, output)
            return output

        backward = staticmethod(first_derivative(gradients))

    return Differentiable


def first_derivative(backward: Callable) -> Callable:
    """A backward pass whose gradients raise if they are differentiated in their turn.

    torch's ``once_differentiable`` does so only where the gradients that come in can be differentiated, and lets silently fall
    what depends on the saved tensors.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph=False
            return found
        found = found if isinstance(found, tuple) else (found,)
        return _Refused.apply(len(found), *found, *ctx.saved_tensors, *grads)  # of all that they depend on

    return run


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: int, *given: Any) -> Any:
        same = tuple(g if g is None else g.view_as(g) for g in given[:number])
        return same if number > 1 else same[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "clipfast: expected to be differentiated once, got a second derivative, which the kernels do not have; the towers "
            "have it where their forward pass runs inside `with clipfast.kernels.use('reference')`, plain PyTorch"
        )


def transformable(function: Callable) -> Callable:
    """For an op's public function: what it means in plain PyTorch (``spec.reference``) runs, which has every derivative, where
    ``torch.func`` transforms it, derivatives run forwards or ``use("reference")`` asks for it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or forced() == "reference"
        ):
            return OPS[function.__name__].spec.reference(*args, **kwargs)
        return function(*args, **kwargs)

    return run

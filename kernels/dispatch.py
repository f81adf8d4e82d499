"""Which backend runs an op: the one place that knows.

Every backend of an op has ``supports``, ``forward`` and ``backward`` with the same arguments (no ``backward`` where the op
makes its gradients in the forward pass). The automatic choice is the first backend of the device's tuple that supports the
arguments; ``CLIPFAST_BACKEND`` or ``use`` forces one, which then runs or raises with its reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from clipfast.kernels import passed
from clipfast.kernels.available import library

# A CUDA C++ kernel counts only on a GPU that has passed it (passed.py); elsewhere it runs only when forced.
AUTOMATIC = {"cpu": ("cpu", "onednn", "torch"), "cuda": ("cuda", "triton", "torch")}
BACKENDS = ("cuda", "triton", "cpu", "torch", "onednn", "flash_attn", "xformers")

OPS: dict[str, Op] = {}
_PLAIN = {torch.Tensor, torch.nn.Parameter, int, float, bool, type(None)}
LIBRARY = torch.library.Library("clipfast", "DEF")
_forced: list[str | None] = [os.environ.get("CLIPFAST_BACKEND") or None]


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the ``with`` by this backend: ``cuda``, ``triton``, ``cpu``, ``torch`` or a library's name."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The backend that ``use`` or ``CLIPFAST_BACKEND`` asks for, or None: the choice is automatic."""
    return _forced[-1]


class NoBackend(RuntimeError):
    """No backend runs these arguments; the message has the reason of each."""


def _plain(args: tuple) -> bool:
    """Whether nobody traces, watches or transforms these tensors, so that torch's dispatcher has nothing to add to a call.

    A call through it costs 10 µs more, 40 with the backward pass, for an operator in Python (measured): 5 % of a step of the
    demo's model.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and all(type(a) in _PLAIN for a in args)
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

        backward = staticmethod(once_differentiable(gradients))

    return Differentiable


class Op:
    """One op: its schemas ``clipfast::<name>`` and, with a backward pass, ``clipfast::<name>_backward``, and its backends.

    ``forward``, ``backward``: schema and fake; the first argument is a tensor. ``compiled`` gives the ``supports`` of each C++
    backend, whose pair of ops takes the same arguments under ``<name>_<kind>``. ``autograd``: ``setup(ctx, inputs, output)``
    and ``gradients(ctx, *grads)``, which calls ``backward``; a gradient that is not there may come as None.
    """

    def __init__(
        self,
        home: str,
        forward: tuple[str, Callable],
        backward: tuple[str, Callable] | None = None,
        compiled: dict[str, Callable] | None = None,
        autograd: tuple[Callable, Callable] | None = None,
    ) -> None:
        self.home, self.name, self.compiled = home, home.rpartition(".")[2], compiled or {}
        self.parts = {"forward": self.name} | ({"backward": f"{self.name}_backward"} if backward else {})
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

    @property
    def spec(self) -> Any:
        return self.backend("torch")

    def _run(self, part: str, *args: Any) -> Any:
        run, device = getattr(self.choose(*args)[1], part), args[0].device.type
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):  # an op computes in the types it is given: its matrix products too
            return run(*args)

    @functools.cache  # noqa: B019 - ops live as long as the process
    def backend(self, name: str) -> Any:
        """The backend with ``supports``, ``forward`` and ``backward``, or the reason (str) why it is not there."""
        if name not in BACKENDS:
            return f"expected one of {', '.join(BACKENDS)}"
        if name in ("cpu", "cuda"):
            if name not in self.compiled:
                return f"{self.name} has no {name} backend"
            if reason := library(name):
                return reason
            found = {part: getattr(torch.ops.clipfast, f"{op}_{name}").default for part, op in self.parts.items()}
            return SimpleNamespace(supports=self.compiled[name], **found)
        try:
            return importlib.import_module(f"{self.home}.{'spec' if name == 'torch' else name}")
        except ModuleNotFoundError as error:
            own = (error.name or "").startswith(self.home)
            return f"{self.name} has no {name} backend" if own else f"no module {error.name}"

    def choose(self, *args: Any) -> tuple[str, Any]:
        """Name and backend that run these arguments; NoBackend with every reason where none does."""
        device, reasons = args[0].device, []
        for name in (forced(),) if forced() else AUTOMATIC.get(device.type, ("torch",)):
            backend = self.backend(name)
            reason = backend if isinstance(backend, str) else backend.supports(*args)
            if reason is None and name == "cuda" and not forced():
                reason = passed.lacks(self.name, device)
            if reason is None:
                return name, backend
            reasons.append(f"{name}: {reason}")
        raise NoBackend(f"clipfast {self.name} on {device}: no backend runs this ({'; '.join(reasons)})")

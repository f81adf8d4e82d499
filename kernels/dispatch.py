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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clipfast.kernels import passed

# A CUDA C++ kernel counts only on a GPU that has passed it (passed.py); elsewhere it runs only when forced.
AUTOMATIC = {"cpu": ("cpu", "onednn", "torch"), "cuda": ("cuda", "triton", "torch")}
BACKENDS = ("cuda", "triton", "cpu", "torch", "onednn", "flash_attn", "xformers")

OPS: dict[str, Op] = {}
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


@functools.cache
def library(kind: str) -> str | None:
    """Load the compiled library ``_C_<kind>`` once; None, or the reason why it cannot be had."""
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    folder = Path(importlib.import_module("clipfast").__file__ or "").parent
    path = folder / f"_C_{kind}.so"
    if not path.exists():
        return f"{path.name} is not built: pip install -e . --no-build-isolation"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def triton_lacks(x: torch.Tensor, products: bool = False) -> str | None:
    """Why no Triton kernel of ours runs on this tensor, or None; ``products``: whether the kernel multiplies matrices."""
    import triton

    interpreting = triton.knobs.runtime.interpret
    if x.device.type != "cuda" and not interpreting:
        return f"expected CUDA tensors, got {x.device}; on a CPU it runs only under TRITON_INTERPRET=1"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {x.dtype}"
    if interpreting and products and x.dtype == torch.bfloat16:
        return "Triton's interpreter cannot multiply bfloat16"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "expected compute capability 8.0 or later"
    return None


class NoBackend(RuntimeError):
    """No backend runs these arguments; the message has the reason of each."""


class Op:
    """One op: its schemas ``clipfast::<name>`` and, with a backward pass, ``clipfast::<name>_backward``, and its backends.

    ``compiled`` gives the ``supports`` of each C++ backend, whose pair of ops takes the same arguments under ``<name>_<kind>``.
    """

    def __init__(
        self, home: str, forward: tuple[str, Callable], backward: tuple[str, Callable] | None, compiled: dict[str, Callable]
    ) -> None:
        self.home, self.name, self.compiled = home, home.rpartition(".")[2], compiled
        self.parts = {"forward": self.name} | ({"backward": f"{self.name}_backward"} if backward else {})
        for (part, name), (schema, fake) in zip(self.parts.items(), filter(None, (forward, backward)), strict=True):
            LIBRARY.define(name + schema)
            LIBRARY.impl(name, functools.partial(self._run, part), "CompositeExplicitAutograd")
            torch.library.register_fake(f"clipfast::{name}", fake, lib=LIBRARY)
            for kind in compiled:
                LIBRARY.define(f"{name}_{kind}{schema}")
        OPS[self.name] = self

    @property
    def spec(self) -> Any:
        return self.backend("torch")

    def _run(self, part: str, *args: Any) -> Any:
        run = getattr(self.choose(*args)[1], part)
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
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
            found = {part: getattr(torch.ops.clipfast, f"{op}_{name}") for part, op in self.parts.items()}
            return SimpleNamespace(supports=self.compiled[name], **found)
        try:
            return importlib.import_module(f"{self.home}.{'spec' if name == 'torch' else name}")
        except ModuleNotFoundError as error:
            own = (error.name or "").startswith(self.home)
            return f"{self.name} has no {name} backend" if own else f"no module {error.name}"

    def choose(self, *args: Any) -> tuple[str, Any]:
        """Name and backend that run these arguments; NoBackend with every reason where none does."""
        device = next(a for a in args if isinstance(a, torch.Tensor)).device
        reasons = []
        for name in (forced(),) if forced() else AUTOMATIC.get(device.type, ("torch",)):
            backend = self.backend(name)
            reason = backend if isinstance(backend, str) else backend.supports(*args)
            if reason is None and name == "cuda" and not forced():
                reason = passed.lacks(self.name, device)
            if reason is None:
                return name, backend
            reasons.append(f"{name}: {reason}")
        raise NoBackend(f"clipfast {self.name} on {device}: no backend runs this ({'; '.join(reasons)})")

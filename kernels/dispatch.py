"""Which backend runs an op: the one place that knows.

Every backend of an op has ``supports``, ``forward`` and ``backward`` with the same arguments (no ``backward`` where the op
makes its gradients in the forward pass). The automatic choice is the first backend of the device's tuple that supports the
arguments; ``CLIPFAST_BACKEND`` or ``use`` forces one, which then runs or raises with its reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from clipfast.kernels import passed
from clipfast.kernels.available import library
from clipfast.kernels.forced import BACKENDS, forced, use

__all__ = ["AUTOMATIC", "BACKENDS", "Backends", "NoBackend", "forced", "settled", "use"]

# A CUDA C++ kernel counts only on a GPU that has passed it (passed.py); elsewhere it runs only when forced.
AUTOMATIC = {"cpu": ("cpu", "onednn", "torch"), "cuda": ("cuda", "triton", "torch")}


def settled(x: torch.Tensor, own: str) -> bool | None:
    """Whether an op calls the vendor's own function, where that hangs neither on the machine nor on sizes; None where it does.
    Asked before an operator is called, which would cost more than it chooses. ``own``: the op's backend that is the faster
    one somewhere."""
    if x.is_meta or torch.compiler.is_exporting() or torch.is_autocast_enabled(x.device.type):
        return True  # what is exported depends neither on this machine nor on the batch
    asked = forced()
    return asked not in (own, "torch") if asked else None


class NoBackend(RuntimeError):
    """No backend runs these arguments; the message has the reason of each."""


class Backends:
    """The backends of one op, whose home is a package. ``parts``: the names of its operators forward and backward; those of a
    C++ backend end in ``_<kind>`` as well, and ``compiled`` gives its ``supports``."""

    def __init__(self, home: str, parts: dict[str, str], compiled: dict[str, Callable]) -> None:
        self.home, self.name, self.parts, self.compiled = home, home.rpartition(".")[2], parts, compiled

    @property
    def spec(self) -> Any:
        return self.backend("torch")

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
        asked = forced()
        for name in ("torch" if asked == "reference" else asked,) if asked else AUTOMATIC.get(device.type, ("torch",)):
            backend = self.backend(name)
            reason = backend if isinstance(backend, str) else backend.supports(*args)
            if reason is None and name == "cuda" and not asked:
                reason = passed.lacks(self.name, device)
            if reason is None:
                return name, backend
            reasons.append(f"{name}: {reason}")
        raise NoBackend(f"clipfast {self.name} on {device}: no backend runs this ({'; '.join(reasons)})")

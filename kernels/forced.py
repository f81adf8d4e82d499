"""The backend that the user asks for: of the process by ``CLIPFAST_BACKEND``, of a thread or an asyncio task by ``use``."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import torch

BACKENDS = ("cuda", "triton", "cpu", "torch", "onednn", "flash_attn", "xformers")


def _known(where: str, backend: str) -> str:
    """``backend``; an op that is the vendor's own function would never notice that it does not exist."""
    if backend not in (*BACKENDS, "reference"):
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, reference, got {backend!r}")
    return backend


PROCESS = _known("CLIPFAST_BACKEND", asked) if (asked := os.environ.get("CLIPFAST_BACKEND")) else None


class _Told:
    """What a thread last asked for, as those read it that know only threads."""

    def __init__(self) -> None:
        self.backend = PROCESS


class _Thread(threading.local):
    def __init__(self) -> None:
        self.told = _Told()


# The truth is the task's. Its thread repeats it for two readers: torch.compile guards an attribute, but cannot read a context
# variable; and what torch keeps of a thread follows a backward pass into the threads in which autograd runs it on a GPU.
_task: ContextVar[str | None] = ContextVar("clipfast.backend", default=PROCESS)
_thread, _TOLD = _Thread(), "clipfast.backend"
_open, _lock = 0, threading.Lock()
_anywhere = False  # whether a `use` is open in this process: else `forced` costs what reading a global costs


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op inside the ``with`` by this backend: ``cuda``, ``triton``, ``cpu``, ``torch`` or a library's name; or by its
    ``reference``, plain PyTorch that can be differentiated any number of times.

    It is in force in this thread, or asyncio task, and in the tasks and backward passes that start from it; a thread started
    inside chooses for itself. What torch.compile compiles is called inside ``use``, and has none of its own.
    """
    _known("use", backend)
    if torch.compiler.is_compiling():
        if backend != forced():  # a graph chooses as it runs, when this `with` is over
            raise RuntimeError(f"use({backend!r}): expected outside of what is compiled, got inside; enter it around the call")
        yield
        return
    _count(1)
    token, _thread.told.backend = _task.set(backend), backend
    torch._C._stash_obj_in_tls(_TOLD, _thread.told)
    try:
        yield
    finally:
        _count(-1)
        _task.reset(token)
        _thread.told.backend = _task.get()


def _count(more: int) -> None:
    global _open, _anywhere
    with _lock:
        _open += more
        _anywhere = _open > 0


def forced() -> str | None:
    """The backend that ``use`` or ``CLIPFAST_BACKEND`` asks for, or None: the choice is automatic."""
    return _asked() if _anywhere else PROCESS


def _asked() -> str | None:
    if torch.compiler.is_compiling():
        return _thread.told.backend
    told = torch._C._get_obj_in_tls(_TOLD) if torch._C._is_key_in_tls(_TOLD) else _thread.told
    if told is _thread.told:
        told.backend = _task.get()  # another task of this thread may have been here
    return told.backend  # in a thread of autograd's: what that one told which called backward

"""A process that was forked after torch's threads had started: its first parallel work would wait for threads that it lacks."""

from __future__ import annotations

import os

from torch import Tensor, compiler, get_num_threads

_started = _lost = False  # threads of this process; those of the process that it was forked from


def check_threads(given: Tensor) -> None:
    """Before an encoding: RuntimeError where it would hang, in place of that. One thread, as a data worker has, works."""
    global _started
    if not _started and given.is_cpu and not compiler.is_compiling():
        if _lost and get_num_threads() > 1:
            raise RuntimeError(
                "expected a process that can compute on a CPU in parallel, got one forked from a process that had done so, in "
                "which OpenMP waits for ever: start it by multiprocessing's spawn, or call torch.set_num_threads(1) in it first"
            )
        _started = get_num_threads() > 1


def _after_fork() -> None:
    global _started, _lost
    _started, _lost = False, _lost or _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

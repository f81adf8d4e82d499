"""The rows of test_kernels: op × backend × case × dtype × device, those that exist on this machine."""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast import kernels
from clipfast.check import DTYPES, arguments
from clipfast.kernels import dispatch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Of Triton's kernels in the interpreter, which takes a second where a GPU takes microseconds: cases that together reach every
# line and show every fault of mutants.py, with the types in which they do. The others are for ``make test-all``.
INTERPRETED: dict[str, dict[str, list[str]]] = {}


class Row(NamedTuple):
    op: str
    backend: str
    case: str
    dtype: str
    device: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"

    @property
    def slow(self) -> bool:
        return self.interpreted and self.dtype not in INTERPRETED.get(self.op, {}).get(self.case, ())

    @property
    def arguments(self) -> dict[str, Any]:
        return arguments(self.op, CASES[self.op][self.case], DTYPES[self.dtype], self.device)


# The specs' cases, and more that a kernel needs because of the sizes of its tiles.
_ACROSS = {"pairs across tiles": dict(n=70, N=150, D=20, offset=37)}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "contrastive": _ACROSS,
    "pairwise_sigmoid": _ACROSS,
    "mlp": {"many rows": dict(rows=300, C=8)},
}
CASES = {op: home.spec.CASES | MORE.get(op, {}) for op, home in kernels.OPS.items()}


class _Asked(TorchDispatchMode):
    """Keeps the arguments of the first call of one operator, which it does not run."""

    class Found(Exception):
        pass

    def __init__(self, op: str) -> None:
        super().__init__()
        self.name = f"clipfast::{op}"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == self.name:
            self.args = args
            raise self.Found
        return function(*args, **(kwargs or {}))


def lacks(op: str, backend: str, given: dict[str, Any]) -> str | None:
    """Why the backend does not run the op with these arguments of its public function, or None."""
    if isinstance(found := kernels.OPS[op].backend(backend), str):
        return found
    with dispatch.use(backend), torch.no_grad():
        try:
            with _Asked(op) as asked:
                getattr(kernels, op)(**given)
        except _Asked.Found:
            return found.supports(*asked.args)
        except dispatch.NoBackend as error:  # of another op, which this one is made of
            return str(error)
    raise AssertionError(f"{op} does not call its operator")


@functools.cache
def collected(ops: tuple[str, ...] | None = None) -> tuple[list[Row], Counter[tuple[str, str]]]:
    """The rows that exist (of all ops), and how many do not, by op and backend and by the reason."""
    rows, absent = [], Counter[tuple[str, str]]()
    for op, device in itertools.product(ops or kernels.OPS, DEVICES):
        backends = [b for b in dispatch.BACKENDS if kernels.OPS[op].backend(b) != f"{op} has no {b} backend"]
        for case, dtype in itertools.product(CASES[op], DTYPES):
            given = arguments(op, CASES[op][case], DTYPES[dtype], device)
            for backend in backends:
                if (reason := lacks(op, backend, given)) is None:
                    rows.append(Row(op, backend, case, dtype, device))
                else:
                    absent[f"{op} {backend}", reason] += 1
    return rows, absent


def left_out() -> list[str]:
    """What is said once instead of a row skipped: how many rows of each backend do not exist on this machine, and why."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, reason), count in collected()[1].items():
        short = reason.partition("no backend runs this (")[2].partition(": ")[2].rstrip(")") or reason
        reasons[name.partition(" ")[2]][short.partition(", got")[0].partition(" on the CPU")[0]] += count
    lines = (
        f"  {backend}: {'; '.join(f'{count} for {reason!r}' for reason, count in found.most_common())}"
        for backend, found in reasons.items()
    )
    return ["rows of kernels that do not exist on this machine:", *lines]

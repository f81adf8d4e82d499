"""Outputs of transformers' models whose ``last_hidden_state`` is computed when somebody reads it.

``get_text_features`` returns the states of every token beside the pooled features that are asked for. Of a caption padded to 77
tokens that is most of the work, and next to nobody reads it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

_NAME = "last_hidden_state"


class Later:
    """A tensor that is computed when it is read, as at the call that it belongs to: with its gradient mode and its autocast.

    Args:
        compute: gives the tensor.
        tensors: the parameters that ``compute`` reads; RuntimeError if they have changed by then.
        again: the same parameters as the model has them by then; None where ``compute`` holds ``tensors`` themselves.
    """

    def __init__(
        self, compute: Callable[[], Tensor], tensors: list[Tensor], again: Callable[[], list[Tensor]] | None = None
    ) -> None:
        self.compute, self.tensors, self.again = compute, tensors, again
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        device = tensors[0].device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.seen = _contents(tensors)

    def __call__(self) -> Tensor:
        now = self.tensors if self.again is None else self.again()
        same = len(now) == len(self.tensors) and all(a is b for a, b in zip(now, self.tensors, strict=True))
        if not same or _contents(now) != self.seen:
            raise RuntimeError(
                f"{_NAME}: expected the model's weights to be those of the call that it is of, got others; it is computed when "
                "it is first read: read it before the weights change, or clipfast.restore(model)"
            )
        gradients, inference = self.modes
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients), torch.autocast(*self.autocast):
            return self.compute()


def _contents(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What differs once one of the tensors is moved or written to."""
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


class _Deferred(ModelOutput):
    """In front of a class of outputs. The dictionary under it holds a ``Later`` until ``last_hidden_state`` is read, in
    whichever way: as attribute, key or index, in a loop, by ``to_tuple``, in a copy."""

    def __post_init__(self) -> None:
        if type(self.unread()) is not Later:
            super().__post_init__()  # which reads the first field

    def unread(self) -> Any:
        """The last hidden state, or the ``Later`` of which it will come."""
        return OrderedDict.get(self, _NAME)

    def _settle(self) -> None:
        if type(later := self.unread()) is Later:
            self[_NAME] = later()

    @property
    def last_hidden_state(self) -> Tensor | None:
        self._settle()
        return self.unread()

    @last_hidden_state.setter
    def last_hidden_state(self, value: Any) -> None:
        if value is None and _NAME in self:
            OrderedDict.__delitem__(self, _NAME)
        # any other value ModelOutput has put into the dictionary

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            key = list(self.keys())[key]
        if isinstance(key, str) and key != _NAME and key in self:
            return OrderedDict.get(self, key)
        self._settle()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - which this is

    def items(self) -> Any:
        self._settle()
        return super().items()

    def values(self) -> Any:
        self._settle()
        return super().values()

    def __reduce__(self) -> tuple:
        plain = type(self).__mro__[2]
        return functools.partial(plain, **dict(self.items())), ()


@functools.cache
def deferred(kind: type[ModelOutput]) -> type[ModelOutput]:
    """A class of outputs like ``kind``, whose ``last_hidden_state`` may be given as a ``Later``."""
    return type(kind.__name__, (_Deferred, kind), {})

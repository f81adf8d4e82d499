"""Texts without padding: tokens up to each text's end token, one text behind the other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.model.fused import Layout


def uncompiled(reason: str) -> Callable[[Callable], Callable]:
    """``torch.compiler.disable`` for a method, which imports torch._dynamo (2 s) only where somebody compiles."""

    def decorated(method: Callable) -> Callable:
        disabled: list[Callable] = []

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return method(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(method, reason=reason))
            return disabled[0](*args, **kwargs)

        # What torch.compiler.disable marks its functions with, for a program that comes here first.
        run._torchdynamo_disable, run._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
        return run

    return decorated


class Packed(NamedTuple):
    """Texts without padding, one behind the other, on one device: what ``CLIP.pack`` makes and ``encode_text`` takes."""

    ids: Tensor  # int64 [T]
    position: Tensor  # int64 [T]: of each token in its text
    cu_seqlens: Tensor  # int32 [B + 1]: where each text starts, and T
    max_length: int

    def rows(self) -> Tensor:
        """int64 [T]: the text of each token."""
        return torch.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.ids))

    def layout(self) -> Layout:
        """Of the tokens' states, under a causal mask and read at each text's end."""
        return Layout(self.cu_seqlens[1:] - 1, True, self.cu_seqlens, self.max_length)


def pack(
    text: Tensor, lengths: Tensor | Sequence[int] | None, context_length: int, vocab_size: int, end_token: int | None = None
) -> Packed:
    """See ``CLIP.pack``; ``end_token``: where a text is read without lengths, None for its largest id."""
    expected = f"expected a tensor of token ids [B, 1 ≤ L ≤ {context_length}]"
    if not isinstance(text, Tensor):
        raise TypeError(f"encode_text: {expected}, got {type(text).__name__}; see tokenize")
    if text.ndim != 2 or text.shape[1] > context_length or (len(text) and not text.shape[1]):
        raise ValueError(f"encode_text: {expected}, got {list(text.shape)}; see tokenize")
    if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
        raise TypeError(f"encode_text: expected integer token ids, got {text.dtype}; see tokenize")
    text = text.long()  # unsigned integers have next to no operators
    B, L = text.shape
    if B and (lengths is None or text.is_cpu):
        end = text if end_token is None else (text == end_token).int()
        first, least, most = torch.stack([end.argmax(1), text.amin(1), text.amax(1)]).cpu()  # one transfer
        _check_ids(least, most, vocab_size - 1)
        lengths = first + 1 if lengths is None else lengths
    counts = torch.as_tensor([] if lengths is None else lengths, device="cpu")
    if counts.shape != (B,) or (B and counts.is_floating_point()):
        raise ValueError(f"encode_text: expected {B} lengths, integers, got {list(counts.shape)} of {counts.dtype}")
    counts = counts.long()
    if (wrong := (counts < 1) | (counts > L)).any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"encode_text: expected lengths of 1 to {L} tokens, got {int(counts[row])} in row {row}")
    ends = F.pad(counts.cumsum(0), (1, 0))
    row_of = torch.repeat_interleave(torch.arange(B), counts)
    position = torch.arange(len(row_of)) - ends[row_of]
    row_of, position, ends = (t.to(text.device, non_blocking=True) for t in (row_of, position, ends))
    return Packed(text[row_of, position], position, ends.int(), int(counts.max()) if B else 0)


def _check_ids(least: Tensor, most: Tensor, end: int) -> None:
    """The least and the greatest id of every row [B], on the host."""
    if (wrong := (least < 0) | (most > end)).any():
        row = int(wrong.nonzero()[0])
        got = f"{int(least[row])} to {int(most[row])} in row {row}"
        raise ValueError(f"encode_text: expected ids of 0 to {end}, got {got}; see tokenize")


def padded(packed: Packed) -> tuple[Tensor, Tensor]:
    """(text [B, L], zero behind the end, lengths [B]) of packed texts; L is the longest's."""
    lengths = packed.cu_seqlens.diff()
    text = packed.ids.new_zeros(len(lengths), packed.max_length)
    return text.index_put((packed.rows(), packed.position), packed.ids), lengths

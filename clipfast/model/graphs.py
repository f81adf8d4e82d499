"""Inference of small batches by CUDA graphs: the launches of a tower recorded once, replayed as one.

A tower at batch 1 is some hundred kernels of a few microseconds; launching them one by one from Python takes longer than they
run. A graph has fixed shapes, so a batch is filled up to the next recorded size: images by their number, texts by their number
and by their tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.model.clip import CLIP
from clipfast.model.packed import Packed

# A recorded call: its inputs, to be overwritten in place, and what replays it into its output.
Recorded = tuple[tuple[Tensor, ...], Callable[[], Tensor]]


def graphed(model: CLIP, batch_sizes: Sequence[int] = (1, 8, 32), text_lengths: Sequence[int] | None = None) -> Graphed:
    """``encode_image`` and ``encode_text`` of a model as CUDA graphs, one for each size of batch, recorded at its first use.

    Args:
        model: on a CUDA device, in eval mode. The graphs read its weights where they lie: change them in place, if at all.
        batch_sizes: the recorded sizes; a batch runs in the smallest that holds it, filled up.
        text_lengths: mean tokens of a text for which a graph is recorded; None: 16 and the context length.

    Returns:
        An object with ``encode_image`` and ``encode_text`` as the model's, without gradients. What no graph holds (a larger
        batch) and everything on a device without CUDA runs as the model itself; ``reason`` says why, and a warning once.

    Raises:
        ValueError: a size is not positive, the model is in training mode.
    """
    return Graphed(model, batch_sizes, text_lengths)


class Graphed:
    """See ``graphed``. ``reason``: why nothing is recorded on this device, or None."""

    def __init__(self, model: CLIP, batch_sizes: Sequence[int], text_lengths: Sequence[int] | None) -> None:
        lengths = text_lengths or (min(16, model.context_length), model.context_length)
        if not batch_sizes or min(*batch_sizes, *lengths, 1) < 1 or max(lengths) > model.context_length:
            raise ValueError(
                f"graphed: expected positive batch_sizes, and text_lengths of at most {model.context_length}, got "
                f"{list(batch_sizes)} and {list(lengths)}"
            )
        if model.training:
            raise ValueError("graphed: expected a model in eval mode, got one in training mode; call model.eval()")
        self.model, self.batch_sizes, self.text_lengths = model, sorted(batch_sizes), sorted(lengths)
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self.reason = _lacks(model)
        if self.reason:
            warnings.warn(f"graphed: {self.reason}; the model runs without graphs", stacklevel=3)

    @torch.no_grad()
    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """image [B, 3, R, R] -> [B, D]; see ``CLIP.encode_image``."""
        size = self._size(len(image))
        if size is None:
            return self.model.encode_image(image, normalize)
        filled = F.pad(self.model.checked_image(image), (0, 0) * 3 + (0, size - len(image)))
        features = self._replay((size,), (filled,), lambda image: self.model.encode_image(image))[: len(image)]
        return F.normalize(features, dim=-1) if normalize else features.clone()

    @torch.no_grad()
    def encode_text(self, text: Tensor | Packed, normalize: bool = False, lengths: Tensor | list[int] | None = None) -> Tensor:
        """text [B, L] of token ids, or packed -> [B, D]; see ``CLIP.encode_text``."""
        packed = text if isinstance(text, Packed) else self.model.pack(text, lengths)
        B, T, context = len(packed.cu_seqlens) - 1, len(packed.ids), self.model.context_length
        size = self._size(B)
        length = next((n for n in self.text_lengths if size and size * n >= T), None)
        if size is None or length is None:
            return self.model.encode_text(packed, normalize)
        filled = fill(packed, size, size * length, context)

        def run(ids: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
            return self.model.encode_text(Packed(ids, position, cu_seqlens, context))

        features = self._replay((size, length), filled[:3], run)[:B]
        return F.normalize(features, dim=-1) if normalize else features.clone()

    def _size(self, B: int) -> int | None:
        """The recorded size that holds B, or None: then the model runs as it is."""
        return None if self.reason or not B else next((size for size in self.batch_sizes if size >= B), None)

    def _replay(self, key: tuple[int, ...], given: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Tensor:
        if key not in self.recorded:
            self.recorded[key] = record(run, given)
        inputs, replay = self.recorded[key]
        for held, tensor in zip(inputs, given, strict=True):
            held.copy_(tensor)
        return replay()


def _lacks(model: CLIP) -> str | None:
    device = model.logit_scale.device
    return None if device.type == "cuda" else f"expected a model on a CUDA device, got {device}"


def fill(packed: Packed, B: int, T: int, context_length: int) -> Packed:
    """The texts, followed by texts of id 0 up to T tokens and by empty ones: shapes that depend on B, T and the context alone.

    The number of sequences is B + T / context_length, rounded up: room for what T tokens beyond the given texts need. No
    sequence sees another's tokens, so the first ones' features are theirs.
    """
    count = len(packed.cu_seqlens) - 1
    used, sequences = len(packed.ids), B + -(-T // context_length)
    ends = torch.arange(1, sequences - count + 1, device=packed.cu_seqlens.device) * context_length + used
    cu_seqlens = torch.cat([packed.cu_seqlens, ends.clamp(max=T).int()])
    position = torch.arange(T - used, device=packed.position.device) % context_length
    return Packed(F.pad(packed.ids, (0, T - used)), torch.cat([packed.position, position]), cu_seqlens, context_length)


def record(run: Callable[..., Tensor], given: tuple[Any, ...]) -> Recorded:
    """Record ``run`` on copies of the given tensors as a CUDA graph; what it returns is the graph's own and is overwritten."""
    inputs = tuple(tensor.clone() for tensor in given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and libraries loaded before the recording
        for _ in range(2):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(*inputs)

    def replay() -> Tensor:
        graph.replay()
        return output

    return inputs, replay

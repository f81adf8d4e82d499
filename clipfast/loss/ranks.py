"""How the rows of a contrastive batch travel between the ranks of a group: in parts, one in flight while one is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Of one part, from all ranks together. Large enough that its matrix products fill a GPU and hide the way of the next: 16 MiB
# are 10,900 rows of 768 in 16 bit, 140 µs against 4,096 rows at 500 TFLOP/s, and 80 µs at 200 GB/s.
PART_BYTES = 16 << 20
# The collectives; torch 2.13 renamed the first two.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_reduce = dist.all_reduce
CARD = 512  # bytes in which a rank says what it brings


class Part(NamedTuple):
    """Rows ``start .. start + lengths[q]`` of every rank q: columns ``first .. first + sum(lengths)`` of the whole."""

    rank: int
    start: int
    first: int
    lengths: list[int]

    @property
    def rows(self) -> slice:
        """This rank's rows, among its own."""
        return slice(self.start, self.start + self.lengths[self.rank])

    @property
    def columns(self) -> tuple[slice, slice, slice]:
        """Of the whole: the columns of the ranks before this one, this one's, and those of the ranks after it."""
        own = self.first + sum(self.lengths[: self.rank])
        after = own + self.lengths[self.rank]
        return slice(self.first, own), slice(own, after), slice(after, self.first + sum(self.lengths))

    def others(self, whole: Tensor) -> Tensor:
        """[N] -> the columns of the other ranks."""
        before, _, after = self.columns
        return torch.cat([whole[before], whole[after]])

    def put(self, whole: Tensor, others: Tensor) -> None:
        """The way back of ``others``."""
        before, _, after = self.columns
        whole[before], whole[after] = others.split([before.stop - before.start, after.stop - after.start])


class Ranks:
    """The ranks that share a batch of N rows, ``counts[q]`` of them on rank q, and the parts in which they pass them on."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, counts: list[int], row_bytes: int) -> None:
        self.group, self.rank, self.counts, self.size = group, rank, counts, len(counts)
        self.parts: list[Part] = []
        first, most = 0, max(counts, default=0) if self.size > 1 else 0
        rounds = -(-most * self.size * row_bytes // PART_BYTES)
        step = -(-most // max(1, rounds))
        for start in range(0, most, max(1, step)):
            lengths = [min(max(0, count - start), step) for count in counts]
            self.parts.append(Part(rank, start, first, lengths))
            first += sum(lengths)

    @classmethod
    def meet(cls, group: dist.ProcessGroup, said: str | Exception, rows: Any) -> Ranks:
        """Tell all ranks how many rows [n, D] this one has and what they are; learn the same of them.

        Raises on every rank: ValueError where not all say the same, and on the rank that brings an error, that error.
        """
        rank = group.rank()
        count = 0 if isinstance(said, Exception) else len(rows)
        text = f"{type(said).__name__}: {said}" if isinstance(said, Exception) else said
        card = count.to_bytes(8, "little") + text.encode()[: CARD - 8].ljust(CARD - 8, b"\0")
        # Where the group has no CPU side, NCCL carries the cards, on a stream of its own: waiting for them waits for no kernel.
        at_cpu = "cpu:" in dist.get_backend_config(group)
        with nullcontext() if at_cpu else torch.cuda.stream(torch.cuda.Stream()):
            own = torch.frombuffer(bytearray(card), dtype=torch.uint8).to("cpu" if at_cpu else "cuda")
            cards = own.new_empty(group.size() * CARD)
            all_gather(cards, own, group=group)
            everyone = bytes(cards.tolist())
        found = [everyone[i : i + CARD] for i in range(0, len(everyone), CARD)]
        texts = [card[8:].rstrip(b"\0").decode(errors="ignore") for card in found]
        if isinstance(said, Exception):
            raise said
        if len(set(texts)) > 1:
            differ = "; ".join(
                f"{t} on rank {', '.join(str(q) for q, u in enumerate(texts) if u == t)}" for t in dict.fromkeys(texts)
            )
            raise ValueError(f"expected the same on every rank (n may differ), got {differ}; mend the rank that differs")
        counts = [int.from_bytes(card[:8], "little") for card in found]
        return cls(group, rank, counts, rows.shape[1] * rows.element_size())

    def total(self, own: Tensor) -> int:
        """N; on one rank the rows of ``own``."""
        return sum(self.counts) if self.parts else len(own)

    def own(self, whole: Tensor) -> Tensor:
        """[N] -> the entries of this rank's rows [n]."""
        return torch.cat([whole[part.columns[1]] for part in self.parts]) if self.parts else whole

    def spread(self, own: Tensor, fill: float) -> Tensor:
        """[n] -> [N] with ``fill`` at the other ranks' columns; on one rank the same."""
        if not self.parts:
            return own
        whole = own.new_full((self.total(own),), fill)
        for part in self.parts:
            whole[part.columns[1]] = own[part.rows]
        return whole

    def reduce(self, x: Tensor, by: Any) -> None:
        """All-reduce in place."""
        all_reduce(x, by, group=self.group)

    def gathered(self, own: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Each part with the rows [., D] that the other ranks have in it. The first part leaves at once, each next one before
        the one at hand is given out."""
        return self._arriving(own, self._gather(own, self.parts[0])) if self.parts else iter(())

    def _arriving(self, own: Tensor, flight: tuple[Any, Tensor]) -> Iterator[tuple[Part, Tensor]]:
        for part, following in zip(self.parts, [*self.parts[1:], None], strict=True):
            (work, buffer), flight = flight, self._gather(own, following) if following else flight
            work.wait()
            found = zip(buffer, part.lengths, strict=True)
            yield part, torch.cat([rows[:length] for q, (rows, length) in enumerate(found) if q != self.rank])

    def _gather(self, own: Tensor, part: Part) -> tuple[Any, Tensor]:
        rows, most = own[part.rows], max(part.lengths)
        if len(rows) < most:
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        buffer = rows.new_empty(self.size, most, *rows.shape[1:])
        return all_gather(buffer.flatten(0, 1), rows.contiguous(), group=self.group, async_op=True), buffer

    def collect(self, own: Tensor) -> Tensor:
        """[n] -> [N], a few bytes a row."""
        whole = self.spread(own, 0)
        for part, others in self.gathered(own):
            part.put(whole, others)
        return whole


ALONE = Ranks(None, 0, [0], 0)


class Returned:
    """Gradients on their way to the ranks whose rows they are of: reduce-scattered part by part in fp32, one in flight."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.flight: tuple[Any, Tensor, Tensor] | None = None
        self.landed: list[Tensor] = []

    def send(self, part: Part, of_others: Tensor) -> None:
        """``of_others`` [., D]: this rank's share of the gradients of all the other ranks' rows in ``part``."""
        most, pieces = max(part.lengths), []
        lengths = [0 if q == self.ranks.rank else length for q, length in enumerate(part.lengths)]
        zeros = of_others.new_zeros(most, of_others.shape[1])
        for rows in of_others.split(lengths):
            pieces += [rows, zeros[len(rows) :]]
        buffer, out = torch.cat(pieces), torch.empty_like(zeros)
        self._land()
        work = reduce_scatter(out, buffer, group=self.ranks.group, async_op=True)
        self.flight = work, out[: part.lengths[self.ranks.rank]], buffer

    def _land(self) -> None:
        if self.flight:
            self.flight[0].wait()
            self.landed.append(self.flight[1])
            self.flight = None

    def add_to(self, own: Tensor) -> None:
        """Add what the other ranks sent to ``own`` [n, D]."""
        self._land()
        if self.landed:
            own += torch.cat(self.landed)


class Gathered(torch.autograd.Function):
    """[n, D] -> [ranks, n, D] over all processes, n the same on each; backward the sum over the ranks."""

    @staticmethod
    def forward(ctx, own: Tensor, size: int) -> Tensor:
        whole = own.new_empty(size, *own.shape)
        all_gather(whole.flatten(0, 1), own.contiguous())
        return whole

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        own = grad.new_empty(grad.shape[1:])
        reduce_scatter(own, grad.contiguous().flatten(0, 1))
        return own, None

"""What a run shows and writes beside its weights: progress bar, log.jsonl, TensorBoard, Weights & Biases, a profile."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from clipfast.files import ITSELF, replacing

warned = logging.getLogger(__name__)
LONGEST = 1 << 26  # bytes of a line: not_finite.jsonl has the keys of a batch
PROFILED = {"wait": 2, "warmup": 1, "active": 3}  # steps: let caches fill, let the profiler start, then record


class Watch:
    """The logs in `out`; on ranks other than 0 it writes nothing, but for a rank's own profile."""

    board: Any = None
    wandb: Any = None
    bar: Any = None
    profiler: Any = None
    full = False  # whether the last line could not be written

    def __init__(
        self, out: Path, config: dict[str, Any], rank: int = 0, *,
        resumed: bool = False, progress: bool = True, tensorboard: bool = True, wandb: str = "", profiled: bool = False,
    ) -> None:  # fmt: skip
        self.out, self.config, self.rank, self.resumed = out, config, rank, resumed
        self.progress, self.tensorboard, self.project = progress, tensorboard, wandb
        self.log, self.scores, self.faults = (out / f"{name}.jsonl" for name in ("log", "eval", "not_finite"))
        self.settings = out / "config.json"
        if wandb:
            try:
                import wandb as _  # noqa: F401 - now, not when the first step is done
            except ImportError as error:
                raise ImportError(f"expected the package wandb for the project {wandb!r}: pip install wandb") from error
        if profiled:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities, schedule=schedule(**PROFILED, repeat=1), on_trace_ready=self._trace)
            self.profiler.start()

    def _trace(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self.out / f"trace_rank_{self.rank}.json"))

    def record(self, step: int, share: float, metrics: dict[str, float]) -> None:
        """One step: `share` of the run is done."""
        if self.profiler:
            self.profiler.step()
        if self.rank:
            return
        self.open(step)
        self._append(self.log, {"step": step} | metrics)
        self.scalars(step, metrics)
        m = metrics
        text = f"step {step} loss {m['loss']:.3f} scale {m['scale']:.1f} lr {m['lr']:.1e}"
        text += f" {m['samples_per_second']:.0f} samples/s"
        if m["ranks"] > 1:
            text += f" ({m['samples_per_second'] / m['ranks']:.0f} a rank)"
        text += f" data wait {m['data_wait']:.0%}"
        self.bar.set_postfix_str(f"{text} {m['peak_memory_gb']:.1f} GB", refresh=False)  # as often as the bar is drawn
        self.bar.update(share - self.bar.n)

    def _append(self, log: Path, entry: dict[str, Any]) -> None:
        """A line more, or none where the disk is full: a run does not end for that."""
        try:
            with open(log, "a", opener=_not_through_a_link) as file:
                file.write(json.dumps(entry) + "\n")
            self.full = False
        except OSError as error:
            if not self.full:
                warned.error(
                    "NO LOG from step %s on: %s; the training goes on: make room in %s", entry["step"], error, self.out
                )
            self.full = True

    def computes(self, precision: str, told: str) -> None:
        """What the run computes in, and why where that was not settled beforehand: kept in config.json, shown with the bar."""
        self.config |= {"computes_in": precision} | ({"because": told} if told else {})
        if told and self.progress and not self.rank:
            print(f"precision {told}", file=sys.stderr)

    def tidy(self) -> None:
        """Remove what a killed run left half done."""
        for left in (self.log, self.scores, self.faults, self.settings, self.out / "model.pt"):
            with suppress(OSError):
                Path(f"{left}.part").unlink()

    def has_evaluated(self, step: int) -> bool:
        """Whether the scores of that step are in eval.jsonl, as rank 0 sees it."""
        return self.rank == 0 and self.scores.is_file() and step in map(_step, _lines(self.scores))

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Scores of a validation: a line in eval.jsonl and scalars."""
        if self.rank == 0:
            self.open(step + 1)
            self._append(self.scores, {"step": step} | scores)
            self.scalars(step, {f"eval/{name}": value for name, value in scores.items()})

    def not_finite(self, step: int, loss: float, norm: float, keys: Sequence[Sequence[str] | None]) -> None:
        """A step without an update: which samples each rank had is kept in not_finite.jsonl."""
        if self.rank == 0:
            entry = {"step": step, "loss": str(loss), "norm": str(norm), "keys_by_rank": keys}
            self._append(self.faults, entry)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        try:
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, step)
        except OSError as error:  # its writer's thread has ended
            warned.error("NO MORE SCALARS for TensorBoard: %s; the training goes on", error)
            self.board = None
        if self.wandb:
            self.wandb.log(values, step=step)

    def open(self, step: int) -> None:
        """Open the logs, once, without what an interrupted run wrote from this step on."""
        if self.rank or self.bar is not None:
            return
        for log in (self.log, self.scores, self.faults):
            if os.path.lexists(log):
                damaged = 0
                with replacing(log) as file:
                    for line in _lines(log) if self.resumed and log.exists() else ():
                        damaged += (own := _step(line)) == math.inf
                        if own < step:
                            file.write(line)
                if damaged:
                    warned.warning("left out of %s: %s that are cut off or none of a run's", log, f"{damaged:,} lines")
        with replacing(self.settings) as file:
            file.write(json.dumps(self.config, indent=2).encode())
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.board = SummaryWriter(str(self.out), purge_step=step)
        if self.project:
            import wandb

            self.wandb = wandb.init(project=self.project, dir=str(self.out), config=self.config, resume="allow")
        shown = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=1.0, bar_format=shown, mininterval=0.5, miniters=0, disable=not self.progress)

    def close(self) -> None:
        if self.profiler:
            self.profiler.stop()
        for opened in (self.bar, self.board):
            if opened is not None:
                opened.close()
        if self.wandb:
            self.wandb.finish()


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | ITSELF, 0o666)


def _lines(log: Path) -> Iterator[bytes]:
    """Of a log, however long it is; what is longer than any line of ours comes in pieces."""
    with open(log, "rb") as file:
        while line := file.readline(LONGEST):
            yield line


def _step(line: bytes) -> float:
    """Of a line of a log; infinite for one that a kill or a full disk cut off, or that is none of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf

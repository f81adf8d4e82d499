"""Checkpoints: written beside the training by torch.distributed.checkpoint, whole or not at all, for any number of ranks."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from clipfast.files import remove
from clipfast.train.job import Job
from clipfast.weights.distributed import ABOUT, Reader, fill, fingerprint, hush, sealed, verify

log = logging.getLogger(__name__)


class Checkpoints:
    """The folders `step_…` below `folder`, one a checkpoint; rank 0 names, checks and removes them."""

    def __init__(self, folder: Path, job: Job, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder, self.job, self.keep_last, self.keep_every = folder, job, keep_last, keep_every
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None
        self.failed: Exception | None = None
        hush()

    def save(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Copy the tensors and return; a thread writes them. At most one checkpoint is on its way."""
        self.wait()
        part = self.folder / f"step_{step:08}.part"
        try:
            if self.job.rank == 0:
                remove(part)
            # One file a rank: a hundred thousand small ones are what shared file systems choke on.
            writer = dcp.FileSystemWriter(part, single_file_per_rank=True, sync_files=True, thread_count=1)
            saved = dcp.async_save(
                tensors, storage_writer=writer, process_group=self.job.saving, no_dist=self.job.saving is None
            )
            self.pending = self.pool.submit(self._finish, saved, part, {"step": step} | about)
        except Exception as error:
            self._warn(error, part)

    def _finish(self, saved: Any, part: Path, about: dict[str, Any]) -> None:
        try:
            saved.result()  # on rank 0 it comes when every rank has written its file
            if self.job.rank == 0:
                about["files"] = {file.name: fingerprint(file) for file in sorted(part.iterdir())}
                with open(part / ABOUT, "w") as file:
                    json.dump(sealed(about), file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                _sync_folder(part)
                whole = part.with_suffix("")
                remove(whole)  # a damaged one of the same step
                part.replace(whole)
                _sync_folder(self.folder)
                self.tidy(newest := about["step"])
                self._remove(step for step in self.steps() if step > newest)  # damaged: the run has gone on from before them
            self.failed = None
        except BaseException as error:  # torch's CheckpointException is none of Exception's
            self._warn(error, part)

    def _warn(self, error: BaseException, part: Path) -> None:
        causes = getattr(error, "failures", None) or {self.job.rank: error}
        reasons = {str(c[0] if isinstance(c, tuple) else c) for c in causes.values()}
        told = f"CHECKPOINT NOT SAVED at {part.with_suffix('').name}: {'; '.join(sorted(reasons))}; the one before it stays"
        free = shutil.disk_usage(self.folder).free / 1e6 if self.folder.exists() else math.nan
        log.error("%s, the training goes on; %.0f MB are free in %s: make room there", told, free, self.folder)
        self.failed = OSError(told)
        if self.job.rank == 0:
            remove(part)

    def wait(self) -> None:
        """Until the checkpoint on its way is on the disk, or has failed (`failed`)."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.wait()
        self.pool.shutdown()

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, oldest first."""
        names = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def tidy(self, newest: int) -> None:
        """Remove what is not to be kept beside that checkpoint, which is whole, and what a killed job left half done."""
        steps = [step for step in self.steps() if step <= newest]
        kept = steps[-self.keep_last :] + [step for step in steps if self.keep_every and step % self.keep_every == 0]
        self._remove(set(steps) - set(kept))
        for left in self.folder.glob("step_*.part"):
            remove(left)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            remove(self.folder / f"step_{step:08}")

    def choose(self, resume: str) -> Path | None:
        """The checkpoint at that path, or of "auto" the newest whole one, or None where there is none; the same for all ranks.

        Raises ValueError where there are some, and all are damaged.
        """
        return self.job.gather(self._choose(resume) if self.job.rank == 0 else None)[0]

    def _choose(self, resume: str) -> Path | Exception | None:
        paths = [self.folder / f"step_{step:08}" for step in reversed(self.steps())]
        paths, reason = (paths if resume == "auto" else [Path(resume)] if resume else []), ""
        for path in paths:
            try:
                verify(path)
                return path
            except ValueError as error:
                if resume != "auto":
                    return error
                reason = str(error)
                log.warning("skipped a damaged checkpoint: %s", reason)
        return ValueError(f"expected a whole checkpoint, got {len(paths)} damaged, the last {reason}") if paths else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(reader: Reader, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors (FSDP's parts too) from a checkpoint, each rank what it needs; ValueError lists what does not fit."""
    check_shapes(reader, tensors)
    fill(reader, tensors)


def check_shapes(reader: Reader, tensors: Mapping[str, Tensor]) -> None:
    """ValueError listing what a checkpoint lacks of the tensors, or has in another shape, or has besides."""
    shapes = reader.shapes()
    missing = [name for name in tensors if name not in shapes]
    differ = [
        f"{name} (expected {list(tensor.shape)}, got {list(shapes[name])})"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    more = [name for name in shapes if name.startswith("model.") and name not in tensors]
    faults = [("missing", missing), ("mis-shaped", differ), ("unexpected", more)]
    if told := [f"{len(names)} {fault}: {', '.join(names)}" for fault, names in faults if names]:
        raise ValueError(f"{reader.path}: expected a checkpoint of this architecture: {'; '.join(told)}")

"""Trains in forked processes that are killed at each of their file operations, alone and as two ranks.

`python -m tests.train.forks FOLDER RANKS VICTIM STEP [FIRST]` kills the victim at every STEP-th operation, starts the run
again, and prints how many were killed and what was wrong then. A process of its own, because one that has used torch's threads
must not be forked.
"""

import json
import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch

from clipfast.model import CLIP
from clipfast.train import train
from clipfast.train.job import Job
from tests.evaluate import forks
from tests.evaluate.forks import ended, forked
from tests.hostile.checkpoints import config
from tests.train.test_jobs import share
from tests.train.test_train import checkpointed, log, pairs


class Killed(forks.Killed):
    """Also at what a folder that is removed held, which has no path of its own."""

    def audit(self, event: str, given: tuple) -> None:
        if event in ("os.remove", "os.rmdir") and given[1] != -1:
            self.one()
        else:
            super().audit(event, given)


def validate(model: CLIP, job: Job) -> dict[str, float]:
    return {"sum": model.text_projection.sum().item()}


def run(out: Path, rank: int, world: int) -> None:
    settings = config(out, steps=6, checkpoint_every=2, keep_last=1, val_every=3, ema=0.9, resume="auto", timeout=60.0)
    train(settings, lambda step: (share(pairs(s), rank, world) for s in count(step)), validate=validate)


def start(out: Path, world: int, victim: int = -1, operation: int = 0) -> list[int]:
    """The processes of a job, one of which is killed before that operation of its own."""
    port = forks.socket.socket()
    port.bind(("127.0.0.1", 0))

    def work(rank: int) -> None:
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(number)
        if rank == victim:
            Killed(out, operation)
        run(out, rank, world)

    number = port.getsockname()[1]
    port.close()
    return [forked(lambda rank=rank: work(rank)) for rank in range(world)]


def results(out: Path) -> dict[str, Any]:
    """All that a run leaves, but times."""
    model = torch.load(out / "model.pt")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    settings = {**json.loads((out / "config.json").read_text()), "out": ""}
    losses = [(line["step"], line["loss"]) for line in log(out)]
    scores = (out / "eval.jsonl").read_text()
    return {"files": files, "config": settings, "log": losses, "eval": scores} | checkpointed(out, 6) | model["state_dict"]


def differ(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    names = {name for name in found.keys() | expected.keys() if not equal(found.get(name), expected.get(name))}
    told = {name: found.get(name) for name in names if not isinstance(found.get(name), torch.Tensor)}
    return [f"{sorted(names)[:5]} differ: {told}"] if names else []


def killed_at_each(folder: Path, world: int, victim: int, step: int, first: int = 0) -> tuple[int, list[str]]:
    assert not any(map(ended, start(folder / "whole", world)))
    expected, wrong = results(folder / "whole"), list[str]()
    for kills, operation in enumerate(count(first, step)):
        out = folder / f"run {operation}"
        pids = start(out, world, victim, operation)
        if (done := ended(pids.pop(victim))) == 0:
            return kills, wrong
        for pid in pids:  # as torchrun would
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        again = [ended(pid) for pid in start(out, world)]
        if done != -signal.SIGKILL or any(again):
            wrong.append(f"operation {operation}: ended with {done}, then {again}")
            continue
        try:
            wrong += [f"operation {operation}: {told}" for told in differ(results(out), expected)]
        except (OSError, ValueError) as error:
            wrong.append(f"operation {operation}: {error}")
    raise AssertionError


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(killed_at_each(Path(sys.argv[1]), *map(int, sys.argv[2:]))))

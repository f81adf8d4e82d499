"""Runs `embed` in forked processes that are killed: at each of their file operations, at random times, as several ranks.

`python -m tests.evaluate.forks FOLDER SCENARIO STEP` prints how many were killed, and what was wrong after they were started
again. A process of its own, because one that has used torch's threads must not be forked.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import torch

from clipfast.data import DataConfig, Source
from clipfast.data.sources import read_folder
from clipfast.evaluate import embed, read_features
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from clipfast.train.job import joined
from tests.data.test_data import png, write_shards

SIZES = {
    "embed_dim": 8, "image_resolution": 16, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip


class Killed:
    """Kills this process before its n-th operation on files below the folder: open to write, fsync, rename, remove, ..."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left = str(folder), at
        sys.addaudithook(self.audit)
        fsync = os.fsync
        os.fsync = lambda file: (self.one(), fsync(file))[1]  # no event of its own

    def audit(self, event: str, given: tuple) -> None:
        known = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
            event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if known and str(given[0]).startswith(self.folder):
            self.one()

    def one(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], object]) -> int:
    """The process that does the work and nothing else."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port() -> int:
    """Of those that no system gives to whoever asks for any: none takes it between here and its use."""
    for port in range(20000 + os.getpid() * 37 % 10000, 32768):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


class Scenario:
    """fresh: a folder is embedded. shards: the same of tars. refresh: over what another content left."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.kind, self.folder, self.out = kind, folder, folder / "out"
        self.model, self.preprocess = CLIP(**SIZES).eval(), Preprocess(16)
        data = folder / "data"
        if kind == "shards":
            self.where = write_shards(data, shards=3, each=5)
        else:
            data.mkdir()
            for number in range(7):
                (data / f"{number}.png").write_bytes(png(number))
            self.before = folder / "before"
            if kind == "refresh":
                assert ended(forked(lambda: self.run(self.before))) == 0
                (data / "1.png").unlink()
                (data / "3.png").write_bytes(png(77))
                (data / "8.png").write_bytes(png(8))
        assert ended(forked(lambda: self.run(folder / "whole"))) == 0
        self.expected = read_features(folder / "whole")
        self.files = {path.relative_to(folder / "whole") for path in (folder / "whole").rglob("*")}

    def source(self) -> Source:
        return DataConfig(self.where).open() if self.kind == "shards" else read_folder(self.folder / "data")

    def run(self, out: Path, world: int = 1) -> None:
        features = ("image", "hidden", "text") if self.kind == "shards" else ("image",)
        with joined("cpu") as job:
            embed(
                self.model, self.preprocess, self.source(), out, features=features, part_size=3, refresh=True, job=job,
                batch_size=2, threads=1,
            )  # fmt: skip

    def ranks(self, world: int, out: Path, killed: Callable[[], object] = lambda: None) -> list[int]:
        """The processes of a job; the last of them is the one to be killed."""
        port = free_port()

        def work(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if rank == world - 1:
                killed()
            self.run(out)

        return [forked(lambda rank=rank: work(rank)) for rank in range(world)]

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.kind == "refresh":
            shutil.copytree(self.before, self.out)

    def wrong(self) -> list[str]:
        """What differs from the run that nobody killed."""
        expected = self.expected
        try:
            found = read_features(self.out)
        except ValueError as error:
            return [str(error)]
        near = 1e-6 if self.kind == "refresh" else 0.0  # what is kept was made in batches of other sizes
        told = [] if found.rows == expected.rows else [f"rows {[row['key'] for row in found.rows]}"]
        told += [
            own for own in expected.vectors if not np.allclose(found.vectors[own], expected.vectors[own], rtol=0, atol=near)
        ]
        files = {path.relative_to(self.out) for path in self.out.rglob("*")}
        return told + [f"left over or missing: {path}" for path in files ^ self.files]


def killed_at_each(scenario: Scenario, step: int, first: int = 0) -> tuple[int, list[str]]:
    wrong = list[str]()
    for kills, operation in enumerate(count(first, step)):
        scenario.reset()
        done = ended(forked(lambda at=operation: (Killed(scenario.out, at), scenario.run(scenario.out))))
        if done == 0:
            return kills, wrong
        again = ended(forked(lambda: scenario.run(scenario.out)))
        if done != -signal.SIGKILL or again:
            wrong.append(f"operation {operation}: ended with {done}, then {again}")
        else:
            wrong += [f"operation {operation}: {told}" for told in scenario.wrong()]
    raise AssertionError


def as_ranks(scenario: Scenario, world: int) -> list[str]:
    scenario.reset()
    ends = [ended(pid) for pid in scenario.ranks(world, scenario.out)]
    return [f"ranks ended with {ends}"] if any(ends) else scenario.wrong()


def killed_at_random(scenario: Scenario, times: int, world: int = 1) -> tuple[int, list[str]]:
    """A rank of the job is killed, the others then; started again on another number of ranks."""
    wrong, kills, rng = list[str](), 0, random.Random(0)
    scenario.reset()
    start = time.monotonic()
    assert all(ended(pid) == 0 for pid in scenario.ranks(world, scenario.out))
    longest = time.monotonic() - start
    for _ in range(times):
        scenario.reset()
        pids = scenario.ranks(world, scenario.out)
        time.sleep(slept := rng.uniform(0, longest))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed = any([ended(pid) for pid in pids])
        kills += killed
        if not killed:  # the machine has less to do than when the first was timed
            longest = slept
        if any([ended(pid) for pid in scenario.ranks(rng.choice([1, 2, 3]), scenario.out)]):
            wrong.append("the second run failed")
        else:
            wrong += scenario.wrong()
    return kills, wrong


def main(folder: str, kind: str, how: str, number: str) -> None:
    scenario = Scenario(kind, Path(folder))
    if how == "ranks":
        found = 0, as_ranks(scenario, int(number))
    elif how == "quick":
        kills, wrong = killed_at_each(scenario, int(number), int(number) // 2)
        found = kills, wrong + as_ranks(scenario, 2)
    elif how == "each":
        found = killed_at_each(scenario, int(number))
    else:
        found = killed_at_random(scenario, int(number), 2 if how == "random-ranks" else 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

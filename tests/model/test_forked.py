"""Processes that are forked after a model was used: they work or say what to do, and never hang."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfast.model import CLIP, forked
from tests.train.test_train import SIZES

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
SCRIPT = """
import multiprocessing, sys, torch
from tests.model.test_forked import MADE, encoded, tiny
from tests.train.test_train import pairs
torch.set_num_threads(2)
MADE.extend((tiny(), pairs(0, rows=64, side=64)))
first = encoded()
for threads in (1, 2):
    pool = multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (threads,))
    try:
        print(all(map(torch.equal, first, pool.apply_async(encoded).get(60))))
    except RuntimeError as error:
        print(error)
"""


MADE: list[Any] = []  # by the process that is forked


def tiny() -> CLIP:
    return CLIP(**SIZES | {"image_resolution": 64}).eval()


def encoded() -> list[torch.Tensor]:
    model, batch = MADE
    with torch.no_grad():
        return [model.encode_text(batch.tokens), model.encode_image(batch.pixels)]


@pytest.mark.slow
def test_a_forked_process_computes_with_one_thread_and_else_says_what_to_do() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, stdout=-1, text=True, timeout=300, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "True" and "spawn, or call torch.set_num_threads(1)" in second


def state(found: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        forked.check_threads(torch.zeros(1))
        found.send("fine")
    except RuntimeError as error:
        found.send(str(error))


@pytest.mark.parametrize(("started", "threads", "fine"), [(True, 2, False), (True, 1, True), (False, 2, True)])
def test_a_process_that_computed_nothing_may_be_forked(monkeypatch, started: bool, threads: int, fine: bool) -> None:
    monkeypatch.setattr(forked, "_started", started)
    monkeypatch.setattr(forked, "_lost", False)
    found, other = FORK.Pipe(False)
    process = FORK.Process(target=state, args=(other, threads))
    process.start()
    assert (found.recv() == "fine") == fine
    process.join()

"""All readers in one child, in turn: the quick part of the soak."""

from __future__ import annotations

import os
import random
from importlib import import_module
from pathlib import Path

from tests.hostile.harness import READERS, Attempt

TURNS = [name for name, (per, _, inputs) in READERS.items() for _ in range(inputs // per)]
random.Random(0).shuffle(TURNS)


def prepare(folder: Path) -> Attempt:
    attempts = {}
    for name in READERS:
        (home := folder / name).mkdir()
        os.chdir(home)
        attempts[name] = import_module(f"tests.hostile.{name}").prepare(home), home

    def attempt(rng: random.Random) -> str:
        number = rng.randrange(1 << 40)
        name = TURNS[number % len(TURNS)]
        judge, home = attempts[name]
        os.chdir(home)
        what = judge(random.Random(f"{name} {number}"))
        return what and f"{name} --first {number}: {what}"

    return attempt

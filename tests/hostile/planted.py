"""A reader with one fault of each kind, so that the harness itself is known to find them."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from tests.hostile.harness import Attempt


def prepare(folder: Path) -> Attempt:
    def attempt(number: int) -> str:
        if number == 2:
            return "a wrong answer"
        if number == 4:
            os.abort()
        if number == 6:
            bytearray(1 << 42)
        if number == 8:
            time.sleep(1000)
        return ""

    return lambda rng: attempt(numbers[rng.random()])


numbers = {random.Random(f"planted {number}").random(): number for number in range(10)}

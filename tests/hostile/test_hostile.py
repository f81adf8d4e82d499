"""The quick part of the soak: every reader against its oracle on damaged inputs, in a child with limits. Long: make soak."""

import time

from tests.hostile import harness
from tests.hostile.quick import TURNS


def test_the_harness_finds_each_kind_of_fault(monkeypatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 1)
    found = harness.run("planted", 0, 10)
    assert [(kind, number) for kind, number, _ in found.faults] == [
        ("wrong", 2), ("crashed", 4), ("above memory", 6), ("hung", 8)
    ]  # fmt: skip
    assert found.inputs == 10 and "1 wrong, 1 crashed, 1 hung, 1 above memory" in str(found)


def test_readers_of_damaged_inputs() -> None:
    found = harness.run("quick", 0, len(TURNS), time.monotonic() + 120)
    assert not found.faults and found.inputs > 0, str(found)

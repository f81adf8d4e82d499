"""How a run is made on a machine of a given speed: slow ones see more drawings of fewer pixels, by a smaller text tower."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from clipfast.train import Batches, TrainConfig, train

UPDATES = 3, 8  # of a measurement: those before its clock starts, and those it takes the median of
SMALL, LARGE = 32, 48  # pixels a side; the ResNet ends in one place at both, so that its weights fit both


class Settings(NamedTuple):
    """What depends on the machine. A class of speeds and not the speed decides, so that runs on one machine are alike."""

    name: str
    least: float  # pairs/s with the largest settings, from which on these are taken
    blocks: int  # of the text transformer
    small: float  # share of the time that goes to drawings of 32 pixels, which comes first; the rest has 48


# A step of 128 pairs costs, on one core held to AVX2 (AMD Zen 4, shared, processor time): 48 pixels and two blocks 148 ms, one
# block 128; 32 pixels and two blocks 102, one block 82; a table of all 49,408 embeddings 8 more. Of a training style that was
# held out (twemoji) 300 steps of one block at 32 pixels named 5.9 / 17.7 % rightly, at 48 pixels 6.2 / 19.6 %, of two blocks
# 5.1 / 18.1 %: more steps are worth more.
# On that machine, alone, 300 s of medium end at 42.3 / 70.1 % in an unseen style, of large at 43.0 / 70.8 %: a tie at
# 1,400 pairs/s. Medium for 190 s, what a machine of 950 pairs/s sees in its time, ends at 37.6 / 66.8 %.
CHOICES = (Settings("small", 0, 1, 0.75), Settings("medium", 700, 1, 0.6), Settings("large", 1800, 2, 0.0))
# The share of training drawings on white, as those of the test are; the others are on a random colour. In the same 300 steps
# 0.85 gives 9.9 / 27.1 %, 1 gives 12.9 / 33.6 %; and where 256 concepts are learned nearly by heart in as many steps, named in
# two styles that were held out, 0.5 gives 28.5 / 48.2 %, 1 gives 31.6 / 49.8 %.
WHITE = 1.0


def settings(pairs_per_second: float) -> Settings:
    """Those for a machine that trains with the largest settings at this speed."""
    if not pairs_per_second > 0:
        raise ValueError(f"expected pairs_per_second above 0, got {pairs_per_second}")
    return max((one for one in CHOICES if one.least <= pairs_per_second), key=lambda one: one.least)


def speed(config: TrainConfig, batches: Batches) -> float:
    """Pairs a second of a few updates of a model that is thrown away: 1 to 5 seconds."""
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as aside:
        few = replace(config, out=aside, steps=sum(UPDATES), max_seconds=0.0, progress=False)
        train(few, batches, on_step=lambda step, model, metrics: ends.append(metrics["seconds"]))
    return config.batch_size / float(np.median(np.diff(ends[UPDATES[0] - 1 :])))


def described(chosen: Settings, pairs_per_second: float) -> str:
    """What was chosen, and why, in a sentence."""
    upper = min((one.least for one in CHOICES if one.least > chosen.least), default=None)
    span = f"from {chosen.least:,.0f}" + (f" to {upper:,.0f}" if upper else "") if chosen.least else f"below {upper:,.0f}"
    sides = f"drawings of {LARGE} pixels"
    if chosen.small:
        sides = f"drawings of {SMALL} pixels in the first {chosen.small:.0%} of the time, of {LARGE} in the rest"
    blocks = "one block" if chosen.blocks == 1 else f"{chosen.blocks} blocks"
    why = f"settings {chosen.name!r}, {span} pairs/s ({pairs_per_second:,.0f} measured)"
    return f"{why}: {sides}; {blocks} in the text tower"

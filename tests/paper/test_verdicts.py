"""Verdicts on made-up numbers: what the paper found, its contrary, and what is too little to tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clipfast.evaluate.few_shot import Worth
from clipfast.evaluate.overlap import overlaps
from paper import verdicts
from paper.verdicts import AGREES, NOT, OPEN

RNG = np.random.default_rng(0)
SETS = [f"set {number}" for number in range(12)]


def hits(accuracy: float, count: int = 400) -> list[int]:
    """Nested: who is right with less is right with more."""
    return (np.arange(count) < round(accuracy * count)).astype(int).tolist()


def around(mean: float, spread: float = 0.01) -> dict[str, float]:
    return {name: mean + spread * math.sin(number) for number, name in enumerate(SETS)}


SLOW = {100: hits(0.05), 1000: hits(0.1), 10000: hits(0.2)}


def test_a_speed_up_is_read_off_the_curves():
    fast = {100: hits(0.1), 1000: hits(0.2), 10000: hits(0.4)}
    assert verdicts.speedup(SLOW, fast) == pytest.approx(10)
    assert verdicts.speedup(fast, SLOW) == pytest.approx(0.1)
    assert verdicts.speedup(SLOW, {1000: hits(0.3), 10000: hits(0.4)}) == 10  # at least: where below 1,000 nobody looked
    assert math.isnan(verdicts.speedup({10: [0, 0]}, {10: [0, 0]}))
    between = {100: hits(0.1), 10000: hits(0.3)}
    assert verdicts.speedup(SLOW, between) == pytest.approx(10000 / 1000)


@pytest.mark.parametrize(
    ("fast", "expected"),
    [
        ({100: hits(0.1), 1000: hits(0.2), 10000: hits(0.4)}, AGREES),
        ({100: hits(0.01), 1000: hits(0.02), 10000: hits(0.1)}, NOT),
        (SLOW, OPEN),
    ],
)
def test_efficiency(fast, expected):
    found = verdicts.efficiency("slow", "fast", 3, {"slow": [SLOW], "fast": [fast]})
    assert found.agrees == expected and "400 drawings" in found.here and "at least" not in found.here
    found = verdicts.efficiency("slow", "fast", 3, {"slow": [SLOW], "fast": [{1000: hits(0.3), 10000: hits(0.4)}]})
    assert "at least 10.0 ×" in found.here


def test_seeds_that_differ_decide_nothing():
    """What one run would have decided."""
    fast, late = {100: hits(0.1), 1000: hits(0.2), 10000: hits(0.4)}, {100: hits(0.01), 1000: hits(0.02), 10000: hits(0.1)}
    assert verdicts.efficiency("slow", "fast", 3, {"slow": [SLOW], "fast": [fast, fast]}).agrees == AGREES
    found = verdicts.efficiency("slow", "fast", 3, {"slow": [SLOW], "fast": [fast, late]})
    assert found.agrees == OPEN and "ends at 25.0% of 400 drawings" in found.here
    compute = {"a": 1e6, "b": 3e6, "c": 9e6}
    down = {model: around(0.5 / own**0.1, 0.01) for model, own in zip(compute, (1, 3, 9), strict=True)}
    mixed = {"a": [down["a"], down["c"]], "b": [down["b"]], "c": [down["c"], down["a"]]}
    assert verdicts.scaling(compute, mixed).agrees == OPEN and "3 sizes, 5 runs" in verdicts.scaling(compute, mixed).here


def test_who_has_learned_nothing_decides_nothing():
    nothing = {100: hits(0.0025), 10000: hits(0.0025)}  # one of 400, which is chance
    found = verdicts.efficiency("slow", "fast", 3, {"slow": [nothing], "fast": [{100: hits(0.1), 10000: hits(0.4)}]})
    assert found.agrees == OPEN and found.here.endswith("no more than chance: “slow”")
    assert verdicts.learned(hits(0.03)) and not verdicts.learned(hits(0.005))


@pytest.mark.parametrize(("gain", "expected"), [(0.05, AGREES), (-0.05, NOT), (0.0, OPEN)])
def test_differences_over_sets(gain, expected):
    zero, other = around(0.5 + gain), around(0.5, -0.01)
    gains = {name: zero[name] - other[name] for name in SETS}
    assert verdicts.ensembling(gains).agrees == expected
    assert verdicts.representation(zero, other).agrees == expected


def test_wins_against_a_supervised_probe():
    better, worse = around(0.6), around(0.4)
    assert verdicts.against_supervised(better, worse).agrees == AGREES
    assert verdicts.against_supervised(worse, better).agrees == NOT
    mixed = {name: 0.6 if number % 2 else 0.2 for number, name in enumerate(SETS)}
    found = verdicts.against_supervised(mixed, worse)
    assert found.agrees == OPEN and "wins on 6 of 12" in found.here


@pytest.mark.parametrize(("level", "expected"), [(0.4, AGREES), (0.25, NOT), (0.55, NOT)])
def test_zero_shot_in_shots(level, expected):
    curve = {1.0: 0.2, 2.0: 0.3, 4.0: 0.4, 8.0: 0.5, 16.0: 0.6}
    curves = {name: {shot: own + 0.001 * number for shot, own in curve.items()} for number, name in enumerate(SETS)}
    zero = {name: level + 0.001 * number for number, name in enumerate(SETS)}
    wide = {name: own + 0.02 * math.cos(number) for number, (name, own) in enumerate(zero.items())}
    assert verdicts.few_shots_worth(curves, wide).agrees == expected


def test_a_wide_interval_agrees_with_nothing():
    """That the paper's number lies in it does not make it the paper's."""
    curves = {name: {1.0: 0.2, 2.0: 0.3, 4.0: 0.4, 8.0: 0.5} for name in SETS}
    zero = {name: 0.4 + 0.3 * math.cos(number) for number, name in enumerate(SETS)}
    assert verdicts.few_shots_worth(curves, zero).agrees == OPEN
    found = verdicts.few_shots_worth(curves, dict.fromkeys(SETS, 0.55))  # more than eight: how much more nobody knows
    assert found.agrees == NOT and "> 8 examples a class (∞ to ∞)" in found.here


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ((1, 3, 4, 4, 5, 5.4, 5.4, 6, 7, 8, 20, 100), AGREES),
        ((1, 1, 1, 1, 2, 5.4, 6, 20, 40, 90, 100, 184), OPEN),
        ((1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 40, 100), NOT),
    ],
)
def test_examples_needed(examples, expected):
    worth = {name: Worth(float(own), "<" if own == 1 else "") for name, own in zip(SETS, examples, strict=True)}
    found = verdicts.examples_needed(worth)
    assert found.agrees == expected and f"from < 1 to {examples[-1]}" in found.here


def test_the_correlation_with_the_probe():
    probe = dict(zip(SETS, np.linspace(0.3, 0.9, 12).tolist(), strict=True))
    assert verdicts.correlation({name: own - 0.1 for name, own in probe.items()}, probe).agrees == AGREES
    assert verdicts.correlation({name: 1 - own for name, own in probe.items()}, probe).agrees == NOT
    noise = dict(zip(SETS, RNG.random(12).tolist(), strict=True))
    assert verdicts.correlation(noise, probe).agrees == OPEN


def test_scaling():
    compute = {"a": 1e6, "b": 3e6, "c": 9e6}
    down = {model: [around(0.5 / own**0.1, 0.01)] for model, own in zip(compute, (1, 3, 9), strict=True)}
    assert verdicts.scaling(compute, down).agrees == AGREES
    up = dict(zip(compute, reversed(down.values()), strict=True))
    assert verdicts.scaling(compute, up).agrees == NOT
    flat = {
        model: [{name: 0.5 + 0.05 * math.sin(7 * number + place) for number, name in enumerate(SETS)}]
        for place, model in enumerate(compute)
    }
    assert verdicts.scaling(compute, flat).agrees == OPEN


@pytest.mark.parametrize(("more", "expected"), [(0.1, AGREES), (-0.1, NOT), (0.01, OPEN)])
def test_robustness(more, expected):
    """The line is y = x / 2; its zero-shot models stand so much above it, as seen on 400 images."""
    found = {str(own): model("standard", own, own / 2) for own in (0.3, 0.35, 0.4, 0.45, 0.5)}
    found |= {name: model("zero-shot", base, base / 2 + more) for name, base in (("a", 0.38), ("b", 0.42))}
    told = verdicts.robust(found)
    assert told.agrees == expected and "of 2 zero-shot models" in told.here
    assert more == pytest.approx(float(told.here.split("models ")[1].split("%")[0]) / 100, abs=0.004)


def model(kind: str, base: float, shifted: float, count: int = 400) -> dict:
    """Who is right on other images than the other models."""
    rng = np.random.default_rng(round(1000 * base))
    return {"kind": kind, "base": rng.permutation(hits(base, count)), "shifted": rng.permutation(hits(shifted, count))}


def test_the_noise_of_few_images_decides_no_robustness():
    found = {str(own): model("standard", own, own / 2, 40) for own in (0.3, 0.4, 0.5)}
    found["a"] = model("zero-shot", 0.4, 0.3, 40)
    assert verdicts.robust(found).agrees == OPEN


def test_a_line_that_does_not_rise_promises_nothing():
    found = {str(own): model("standard", own, 0.5 - own / 2) for own in (0.3, 0.35, 0.4, 0.45, 0.5)}
    found["a"] = model("zero-shot", 0.4, 0.6)
    told = verdicts.robust(found)
    assert told.agrees == OPEN and told.here.endswith("accuracy in the base style promises none in the other")


def test_adapting():
    zero = {"base": hits(0.5), "shifted": hits(0.45)}
    assert verdicts.adapted(zero, {"base": hits(0.7), "shifted": hits(0.45)}).agrees == AGREES
    assert verdicts.adapted(zero, {"base": hits(0.5), "shifted": hits(0.7)}).agrees == NOT
    assert verdicts.adapted(zero, zero).agrees == OPEN


def test_overlap():
    right, seen = np.arange(2000) % 2 == 0, np.arange(2000) < 20
    few = overlaps({"a": right}, {"a": seen}).sets  # a hundredth of them, of which at most four fifths are right
    assert verdicts.overlapping(few).agrees == AGREES
    low, high = verdicts.inflated(few[0])
    assert low < few[0].gain < high and high == pytest.approx(0.01 * (few[0].interval.high - few[0].clean))
    right, seen = right[:200], np.arange(200) < 10
    assert verdicts.overlapping(overlaps({"a": right}, {"a": seen}).sets).agrees == OPEN  # so few tell nothing of 0.6 points
    cheated = overlaps({"a": np.where(np.arange(200) < 60, True, np.arange(200) % 4 == 0)}, {"a": np.arange(200) < 60}).sets
    assert verdicts.overlapping(cheated).agrees == NOT
    luck = overlaps({"a": np.r_[np.ones(4, bool), np.arange(196) % 2 == 0]}, {"a": np.arange(200) < 4}).sets
    assert verdicts.overlapping(luck).agrees == OPEN
    assert verdicts.overlapping(overlaps({"a": right}, {"a": np.zeros(200, bool)}).sets).agrees == AGREES
    assert verdicts.overlapping(overlaps({"a": right}, {"a": np.ones(200, bool)}).sets).agrees == OPEN


def test_an_added_class():
    young = np.arange(200) < 40
    before = np.arange(200) % 3 == 0
    freed = before & ~(young & (np.arange(200) > 7))  # eleven of fourteen
    assert verdicts.added_class(before, freed, young).agrees == AGREES
    assert "of 14 wronged without it 11 are not with it" in verdicts.added_class(before, freed, young).here
    assert verdicts.added_class(before, before & young, young).agrees == NOT  # the adults alone are freed
    assert verdicts.added_class(before, before, young).agrees == NOT
    few = np.arange(200) < 4
    assert verdicts.added_class(before, before, few).agrees == OPEN  # two wronged, whom the class does not free
    assert verdicts.added_class(~before, before & ~few, few).agrees == OPEN
    assert verdicts.added_class(before & ~young, before, young).agrees == OPEN  # nobody to free
    assert verdicts.added_class(before, before, np.zeros(200, bool)).agrees == OPEN


def test_handwriting():
    assert verdicts.handwriting(hits(0.9), hits(0.2)).agrees == AGREES
    assert verdicts.handwriting(hits(0.2), hits(0.9)).agrees == NOT
    assert verdicts.handwriting(hits(0.5), hits(0.5)).agrees == OPEN
    found = verdicts.handwriting(hits(0.9), hits(0.11))  # what cannot read does not lose to pixels
    assert found.agrees == OPEN and found.here.endswith("zero-shot is no more than chance")

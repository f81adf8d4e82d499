"""How every benchmark here is timed: all contenders in turn within each round, so that a machine that drifts drifts for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import pytest
import torch

import bench.rivals  # noqa: F401 - makes the rivals importable beside a CPU torch
from bench.record import machine

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FILE", help="write the figures as JSON, for python -m bench.record")


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest) -> Callable[..., dict[str, float]]:
    """``compare(ours, rivals, rounds)``: times ours and every rival in turn; returns the speed-up over each.

    A rival may be a str, the reason why it does not run here: its row says so.
    """

    def run(ours: Callable[[], Any], rivals: dict[str, Callable[[], Any] | str], rounds: int = 7, items: int = 1, **note: Any):
        runnable = {name: rival for name, rival in rivals.items() if not isinstance(rival, str)}
        times: dict[str, list[float]] = {name: [] for name in runnable}

        def others() -> None:
            for name, rival in runnable.items():
                start = perf_counter()
                rival()
                _wait()
                times[name].append(perf_counter() - start)

        def target() -> None:
            ours()
            _wait()

        target(), others()  # warm-up: caches, lazy compilation
        for measured in times.values():
            measured.clear()
        benchmark.pedantic(target, setup=others, rounds=rounds)
        own = benchmark.stats.stats.data
        speedup = {name: median(r / o for r, o in zip(t, own, strict=True)) for name, t in times.items()}
        row = dict(
            group=request.node.path.stem.removeprefix("test_"),
            name=_name(request.node),
            ms=_spread(own),
            items_per_s=items / median(own) if items > 1 else None,
            rivals={n: dict(ms=_spread(t), speedup=speedup[n]) for n, t in times.items()}
            | {n: dict(absent=r) for n, r in rivals.items() if isinstance(r, str)},
            **note,
        )
        benchmark.extra_info.update(speedup)
        ROWS.append(row)
        return speedup

    return run


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _name(node: pytest.Item) -> str:
    """Of the row: the parameters, behind the function's name where that says more than its file's."""
    own = node.originalname.removeprefix("test_").replace("_", " ")  # type: ignore[attr-defined]
    parameters = node.callspec.id if hasattr(node, "callspec") else ""
    return parameters if own == "op" else f"{own} {parameters}".strip()


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile, in ms."""
    fifths = quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
    return dict(median=1e3 * median(seconds), p20=1e3 * fifths[0], p80=1e3 * fifths[3])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    terminalreporter.section("clipfast against its rivals: interleaved rounds, medians")
    for row in ROWS:
        rate = f"{row['items_per_s']:10,.0f}/s" if row["items_per_s"] else " " * 12
        rivals = ", ".join(
            f"{name} absent ({r['absent']})" if "absent" in r else f"{r['speedup']:.2f} x {name}"
            for name, r in row["rivals"].items()
        )
        terminalreporter.line(f"{row['group']:12} {row['name'][:44]:44} {row['ms']['median']:9.3f} ms {rate}  {rivals}")
    if file := config.getoption("--record"):
        Path(file).write_text(json.dumps(dict(machine=machine(), rows=ROWS), indent=1) + "\n")
        terminalreporter.line(f"written: {file}")

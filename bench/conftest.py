"""How every benchmark here is timed: all contenders in turn within each round, so that a machine that drifts drifts for all."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

import bench.rivals  # noqa: F401 - makes the rivals importable beside a CPU torch
from bench import lines, measure
from bench.tables import absent

SECONDS = 1.0  # of a row's rounds; more only where three rounds take longer
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", metavar="FILE", type=Path, help="append each row to it as soon as it is there: bench/lines.py")
    parser.addoption("--full", action="store_true", help="the long grid: all sizes whatever the device, and more rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="with --full only"))


@functools.cache
def ceilings(file: Path | None) -> dict[str, float]:
    """The roofline that is among the lines of the file, else as it is now."""
    if file and (found := lines.of(lines.read(file), "roofline")):
        return found[0]
    measured = measure.roofline()
    lines.append(file, "roofline", **measured)
    return measured


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what was imported stays: of each of some 200 collections it would take a quarter of a second


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the long grid is asked for."""
    return request.config.getoption("--full")


@pytest.fixture
def compare(benchmark, full: bool, request: pytest.FixtureRequest) -> Iterator[Callable[..., dict[str, float]]]:
    """``compare(ours, rivals)``: times ours and every rival in turn; returns the speed-up over each.

    A rival may be a str, the reason why it does not run here: its row says so, as of one that raises. ``rounds``: without, as
    many as fit into ``SECONDS``, 3 to 21; with ``--full`` three times as many. ``items``: what one call works through, for a
    rate. ``floor``: its (FLOPs, bytes), for the share of the roofline. ``graphs``: on a GPU, calls shorter than
    ``measure.SHORT`` may be timed as captured graphs, all or none. ``rest``: seconds before each call, in which the threads of
    what was called before, which may wait in a loop for more, go to sleep. Anything else is kept in the row.
    """

    file: Path | None = request.config.getoption("--lines")
    written: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def run(
        ours: Callable[[], Any],
        rivals: dict[str, Callable[[], Any] | str],
        rounds: int | None = None,
        items: int | None = None,
        floor: tuple[int, int] | None = None,
        graphs: bool = False,
        rest: float = 0.0,
        **note: Any,
    ) -> dict[str, float]:
        roof = ceilings(file)
        start = perf_counter()
        rivals = {name: rival if isinstance(rival, str) else _tried(rival) for name, rival in rivals.items()}
        ours()  # the warm-up of all: caches, lazy compilation
        calls = {"": ours} | {name: rival for name, rival in rivals.items() if not isinstance(rival, str)}
        if rounds is None:
            once = perf_counter() - start
            if once < 2 or measure.DEVICE == "cuda":  # what takes longer takes three rounds, whatever of it is the warm-up's
                once = _turn(calls)
            rounds = min(21, max(3, int(SECONDS / once)))
        replays = _graphs(calls) if graphs and measure.DEVICE == "cuda" else None
        times: dict[str, list[float]] = {name: [] for name in calls}

        def turn(name: str) -> None:
            times[name].append(measure.seconds((replays or calls)[name], replays is not None, rest))

        def others() -> None:
            for name in list(calls)[1:]:
                turn(name)

        benchmark.pedantic(turn, args=("",), setup=others, rounds=3 * rounds if full else rounds)
        benchmark.stats.stats.data[:] = times[""]  # its table shall show what ours is, without the eviction
        memory = {name: measure.peak_memory(call) for name, call in calls.items()}
        own = times.pop("")
        speedup = {name: median(r / o for r, o in zip(t, own, strict=True)) for name, t in times.items()}
        row = dict(
            group=request.node.path.stem.removeprefix("test_"),
            name=_name(request.node),
            ms=measure.spread(own),
            memory=memory[""],
            items_per_s=items / median(own) if items else None,
            roofline=floor,
            rivals={n: dict(ms=measure.spread(t), speedup=speedup[n], memory=memory[n]) for n, t in times.items()}
            | {n: dict(absent=r) for n, r in rivals.items() if isinstance(r, str)},
            **note,
        )
        benchmark.extra_info.update(speedup)
        lines.append(file, "row", **row)
        written.append((row, copy.deepcopy(row)))
        reached = measure.achieved(floor, median(own), roof) if floor else None
        ROWS.append(row | dict(roofline=reached))
        return speedup

    yield run
    for row, before in written:
        if row != before:  # a note that was filled in since
            lines.append(file, "row", **row)


def _tried(rival: Callable[[], Any]) -> Callable[[], Any] | str:
    """The rival after its first call, or what it raised."""
    try:
        rival()
    except Exception as error:  # noqa: BLE001 - whatever a rival raises is the reason
        if measure.DEVICE == "cuda":
            torch.cuda.empty_cache()
        return measure.reason(error)
    return rival


def _turn(calls: dict[str, Callable[[], Any]]) -> float:
    """Seconds of a call of each, with the eviction before it, which outlasts the short ones."""
    start = perf_counter()
    for call in calls.values():
        measure.seconds(call)
    return perf_counter() - start


def _graphs(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]] | None:
    """The calls as CUDA graphs, if all are short and all can be: a graph against a launch would not be like against like."""
    if max(measure.seconds(call) for call in calls.values()) > measure.SHORT:
        return None
    made: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        if (replay := measure.captured(call)) is None:
            return None
        made[name] = replay
    return made


def _name(node: pytest.Item) -> str:
    """Of the row: the parameters, behind the function's name where that says more than its file's."""
    own = node.originalname.removeprefix("test_").replace("_", " ")  # type: ignore[attr-defined]
    parameters = node.callspec.id if hasattr(node, "callspec") else ""
    return parameters if own == "op" else f"{own} {parameters}".strip()


def line(row: dict[str, Any]) -> str:
    """A row for the eye: ours in ms and its spread, rate, roofline and memory, then the rivals."""
    ms, roof = row["ms"], row["roofline"]
    parts = [f"{row['group'][:10]:10} {row['name'][:34]:34} {ms['median']:9.3f} ms ({ms['p20']:.3f}-{ms['p80']:.3f})"]
    if row["items_per_s"]:
        parts.append(f"{row['items_per_s']:,.0f}/s")
    if roof:
        unit, size = ("GB/s", 1e9) if roof["limit"] == "bytes" else ("TFLOP/s", 1e12)
        parts.append(f"{roof['rate'] / size:.4g} {unit}, {roof['share']:.0%} of the roofline")
    if row["memory"] is not None:
        parts.append(f"{row['memory'] / 1e6:,.1f} MB")
    for name, r in row["rivals"].items():
        if "absent" not in r:
            memory = "" if r["memory"] is None else f" ({r['memory'] / 1e6:,.1f} MB)"
            parts.append(f"{r['speedup']:.2f} x {name}{memory}")
    return "  ".join([*parts, *absent(row)])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    roof = ceilings(config.getoption("--lines"))
    terminalreporter.section("clipfast against its rivals: interleaved rounds, medians (p20-p80), peak memory")
    terminalreporter.line(
        f"roofline of this run: copy {roof['bytes_per_s'] / 1e9:,.0f} GB/s, matmul in {str(measure.DTYPE)[6:]} "
        f"{roof['flops_per_s'] / 1e12:.3g} TFLOP/s; {measure.memory_lacks() or 'memory is what a call needs at its peak'}"
    )
    for row in ROWS:
        terminalreporter.line(line(row))

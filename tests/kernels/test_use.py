"""`use`: whose ops a forced backend runs, those of the thread, of the task, of the backward pass, and nobody else's."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch, forced
from clipfast.kernels.dispatch import use

NAMES = ["torch", "reference", "cpu", "triton"]


def test_each_thread_has_its_own() -> None:
    """All are inside at once, at each of 50 meetings, and one is inside none."""
    meet, seen = threading.Barrier(len(NAMES) + 1), {}

    def inside(name: str | None) -> None:
        found = set()
        for _ in range(50):
            if name is None:
                meet.wait()
                found.add(dispatch.forced())
                continue
            with use(name):
                meet.wait()
                found.add(dispatch.forced())
        seen[name] = found

    with ThreadPoolExecutor(len(NAMES) + 1) as pool:
        list(pool.map(inside, [*NAMES, None]))
    assert seen == {name: {name} for name in [*NAMES, None]}
    assert dispatch.forced() is None


def test_a_thread_started_inside_chooses_for_itself() -> None:
    with use("torch"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(dispatch.forced).result() is None


def test_each_task_has_its_own() -> None:
    """Tasks of one thread take turns inside, and leave in the order in which they came, not in its reverse."""
    seen: list[tuple[str | None, str | None]] = []

    async def inside(name: str, turns: int) -> None:
        with use(name):
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append((name, dispatch.forced()))

    async def nobody() -> None:
        for _ in range(6):
            await asyncio.sleep(0)
            seen.append((None, dispatch.forced()))

    async def all_of_them() -> None:
        await asyncio.gather(nobody(), *(inside(name, turns) for turns, name in enumerate(NAMES, 1)))
        with use("cpu"):
            assert await asyncio.create_task(asyncio.to_thread(dispatch.forced)) == "cpu"  # it starts from here

    asyncio.run(all_of_them())
    assert len(seen) == 6 + 1 + 2 + 3 + 4 and all(name == found for name, found in seen)
    assert dispatch.forced() is None and forced._thread.told.backend is None


def test_nested_and_left_by_an_exception() -> None:
    with use("torch"):
        with pytest.raises(KeyError), use("cpu"):
            assert dispatch.forced() == "cpu"
            raise KeyError
        with use("reference"):
            assert dispatch.forced() == "reference"
        assert dispatch.forced() == "torch"
    assert dispatch.forced() is None


@pytest.mark.parametrize("name", ["fast", "Torch", "", None])
def test_an_unknown_name_is_refused_where_it_is_given(name: Any) -> None:
    """`linear` would never notice: it calls the vendor's function unless its own backend is asked for."""
    with pytest.raises(ValueError, match=f"use: expected one of cuda, .*, reference, got {name!r}"), use(name):
        pass
    assert dispatch.forced() is None


def test_the_variable_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> ModuleType:
        spec = importlib.util.spec_from_file_location("fresh", forced.__file__)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setenv("CLIPFAST_BACKEND", "torch")
    module = fresh()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(module.forced).result() == "torch"
        with module.use("cpu"):
            assert (module.forced(), pool.submit(module.forced).result()) == ("cpu", "torch")
    assert module.forced() == "torch"
    monkeypatch.setenv("CLIPFAST_BACKEND", "quick")
    with pytest.raises(ValueError, match="CLIPFAST_BACKEND: expected one of cuda, .*, reference, got 'quick'"):
        fresh()


class Deep(torch.autograd.Function):
    """Backward passes within backward passes: at 60 autograd goes on in a thread of its own, as it does on a GPU at once."""

    @staticmethod
    def forward(ctx, x: Tensor, depth: int, seen: set) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:  # type: ignore[override]
        ctx.seen.add((threading.get_ident(), dispatch.forced()))
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones((), requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return dy, None, None


def test_a_backward_pass_in_autograds_thread_is_the_callers() -> None:
    def of(backend: str | None) -> set[str | None]:
        seen: set = set()
        y = Deep.apply(torch.ones((), requires_grad=True), 70, seen)
        if backend:
            with use(backend):
                y.backward()
        else:
            y.backward()
        assert len({thread for thread, _ in seen}) == 2
        return {found for _, found in seen}

    assert of("reference") == {"reference"}
    assert of("torch") == {"torch"}
    with ThreadPoolExecutor(1) as pool, use("cpu"):
        assert pool.submit(of, None).result() == {None}
        assert pool.submit(of, "torch").result() == {"torch"}
    assert of(None) == {None}


def normed(x: Tensor, w: Tensor) -> Tensor:
    return kernels.layer_norm(x, w, w)


@pytest.fixture
def graphs() -> Any:
    """A compiler backend that keeps which functions stand in each graph."""
    made: list[set[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    torch.compiler.reset()
    keep.made = made  # type: ignore[attr-defined]
    return keep


def test_a_graph_is_that_of_its_thread(graphs: Any) -> None:
    """Layer norm is torch's own, or the operator where a backend is forced: one graph each, in whichever thread it is asked."""
    x, w = torch.randn(3, 8), torch.randn(8)
    compiled = torch.compile(normed, fullgraph=True, backend=graphs)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compiled, x, w).result()
        with use("torch"):
            compiled(x, w)
            pool.submit(compiled, x, w).result()
        assert ["clipfast" in str(graph) for graph in graphs.made] == [False, True, False]
        for _ in range(3):  # all are there: nothing is compiled again
            with use("torch"):
                compiled(x, w)
                pool.submit(compiled, x, w).result()
            compiled(x, w)
    assert len(graphs.made) == 3


def test_within_what_is_compiled_it_is_refused_or_runs_uncompiled(graphs: Any) -> None:
    x, w = torch.randn(3, 8), torch.randn(8)
    seen: list[str | None] = []

    def inside(x: Tensor) -> Tensor:
        with use("torch"):
            y = normed(x, w)
            seen.append(dispatch.forced())
        return y

    with pytest.raises(Exception, match="use.*expected outside of what is compiled"):
        torch.compile(inside, fullgraph=True, backend=graphs)(x)
    assert torch.equal(torch.compile(inside, backend=graphs)(x), normed(x, w)) and seen == ["torch"]

"""The benchmark tools: what they measure with, how they compare and draw, what a build weighs. No test here asserts a speed."""

from __future__ import annotations

import ast
import copy
import ctypes
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from bench import compare, lines, measure, plot, run, sizes, stages, tables
from bench.record import machine, problems
from clipfast import kernels
from clipfast.kernels import dispatch, passed

ROOT = Path(__file__).parents[2]


def row(group="kernels", name="mlp a", ms=10.0, noise=0.01, rivals=None, **more: Any) -> dict[str, Any]:
    """A row as bench/conftest.py writes it; ``rivals``: ms by name."""

    def spread(median: float) -> dict[str, float]:
        return dict(median=median, p20=median * (1 - noise), p80=median * (1 + noise))

    others = {n: dict(ms=spread(r), speedup=r / ms, memory=2 << 20) for n, r in (rivals or {"eager": 15.0}).items()}
    made = dict(group=group, name=name, op="mlp", ms=spread(ms), memory=1 << 20, items_per_s=None, rivals=others, roofline=None)
    return made | more


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    return dict(machine=machine(), roofline=dict(bytes_per_s=5e10, flops_per_s=2e11), rows=list(rows), tests={})


# ---- measuring ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(measure.DEVICE == "cuda", reason="the CPU's way to measure")
def test_peak_memory_sees_what_is_freed_again() -> None:
    if reason := measure.memory_lacks():
        pytest.skip(reason)
    size = 24 << 20

    def two_after_one_another() -> None:
        for _ in range(2):
            torch.full((size,), 1, dtype=torch.uint8)

    for call, expected in ((lambda: None, 0), (two_after_one_another, size), (lambda: torch.ones(size // 4).exp(), 2 * size)):
        call()
        assert measure.peak_memory(call) == pytest.approx(expected, abs=2 << 20)


@pytest.mark.skipif(measure.DEVICE == "cuda", reason="the CPU's way to measure")
def test_peak_memory_does_not_depend_on_gaps_in_the_heap() -> None:
    """Gaps that just hold a block: the leftovers of the first block of a call are in use, so that the second takes another."""
    libc = ctypes.CDLL(None)
    if measure.memory_lacks() or not hasattr(libc, "mallinfo2"):
        pytest.skip("no glibc of Linux")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    size = 24 << 20

    def two_after_one_another() -> None:
        for _ in range(2):
            torch.full((size,), 1, dtype=torch.uint8)

    two_after_one_another()
    measure.peak_memory(two_after_one_another)  # blocks of less than 32 MB come from the heap from here on
    for seed in range(8):
        rng = random.Random(seed)
        blocks = [libc.malloc(size + 16 * rng.randint(0, 200)) for _ in range(9)]
        for block in blocks[::2]:
            libc.free(block)
        assert measure.peak_memory(two_after_one_another) == pytest.approx(size, abs=2 << 20)
        for block in blocks[1::2]:
            libc.free(block)


def test_a_machine_without_clear_refs_has_no_figure_but_a_reason(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "absent" / "clear_refs")
    measure.memory_lacks.cache_clear()
    try:
        assert "needs Linux" in str(measure.memory_lacks()) and measure.peak_memory(lambda: None) is None
    finally:
        measure.memory_lacks.cache_clear()


def test_spread_and_share_of_the_roofline() -> None:
    assert measure.spread([0.003]) == dict(median=3, p20=3, p80=3)
    assert measure.spread([0.001 * k for k in range(1, 12)]) == pytest.approx(dict(median=6, p20=3, p80=9))
    ceilings = dict(bytes_per_s=1e10, flops_per_s=1e12)
    moving = measure.achieved((10**9, 10**8), 0.02, ceilings)  # 10 ms to move, 1 ms to compute
    assert (moving["limit"], moving["rate"], moving["share"]) == ("bytes", pytest.approx(5e9), pytest.approx(0.5))
    computing = measure.achieved((10**11, 10**8), 0.4, ceilings)
    assert (computing["limit"], computing["rate"], computing["share"]) == ("flops", pytest.approx(2.5e11), pytest.approx(0.25))


def test_every_benchmark_case_has_its_floor_and_its_inputs() -> None:
    for op, home in kernels.OPS.items():
        for case in (*home.spec.BENCH.values(), *getattr(home.spec, "BENCH_GPU", {}).values()):
            passes = home.spec.floors(4, **case)
            assert "forward" in passes and passes.keys() <= {"forward", "backward"}, op
            assert all(flops >= 0 and moved > 0 for flops, moved in passes.values()), op


def test_a_benchmark_runs_and_writes_a_valid_record(tmp_path: Path) -> None:
    """The fixture whole, on the quickest row: times, memory, roofline, an absent rival, the record."""
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "--benchmark-only", "-k", "layer_norm and text"]
    found = tmp_path / "lines.jsonl"
    done = subprocess.run([*command, "--lines", str(found)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = lines.record(lines.read(found))
    assert made and list(problems(made)) == []
    (one,) = made["rows"]
    assert one["name"] == "layer_norm text block" and one["rivals"]["eager"]["speedup"] > 0 and one["roofline"]["share"] > 0
    if not torch.cuda.is_available():
        assert one["rivals"]["Liger"] == {"absent": "measured on CUDA only"}
        assert "not run: apex, Liger, QuACK, compiled (measured on CUDA only)" in done.stdout


def test_a_rival_that_does_not_import_is_its_reason(monkeypatch) -> None:
    from bench import rivals, test_losses, test_towers

    assert rivals.imported("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    monkeypatch.setattr(test_losses, "open_clip", "gone")
    for name in ("clip", "siglip"):
        found = test_losses.contenders(name, 8, compiled=True)
        assert found["open_clip"] == found["compiled open_clip"] == "gone" and callable(found["ours"])
    monkeypatch.setattr(rivals, "imported", lambda module: "gone")
    assert rivals.open_clip_model({}, {}) == rivals.open_clip == "gone"
    assert test_towers.against("gone", print, False) == {"open_clip": "gone", "open_clip compiled": "gone"}


@pytest.mark.slow
def test_the_benchmarks_and_a_gpus_tests_are_collected_without_any_rival(tmp_path: Path) -> None:
    for name in ("open_clip", "torchvision", "timm", "transformers", "webdataset", "inf_cl", "siglip_kernel"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    files = [f"bench/test_{name}.py" for name in ("kernels", "losses", "towers", "text_and_images")]
    command = [sys.executable, "-m", "pytest", "-q", "--co", *files, "tests/loss/test_loss.py"]
    paths = dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"{file}: " in done.stdout for file in files), done.stdout


@pytest.mark.parametrize("asks", [False, True])
def test_what_asks_the_device_is_found_before_it_is_captured(monkeypatch, asks: bool) -> None:
    """Within a capture it would break the process. With torch's names for a GPU played."""
    mode, said = ["default"], []

    class Played:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        def __enter__(self) -> None:
            said.append("enter")

        def __exit__(self, *error: Any) -> None:
            said.append("exit")

        def wait_stream(self, stream: Any) -> None:
            pass

        replay = "replay"

    for name in ("Stream", "CUDAGraph", "stream", "graph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Played)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda name: mode.append(name))

    def call() -> None:
        said.append(mode[-1])
        if asks and mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    assert measure.captured(call) == (None if asks else "replay") and mode[-1] == "default"
    tried = ["enter", "default", "error"]
    assert said == ([*tried, "exit"] if asks else [*tried, "enter", "default", "exit", "exit"])


# ---- the run of make cpu-check and gpu-check ---------------------------------------------------------------------------------


def test_tests_are_counted_by_op_and_backend() -> None:
    """By the last result of each case; what a stage that was cut off did not come to is left."""
    begun = dict(line="tests", cases=3, kernel="0" * 64, key="k")
    found = [begun | dict(op="mlp", backend="torch"), begun | dict(op="batch_norm", backend="cpu")]
    one = dict(line="test", op="mlp", backend="torch", dtype="fp32")
    found += [one | dict(case="a", wrong="x"), one | dict(case="a", wrong=""), one | dict(case="b", wrong="output 0: error")]
    found += [dict(line="test", op="batch_norm", backend="cpu", case=case, dtype="fp32", wrong="") for case in "abc"]
    assert lines.tests(found) == {
        "mlp": {"torch": dict(passed=1, failed=1, left=1, kernel="0" * 64)},
        "batch_norm": {"cpu": dict(passed=3, failed=0, left=0, kernel="0" * 64)},
    }
    assert [*lines.passes(found)] == ["k"]


def test_the_tests_of_a_kernel_are_lines(tmp_path: Path, monkeypatch) -> None:
    """As the stage runs them: how many there are, then each; one that raises is one that failed."""
    monkeypatch.setattr(
        stages.check, "disagreements", lambda op, backend, given: ["wrong"] if given["x"].shape[0] == 1 else 1 / 0
    )
    stages.tests(tmp_path / "lines.jsonl", "mlp", "torch")
    found = lines.read(tmp_path / "lines.jsonl")
    counts = lines.tests(found)["mlp"]["torch"]
    assert counts["failed"] > 3 and counts["passed"] == counts["left"] == 0
    assert counts["kernel"] == passed.fingerprint("mlp", "torch")
    assert {one["wrong"] for one in lines.of(found, "test")} == {"wrong", "ZeroDivisionError: division by zero"}


def test_a_stage_is_killed_at_its_time_and_told(tmp_path: Path, capsys) -> None:
    """With all that it started, whatever it does about signals."""
    code = "trap '' INT TERM; echo begun; sleep 600 & echo $! > child; wait"
    runner = run.Runner(tmp_path, 60)
    runner.run([[run.Stage("a hang", ["sh", "-c", f"cd {tmp_path}; {code}"], 4)]])
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    for _ in range(100):  # a process dies some time after it was killed
        if not (alive := child.exists() and "State:\tZ" not in (child / "status").read_text()):
            break
        sleep(0.1)
    assert not alive
    (one,) = lines.of(lines.read(runner.path), "stage")
    assert one["code"] == "hung" and one["said"] == "begun\n" and "a hang: hung" in capsys.readouterr().out
    assert runner.run([[run.Stage("it", ["sh", "-c", "echo $X"], 60, {"X": "y"})]]) == [0]
    assert "==== it: 0 after" in (log := (tmp_path / "log.txt").read_text()) and log.endswith("\ny\n\n")


def test_a_gpus_run_installs_nothing_and_builds_at_need() -> None:
    recipe = (ROOT / "Makefile").read_text().split("gpu-first gpu-check gpu-multi:\n")[1].split("\n\n")[0]
    assert "pip" not in recipe and "setup" not in recipe and "$(SECONDS)" in recipe
    for kind in run.SECONDS:
        groups = run.plan(kind, Path("lines"))
        assert all(groups) and len({stage.name for group in groups for stage in group}) == sum(map(len, groups))
    assert sizes.FIRST.keys() == {op for op, _ in run.on_gpus("cuda", "triton")}
    assert sizes.PARTS.keys() == {op for op, _ in run.on_gpus("cuda")} and "sweep_kernel" in run._names()
    timed = [group for group in run.plan("check", Path("lines")) if any("--benchmark-only" in s.command for s in group)]
    assert len(timed) > 8 and all(len(group) == 1 for group in timed)


def test_a_cpus_run_measures_each_row_once_and_the_goals_first() -> None:
    groups = run.plan("cpu", Path("lines"))
    asked = [group[0].command[-1] for group in groups if "--benchmark-only" in group[0].command]
    assert asked[:-1] == [*run.GOALS.values()] and asked[-1] == f"not ({' or '.join(f'({goal})' for goal in asked[:-1])})"
    (tests,) = (group for group in groups if len(group) > 1)
    assert sorted(op for stage in tests for op in stage.command[-1].split(",")) == sorted(kernels.OPS)


def test_what_the_stages_need_is_what_they_import() -> None:
    """Of packages that are not Python's: those without which they do not start."""
    code = """
import sys
import clipfast, bench.stages, bench.ranks, tests.kernels.rows
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
print({name.partition(".")[0] for name, file in files.items() if "site-packages" in file})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    named = {name for names in run.NEEDS.values() for name in names.split()}
    assert set(run.NEEDS["clipfast"].split()) <= (found := ast.literal_eval(done.stdout.splitlines()[-1]))
    # Of torch's own needs, of the optional ones, and of how this clone is installed.
    ours = {"torchgen", "mpmath", "sympy", "typing_extensions", "simplejpeg", "_distutils_hack", "functorch"}
    assert {name for name in found - named - ours if not name.startswith("__editable__")} == set()


# ---- comparing two records ---------------------------------------------------------------------------------------------------


def saved(folder: Path, name: str, made: dict[str, Any]) -> str:
    (folder / name).write_text(json.dumps(made))
    return str(folder / name)


@pytest.mark.parametrize(
    ("new", "slower"),
    [
        (row(ms=10.3), False),  # within what quiet machines differ by
        (row(ms=12.0), True),
        (row(ms=12.0, noise=0.1), False),  # its own noise covers it
        (row(ms=12.0, rivals={"eager": 18.0}), False),  # the machine is slower, not the code
        (row(ms=10.0, rivals={"eager": 12.0}), True),  # a faster machine would have made it faster
        (row(ms=12.0, rivals={"other": 18.0}), True),  # no common rival: the time alone
        (row(ms=5.0), False),
    ],
)
def test_slower_is_what_noise_and_machine_do_not_explain(tmp_path: Path, capsys, new: dict[str, Any], slower: bool) -> None:
    paths = saved(tmp_path, "base.json", record(row())), saved(tmp_path, "new.json", record(new))
    assert compare.main(paths) == int(slower)
    assert ("slower   kernels: mlp a" in capsys.readouterr().out) == slower


def test_rows_of_one_record_and_records_of_two_machines(tmp_path: Path, capsys) -> None:
    base, new = record(row(), row(name="old")), record(row(), row(name="added"))
    paths = saved(tmp_path, "base.json", base), saved(tmp_path, "new.json", new)
    assert compare.main(paths) == 0
    said = capsys.readouterr().out
    assert "gone     kernels: old" in said and "new      kernels: added" in said and "1 rows in both: 0 slower" in said
    old = new["machine"]
    for another in ({"device": "another"}, {"instructions": "another"}):
        new["machine"] = old | another
        assert compare.main([paths[0], saved(tmp_path, "new.json", new)]) == 2
    assert compare.main([paths[0], saved(tmp_path, "new.json", new)]) == 2
    assert "expected records of one machine" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert compare.main([paths[0], str(tmp_path / "broken.json")]) == 2
    assert compare.main([paths[0], saved(tmp_path, "none.json", record())]) == 2


# ---- charts and tables -------------------------------------------------------------------------------------------------------


def full() -> dict[str, Any]:
    """A record with a row of every kind."""
    floor = measure.achieved((10**9, 10**7), 0.01, dict(bytes_per_s=5e10, flops_per_s=2e11))
    points = [dict(N=1024 << k, ms=4.0**k, bytes=1e6 * 2**k) for k in range(4)]
    series = {"ours": points, "open_clip": points[:2], "chunked": [dict(p, bytes=None) for p in points]}
    growth = row("losses", "growth clip", rivals={}, series=series, exponents=dict(ms=2.0, bytes=1.0), D=512)
    tower = row("towers", "encode text", rivals={"open_clip": 30.0, "compiled": 20.0}, items_per_s=400.0)
    tower["rivals"]["xformers"] = {"absent": "No module named 'xformers'"}
    return record(row(roofline=floor), growth, tower, row("end_to_end", "embed", items_per_s=40.0))


def test_charts_are_written_and_labelled(tmp_path: Path, monkeypatch) -> None:
    labels = []
    finish = plot.finish
    monkeypatch.setattr(plot, "finish", lambda figure, made, path: (labels.append(path.name), finish(figure, made, path))[1])
    assert plot.main([saved(tmp_path, "r.json", full()), str(tmp_path / "charts")]) == 0
    assert labels == ["losses.png", "roofline.png", "towers.png", "end_to_end.png"]
    for name in labels:
        assert (tmp_path / "charts" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    about = plot.label(full())
    assert machine()["device"] in about and torch.__version__ in about
    assert [path.name for path in plot.charts(record(row()), tmp_path)] == []
    assert plot.main([str(tmp_path / "absent.json"), str(tmp_path)]) == 2


def test_every_op_has_a_mark_of_its_own_under_the_roofline(tmp_path: Path, monkeypatch) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(plot, "finish", lambda figure, made, path: shown.extend(
        (line.get_marker(), line.get_color()) for line in figure.axes[0].lines if line.get_marker() != "None"
    ))  # fmt: skip
    floor = measure.achieved((10**9, 10**7), 0.01, dict(bytes_per_s=5e10, flops_per_s=2e11))
    plot.roofline(record(*(row(name=str(i), op=f"op {i}", roofline=floor) for i in range(11))), tmp_path / "r.png")
    assert len(shown) == len(set(shown)) == 11


def test_a_rival_has_one_colour_in_every_row(tmp_path: Path, monkeypatch) -> None:
    bars: list[Any] = []
    monkeypatch.setattr(plot, "finish", lambda figure, made, path: bars.extend(figure.axes[0].patches))
    rows = [row("towers", "a", rivals={"x": 20.0, "our loaded": 11.0, "y": 30.0}, items_per_s=5.0)]
    rows.append(row("towers", "b", rivals={"y": 30.0}, items_per_s=5.0))
    plot.bars(record(*rows), ("towers",), "Towers", tmp_path / "b.png")
    ours, x, loaded, y, _, also_y = (bar.get_facecolor() for bar in bars)
    assert y == also_y and len({ours, x, loaded, y}) == 4


def test_tables_hold_every_row() -> None:
    made = full()
    page, short = tables.page("here", made), tables.summary([made], [False])
    assert "| kernels: mlp a | 10.000 (9.900 to 10.100) |  | 100 GFLOP/s, 50% | 1.0 MB | 1.50 × eager (2.1 MB) |" in page
    assert "not run: xformers (No module named 'xformers')" in page and "xformers" not in short
    assert "| mlp, 1 sizes | 10.00 | 1.50 × eager | 2.00 × eager |" in short
    assert "| towers: encode text | 10.00 | 3.00 × open_clip, 2.00 × compiled | 1.0 MB; 2.0 × open_clip |" in short


def test_two_records_stand_side_by_side() -> None:
    """By the row; what one of them lacks is blank there."""
    both, one = row("towers", "encode text", rivals={"open_clip": 30.0}), row("losses", "clip", rivals={"open_clip": 20.0})
    first, second = record(both), record(row(), one, row("towers", "encode text", ms=20.0, rivals={"open_clip": 30.0}))
    second["machine"] |= dict(
        instructions="another", device="slow", held=True, commit="0123456789abcdef-dirty", date="2026-11-29 1"
    )
    short = tables.summary([first, second], [True, False])
    assert f"- {machine()['device']}, " in short and "have changed since" in short
    assert "- slow, held to another, " in short and "commit 0123456789-dirty, 2026-11-29; " in short
    assert "those of today" in short.split("- slow")[1]
    assert short.splitlines()[-5:] == [
        f"| what | {first['machine']['instructions']}: ours, ms | against | another: ours, ms | against | peak memory |",
        "|---|---|---|---|---|---|",
        "| towers: encode text | 10.00 | 3.00 × open_clip | 20.00 | 1.50 × open_clip | 1.0 MB; 2.0 × open_clip |",
        "| losses: clip |  |  | 10.00 | 2.00 × open_clip | 1.0 MB; 2.0 × open_clip |",
        "| mlp, 1 sizes |  |  | 10.00 | 1.50 × eager | 2.00 × eager |",
    ]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda r: r["machine"].pop("driver"), "missing: driver"),
        (lambda r: r["machine"]["kernels"].update(a="no hash"), "SHA-256 of every kernel"),
        (lambda r: r.update(tests={"mlp": {"cpu": dict(passed=-1, failed=0, left=0, kernel="0" * 64)}}), "counts of tests"),
        (lambda r: r["roofline"].pop("bytes_per_s"), "expected a roofline of"),
        (lambda r: r["rows"][0].update(roofline=dict(share=1, rate=1)) or r.pop("roofline"), "expected the roofline"),
        (lambda r: r.update(rows=[]), "tested or measured, got nothing"),
        (lambda r: r["rows"].append(copy.deepcopy(r["rows"][0])), "['kernels: mlp a'] twice"),
        (lambda r: r["rows"][0]["ms"].update(median=float("nan")), "0 < p20"),
        (lambda r: r["rows"][0]["rivals"]["eager"]["ms"].update(p20=1e9), "p20 <= median"),
        (lambda r: r["rows"][0].update(memory=-1), "expected bytes"),
    ],
)
def test_a_broken_record_is_found(break_it, said: str) -> None:
    made = record(row())
    assert list(problems(made)) == []
    break_it(made)
    assert said in " ".join(problems(made))


# ---- the build ---------------------------------------------------------------------------------------------------------------


def test_size_of_the_libraries() -> None:
    """What a wheel carries. A library that doubles has taken in something that it should not."""
    for kind, limit in (("cpu", 2 << 20), ("cuda", 16 << 20)):
        path = ROOT / "clipfast" / f"_C_{kind}.so"
        if path.exists():
            assert path.stat().st_size <= limit, f"{path.name}: {path.stat().st_size:,} bytes, expected at most {limit:,}"
    assert (ROOT / "clipfast" / "_C_cpu.so").exists() or dispatch.library("cpu")

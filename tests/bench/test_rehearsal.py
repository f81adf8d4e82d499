"""The runs of make gpu-first and gpu-check, rehearsed: whatever breaks, the record holds all that came from the other stages.

Quick: the real plans and the real runner, with stages that a shell plays. Slow: every stage as it is, on a stand-in that says
it is a GPU (stand_in.py), broken in each way, one at a time.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import lines, record, run
from clipfast.kernels import passed
from tests.bench.test_bench import row

KINDS = ("kill", "hang", "raise", "memory")
STAND_IN = str(Path(__file__).with_name("stand_in.py"))
# A stage as a shell plays it: the lines of what it is asked for, one before and one after the fault.
PLAY = r"""
say() { form=$1; shift; printf "\n$form\n" "$@" >> "$LINES"; }
grep -qs '"line": "machine"' "$LINES" || say '%s' "$MACHINE"
what="$*"
case "$what" in
    *" tests "*)
        set -- $what
        op=$5 by=$6
        say '{"line": "tests", "op": "%s", "backend": "%s", "cases": 2, "kernel": "%s", "key": "%s %s"}' $op $by $ZEROS $op $by
        found() { say '{"line": "test", "op": "%s", "backend": "%s", "case": "%s", "dtype": "", "wrong": ""}' $op $by $1; } ;;
    *) found() { say '{"line": "light", "op": "%s", "case": "%s"}' "$what" $1; } ;;
esac
found 1
if [ "$what" = "$WHOM" ]; then
    case $KIND in
        kill) kill -9 $$ ;;
        hang) trap '' INT TERM; exec sleep 60 ;;
        raise) echo 'RuntimeError: CUDA error'; exit 1 ;;
        memory) echo 'OutOfMemoryError: CUDA out of memory'; printf '\n{"line": "ro' >> "$LINES"; exit 1 ;;
    esac
fi
found 2
"""
MACHINE = record.machine() | dict(kind="gpu", device="Stand-in GPU", hardware="9.0")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU as far as the runner asks, stages of a second, a cache of passes of the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lines, "machine", lambda: MACHINE)
    monkeypatch.setattr(run, "LEAST", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "TOOLS", os.environ["PATH"] + os.pathsep + str(tmp_path))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stages played by a shell, each within a second."""
    script = tmp_path / "play.sh"
    script.write_text(PLAY)
    monkeypatch.setattr(run, "PYTHON", ("sh", str(script)))
    for tool in ("ncu", "compute-sanitizer"):  # what they run is behind their own options
        (tmp_path / tool).write_text('#!/bin/sh\nwhile [ "$1" != sh ]; do shift; done\nexec "$@"\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("MACHINE", json.dumps({"line": "machine", **MACHINE}))
    monkeypatch.setenv("LINES", str(tmp_path / "out" / "lines.jsonl"))
    monkeypatch.setenv("ZEROS", "0" * 64)
    return tmp_path / "out"


def broken(monkeypatch: pytest.MonkeyPatch, kind: str, one: run.Stage) -> None:
    """From here on this stage breaks."""
    monkeypatch.setenv("KIND", kind)
    monkeypatch.setenv("WHOM", " ".join(one.command[one.command.index("-m") :]) if "-m" in one.command else "")


def hold(out: Path, name: str, groups: list[run.Group], one: run.Stage, kind: str) -> dict[str, Any]:
    """The record holds both lines of every other stage, the first of the broken one, and how each ended."""
    made = json.loads((out / name).read_text())
    assert list(record.problems(made)) == []
    codes = {stage["name"]: stage["code"] for stage in made["stages"]}
    expected = {stage.name: 0 for group in groups for stage in group}
    assert codes == expected | {one.name: {"kill": -9, "hang": "hung"}.get(kind, 1)}
    said = next(stage["said"] for stage in made["stages"] if stage["name"] == one.name)
    assert {"raise": "CUDA error", "memory": "out of memory"}.get(kind, "") in said
    results = 2 * len(expected) - 1
    assert len(made["light"]) + sum(c["passed"] for found in made["tests"].values() for c in found.values()) == results
    assert not list(out.glob("*.part")) and {p.name for p in out.iterdir()} == {"lines.jsonl", "log.txt", name}
    return made


def rehearse(monkeypatch: pytest.MonkeyPatch, out: Path, which: str, kind: str, number: int) -> dict[str, Any]:
    plan = run.plan(which, out / "lines.jsonl")
    stages = [stage for group in plan for stage in group]
    one = stages[number % len(stages)]
    groups = [[replace(stage, seconds=0.5 if stage == one and kind == "hang" else 20) for stage in group] for group in plan]
    broken(monkeypatch, kind, one)
    monkeypatch.setattr(run, "plan", lambda *_: groups)
    assert run.main([which, str(out)]) == 1
    return hold(out, f"stand-in-gpu{'-first' if which == 'first' else ''}.json", groups, one, kind)


@pytest.mark.parametrize("which", ["first", "check"])
@pytest.mark.parametrize(("kind", "number"), [*zip(KINDS, (0, 5, 11, 16), strict=True)])
def test_one_stage_breaks_and_the_record_holds_the_others(
    played: Path, monkeypatch, which: str, kind: str, number: int
) -> None:
    rehearse(monkeypatch, played, which, kind, number)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["first", "check"])
def test_any_stage_breaks_and_the_record_holds_the_others(played: Path, monkeypatch, which: str, kind: str) -> None:
    for number in range(sum(map(len, run.plan(which, played)))):
        with monkeypatch.context() as patched:
            rehearse(patched, played, which, kind, number)


def test_time_ends_the_run_and_the_record_says_what_was_left(played: Path, monkeypatch) -> None:
    """A hang at the start takes all the time that there is."""
    groups = run.plan("check", played / "lines.jsonl")
    broken(monkeypatch, "hang", groups[0][0])
    assert run.main(["check", str(played), "0.7"]) == 1
    made = json.loads((played / "stand-in-gpu.json").read_text())
    assert list(record.problems(made)) == [] and len(made["light"]) == 1
    assert [s["code"] for s in made["stages"]] == ["hung"] + ["no time"] * (sum(map(len, groups)) - 1)


def test_what_passed_counts_from_then_on(played: Path, monkeypatch) -> None:
    """Kept between two groups, so that the benchmarks run what a user gets; what is not whole is not kept."""
    kept: list[set[str]] = []
    real = run.passed.keep
    monkeypatch.setattr(run.passed, "keep", lambda results: (kept.append(set(results)), real(results)))
    stages = [run.stage(played / "lines.jsonl", 20, "tests", op, "cuda") for op in ("attention", "contrastive")]
    broken(monkeypatch, "kill", stages[1])
    monkeypatch.setattr(run, "plan", lambda *_: [stages, [run.stage(played / "lines.jsonl", 20, "light", "mlp", "triton")]])
    run.main(["check", str(played)])
    assert kept == [{"attention cuda"}, {"attention cuda"}] and set(passed.kept()) == {"attention cuda"}
    tests = json.loads((played / "stand-in-gpu.json").read_text())["tests"]
    assert tests["contrastive"]["cuda"] == dict(passed=1, failed=0, left=1, kernel="0" * 64)


def test_a_tool_that_is_absent_and_a_run_of_which_nothing_is_known(played: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "PYTHON", ("gone",))
    assert run.main(["first", str(played)]) == 1
    assert "no record" in capsys.readouterr().err
    codes = {stage["code"] for stage in lines.of(lines.read(played / "lines.jsonl"), "stage")}
    assert codes <= {"absent", 127, 1, 2}


def test_what_the_stages_import_is_asked_for(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "NEEDS", {"clipfast": "torch no_such_module", "the rest": "neither_this"})
    assert run.main(["first", str(tmp_path / "out")]) == 2
    assert "clipfast needs no_such_module: install" in capsys.readouterr().err
    monkeypatch.setattr(run, "NEEDS", {"the rest": "neither_this"})
    monkeypatch.setattr(run, "plan", lambda *_: [])
    assert run.main(["first", str(tmp_path / "out")]) == 1
    assert "the rest needs neither_this" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["first", str(tmp_path / "out")]) == 2
    assert "expected a GPU" in capsys.readouterr().err


# ---- lines -------------------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines.append(path, "row", **row())
    with path.open("a") as file:
        file.write('{"line": "row", "na')
    lines.append(path, "row", **row(name="b"))
    assert [line["line"] for line in lines.read(path)] == ["machine", "row", "row"]
    made = lines.record(lines.read(path))
    assert made and [one["name"] for one in made["rows"]] == ["mlp a", "b"] and list(record.problems(made)) == []
    assert lines.record([]) is None


def test_shares_are_of_the_roofline_that_was_measured(tmp_path: Path) -> None:
    part = dict(op="mlp", backend="triton", size="a", forward_ms=1.0, ms=2.0, launches={"k": 1.0}, roofline=[10**9, 10**8])
    found: list[dict[str, Any]] = [dict(line="machine", **MACHINE), dict(line="row", **row(roofline=[10**9, 10**8]))]
    found.append(dict(line="part", **part))
    without = lines.record([dict(line) for line in found])
    assert without and without["rows"][0]["roofline"] is without["parts"][0]["roofline"] is without["roofline"] is None
    assert list(record.problems(without)) == []
    made = lines.record([*found, dict(line="roofline", bytes_per_s=1e11, flops_per_s=1e12)])
    assert made and made["rows"][0]["roofline"]["share"] == pytest.approx(0.1) and list(record.problems(made)) == []
    assert made["parts"][0]["roofline"]["share"] == pytest.approx(0.5)


# ---- as it is, on the stand-in -----------------------------------------------------------------------------------------------


def one_stage(monkeypatch: pytest.MonkeyPatch, out: Path, stages: list[run.Stage], fault: str = "") -> dict[str, Any]:
    monkeypatch.setenv("STAND_IN_FAULT", fault)
    monkeypatch.setattr(run, "plan", lambda *_: [stages])
    run.main(["check", str(out)])
    return json.loads((out / "stand-in-gpu.json").read_text())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(run, "PYTHON", (sys.executable, STAND_IN))
    return tmp_path / "out"


def test_first_light_and_tests_on_the_stand_in(stand_in: Path, monkeypatch) -> None:
    """Two at once, as they are on a GPU; one breaks behind its first case."""
    path = stand_in / "lines.jsonl"
    stages = [run.stage(path, 60, "light", "layer_norm", "triton"), run.stage(path, 60, "tests", "layer_norm", "cuda")]
    made = one_stage(monkeypatch, stand_in, stages, "kill tests layer_norm cuda")
    assert made["machine"]["device"] == "Stand-in GPU" and list(record.problems(made)) == []
    assert {(one["dtype"], one["wrong"]) for one in made["light"]} == {("bf16", ""), ("fp16", ""), ("fp32", "")}
    counts = made["tests"]["layer_norm"]["cuda"]
    assert (counts["passed"], counts["failed"], counts["left"]) == (1, 0, 5) and not passed.kept()
    assert {stage["code"] for stage in made["stages"]} == {0, -9}


def _every() -> list[str]:
    """The stages of both plans, those of one kernel for layer norm alone; not the two that have no tiny size."""
    stages = [stage for which in ("first", "check") for group in run.plan(which, Path("lines")) for stage in group]
    names = {stage.name for stage in stages if stage.command[0] not in ("ncu", "compute-sanitizer")} - {
        "other libraries",
        "tests of the losses",
    }
    of_one = re.compile(r"(light|tests|parts) (?!layer_norm|of)")
    return sorted(name for name in names if not of_one.match(name))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), list(enumerate(_every())))
def test_every_stage_on_the_stand_in_as_it_is_and_broken(stand_in: Path, monkeypatch, number: int, name: str) -> None:
    """Whole it ends well; broken, each in its way, it leaves what it had found."""
    groups = [group for which in ("first", "check") for group in run.plan(which, stand_in / "lines.jsonl")]
    one = replace(next(stage for group in groups for stage in group if stage.name == name), seconds=400)
    whole = one_stage(monkeypatch, stand_in, [one])
    assert whole["stages"][0]["code"] == 0, whole["stages"][0]["said"]
    kind = KINDS[number % len(KINDS)]
    whom = " ".join(one.command[one.command.index("-m") :])
    made = one_stage(monkeypatch, stand_in, [replace(one, seconds=60) if kind == "hang" else one], f"{kind} {whom}")
    assert made["stages"][0]["code"] == {"kill": -9, "hang": "hung"}.get(kind, 1)
    results = [sum(len(found[part]) for part in ("rows", "light", "parts", "tests")) for found in (whole, made)]
    assert 0 < results[1] <= results[0] or name == "roofline"
    assert name == "roofline" or list(record.problems(made)) == []


# ---- several ranks -----------------------------------------------------------------------------------------------------------


def one_rank(rank: int, path: str, port: int) -> None:
    """A process of torchrun's, over gloo and at tiny sizes."""
    from bench import ranks, sizes
    from clipfast.model import MODELS

    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    tiny = dict(image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16, transformer_width=64)
    MODELS["ViT-B/32"] |= tiny | dict(transformer_heads=1, transformer_layers=1, embed_dim=16)
    sizes.LOSSES, sizes.WIDTH, sizes.PAIRS, ranks.ROUNDS = [64], 16, [4], 1
    for what in ("losses", "ddp", "fsdp"):
        ranks.main(path, what)


@pytest.mark.slow
def test_the_ranks_of_gpu_multi_over_gloo(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_rank, (str(tmp_path / "lines.jsonl"), port), 2)
    made = lines.record(lines.read(tmp_path / "lines.jsonl"))
    assert made and list(record.problems(made)) == []
    assert {one["name"] for one in made["rows"]} == {
        "loss clip-64, 2 ranks", "loss siglip-64, 2 ranks", "ddp step ViT-B/32, 2 ranks", "fsdp step ViT-B/32, 2 ranks",
    }  # fmt: skip
    assert all(one["error"] < 1e-6 for one in made["rows"])

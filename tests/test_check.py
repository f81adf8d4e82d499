"""``clipfast check``, the policy that it applies, and what follows from a pass: a CUDA C++ kernel is chosen by itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch

from clipfast import check, cli, kernels
from clipfast.kernels import dispatch, passed

LAYER_NORM = kernels.OPS["layer_norm"]
SPEC = LAYER_NORM.spec


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder for the time of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    passed.lacks.cache_clear()
    return tmp_path / "clipfast" / "passed.json"


def as_backend(monkeypatch: pytest.MonkeyPatch, name: str, **changed) -> None:
    """Let layer_norm's backend be the spec's with some parts changed."""
    parts, real = vars(SPEC) | changed, LAYER_NORM.backend
    monkeypatch.setattr(LAYER_NORM, "backend", lambda which: SimpleNamespace(**parts) if which == name else real(which))


def wrong_by(factor: float):
    def forward(*args):
        y, *rest = SPEC.forward(*args)
        return y * factor, *rest

    return forward


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op, few cases, one small size to time."""
    monkeypatch.setattr(kernels, "OPS", {"layer_norm": LAYER_NORM})
    monkeypatch.setattr(dispatch, "BACKENDS", ("cpu", "torch"))
    monkeypatch.setattr(SPEC, "CASES", {k: SPEC.CASES[k] for k in ("C64", "residual", "no rows")})
    monkeypatch.setattr(SPEC, "BENCH", {"small": dict(shape=(4, 64))})


# ---- the policy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_right_backend_agrees_and_a_wrong_one_does_not(monkeypatch, dtype: torch.dtype) -> None:
    given = check.arguments("layer_norm", "C64", dtype, "cpu")
    assert check.disagreements("layer_norm", "torch", given) == []
    as_backend(monkeypatch, "cpu", forward=wrong_by(1 + 1e-5))
    (wrong,) = check.disagreements("layer_norm", "cpu", given)
    assert wrong.startswith("output 0: error")


def test_nan_types_gradients_and_repeats_are_held_too(monkeypatch) -> None:
    given = check.arguments("layer_norm", "C64", torch.float32, "cpu")

    def found(**changed) -> str:
        with monkeypatch.context() as patched:
            as_backend(patched, "cpu", **changed)
            return " ".join(check.disagreements("layer_norm", "cpu", given))

    assert "output 0: error nan" in found(forward=wrong_by(float("nan")))
    noise = iter(1 + 1e-8 * torch.arange(20, dtype=torch.float64))
    assert "output 0 differs between two equal calls" in found(
        forward=lambda *args: ((r := SPEC.forward(*args))[0] + (next(noise) - 1).float(), *r[1:])
    )
    half = found(backward=lambda *args: tuple(0.5 * g for g in SPEC.backward(*args)))
    assert all(f"gradient of {leaf}: error" in half for leaf in ("x", "weight", "bias"))
    only = found(supports=lambda *args: "no backward" if args[0].shape == args[2].shape else None)
    assert "it runs forward and not backward" in only and "no backward" in only


# ---- the command -------------------------------------------------------------------------------------------------------------


def test_check_passes_keeps_and_does_not_run_again(monkeypatch, capsys, cache: Path) -> None:
    few(monkeypatch)
    assert cli.main(["check", "--device", "cpu"]) == 0
    first = capsys.readouterr().out
    assert re.search(r"layer_norm +torch +passed +9 cases +[\d.]+ ms +[\d.]+ × eager", first) and "\033" not in first
    key = passed.key("layer_norm", "torch", "cpu")
    assert json.loads(cache.read_text())[key]["cases"] == 9
    assert [path.name for path in cache.parent.iterdir()] == ["passed.json"]

    as_backend(monkeypatch, "torch", forward=wrong_by(2))
    assert cli.main(["check", "--device", "cpu"]) == 0  # nothing of the kernel's source has changed
    assert "passed before" in capsys.readouterr().out
    assert cli.main(["check", "--device", "cpu", "--again"]) == 1
    failed = capsys.readouterr().out
    assert "layer_norm        torch      failed" in failed and "C64, fp32: output 0: error" in failed and "1 failed" in failed
    assert key not in json.loads(cache.read_text())


def test_a_crash_is_a_failure_of_its_row_alone(monkeypatch) -> None:
    few(monkeypatch)

    def crash(*args):
        raise ZeroDivisionError("in the\nkernel")

    as_backend(monkeypatch, "torch", forward=crash)
    rows = {row.backend: row for row in check.check("cpu")}
    assert (rows["torch"].state, rows["torch"].detail) == ("failed", "C64, fp32: ZeroDivisionError: in the kernel")
    assert rows["cpu"].state == ("absent" if dispatch.library("cpu") else "passed")


def test_what_time_cuts_off_is_said_and_not_kept(monkeypatch, cache: Path) -> None:
    few(monkeypatch)
    monkeypatch.setattr(check, "SECONDS", 0)
    rows = {row.backend: row for row in check.check("cpu")}
    assert (rows["torch"].cases, rows["torch"].left) == (1, 8) and "1 cases, no time for 8" in check.line(rows["torch"], False)
    assert not cache.exists() or json.loads(cache.read_text()) == {}


def test_backends_that_are_not_there_take_no_share_of_the_time(monkeypatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(dispatch, "BACKENDS", ("torch", "cpu", "triton"))
    monkeypatch.setattr(LAYER_NORM, "backend", lambda name: SPEC if name == "torch" else "gone")
    monkeypatch.setattr(check, "perf_counter", lambda: 7.0)
    times = []

    def checked(op: str, backend: str, device: str, until: float) -> check.Result:
        times.append(until - 7.0)
        return check.Result(op, backend, "passed")

    monkeypatch.setattr(check, "_checked", checked)
    assert [row.state for row in check.check("cpu")] == ["passed", "absent", "absent"]
    assert times == [check.SECONDS]


def in_a_shell(monkeypatch: pytest.MonkeyPatch, scripts: list[str]) -> list[list[tuple[str, str]]]:
    """Let the other process be these scripts in turn; returns what each was asked for."""
    asked: list[list[tuple[str, str]]] = []

    def command(device: str, pairs: list[tuple[str, str]], end: float) -> list[str]:
        asked.append(pairs)
        return ["sh", "-c", scripts[len(asked) - 1]]

    monkeypatch.setattr(check, "_command", command)
    return asked


def said(op: str, state: str = "passed") -> str:
    return f"echo '{json.dumps(dict(op=op, backend='cuda', state=state))}'; "


def test_a_hang_and_a_crash_are_told_and_the_others_go_on_in_another_process(monkeypatch) -> None:
    monkeypatch.setattr(check, "PATIENCE", 0.5)
    pairs = [(op, "cuda") for op in ("a", "b", "c", "d", "e", "f")]
    scripts = [said("a") + "exec sleep 60", "kill -9 $$", said("d", "failed"), said("e") + said("f")]
    asked = in_a_shell(monkeypatch, [scripts[0], scripts[1], *scripts[2:]])
    found = [(r.op, r.state, r.detail) for r in check._elsewhere("cuda", pairs, perf_counter())]
    assert found == [
        ("a", "passed", ""),
        ("b", "failed", "no answer within 0 s: it hangs"),
        ("c", "failed", "its process ended with code -9"),
        ("d", "failed", ""),  # the context may be broken: the next one goes on
        ("e", "passed", ""),
        ("f", "passed", ""),
    ]
    assert [len(pairs) for pairs in asked] == [6, 4, 3, 2]


def test_the_other_process_says_what_it_found() -> None:
    """As it is started, on an op of a CPU."""
    (result,) = check._elsewhere("cpu", [("linear", "torch")], perf_counter())
    assert (result.op, result.backend, result.state) == ("linear", "torch", "passed") and result.left > 0 and result.size


def test_colour_is_for_terminals_that_want_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "check", lambda device, again: [check.Result("mlp", "cpu", "failed", "why")])
    for terminal, no_colour, coloured in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", no_colour)
        assert check.report("cpu") == 1
        assert ("\033[31mfailed" in capsys.readouterr().out) == coloured


def test_a_cache_that_cannot_be_written_or_read(monkeypatch, caplog, cache: Path) -> None:
    few(monkeypatch)
    cache.parent.write_text("a file where the folder should be")
    assert {row.state for row in check.check("cpu")} <= {"passed", "absent"}
    assert "what passed is not kept" in caplog.text
    cache.parent.unlink()
    cache.parent.mkdir()
    for broken in ("{", "[1]"):
        cache.write_text(broken)
        assert passed.kept() == {}
    passed.keep({"a": {"cases": 1}})
    assert passed.kept() == {"a": {"cases": 1}}


def test_no_gpu_is_one_clear_line(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["check", "--device", "cuda"]) == 2
    assert "expected a GPU for the device cuda" in capsys.readouterr().err


# ---- what follows from a pass ------------------------------------------------------------------------------------------------


def choice(x: torch.Tensor) -> str:
    return LAYER_NORM.choose(x, None, x[0], x[0], 1e-5)[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU tensors that dispatch takes for those of an H200, whose layer norm in CUDA C++ supports everything."""
    monkeypatch.setitem(dispatch.AUTOMATIC, "cpu", dispatch.AUTOMATIC["cuda"])
    monkeypatch.setattr(passed, "hardware", lambda device: "compute capability 9.0")
    as_backend(monkeypatch, "cuda")
    return "compute capability 9.0"


def test_a_cuda_kernel_is_automatic_only_where_it_has_passed(monkeypatch, gpu: str, cache: Path) -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    assert choice(x) == "torch"
    with dispatch.use("cuda"):
        assert choice(x) == "cuda"
    passed.keep({passed.key("layer_norm", "cuda", "cpu"): {"cases": 1, "ms": 1.0, "speedup": 2.0}})
    assert choice(x) == "cuda"
    cache.unlink()
    assert choice(x) == "cuda"  # nothing is read within a call
    passed.lacks.cache_clear()
    monkeypatch.setattr(passed, "hardware", lambda device: "compute capability 8.9")
    passed.keep({passed.key("layer_norm", "cuda", "cpu").replace("8.9", "9.0"): {"cases": 1}})
    assert choice(x) == "torch"
    assert "no GPU of compute capability 8.9 has passed it" in str(passed.lacks("layer_norm", x.device))


def test_a_pass_is_of_a_gpus_capability_and_not_of_its_name(monkeypatch) -> None:
    """What an H200 has passed serves an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    keys = set()
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert passed.device_name("cuda") == name and passed.hardware("cuda") == "compute capability 9.0"
        keys.add(passed.key("layer_norm", "cuda", "cuda"))
    assert len(keys) == 1


def test_the_faster_of_two_kernels_is_the_automatic_one(monkeypatch, gpu: str, cache: Path) -> None:
    """By what was measured here at one size, else by the record's figures."""
    as_backend(monkeypatch, "cuda")
    keys = {backend: passed.key("layer_norm", backend, "cpu") for backend in ("cuda", "triton")}

    def lacks(cuda: dict, triton: dict | None) -> str | None:
        passed.keep({keys["cuda"]: cuda, keys["triton"]: triton})
        return passed.lacks("layer_norm", torch.device("cpu"))

    slow, fast = dict(cases=9, ms=3.0, size="a"), dict(cases=9, ms=2.0, size="a")
    assert lacks(fast, slow) is None
    assert lacks(slow, fast) == "triton is 1.50 times as fast on compute capability 9.0"
    assert lacks(slow, fast | dict(size="b")) is None  # at different sizes: not compared
    assert lacks(slow, None) is None
    assert lacks(slow | dict(ms=math.nan), fast) is None
    root = cache.parent / "kernels"
    root.mkdir()
    kernel = f"layer_norm cuda {passed.fingerprint('layer_norm', 'cuda')}"
    monkeypatch.setattr(passed, "ROOT", root)
    monkeypatch.setattr(passed, "beside", lambda op: "triton")
    for speed, reason in ((0.5, "triton is 2.00 times as fast"), (1.2, "None"), (None, "None")):
        (root / "passed.json").write_text(json.dumps({kernel: {gpu: speed}}))
        assert reason in str(lacks(dict(cases=9), None))
        assert lacks(fast, slow) is None  # what is measured here counts before a record


def test_a_shipped_record_makes_it_automatic_for_that_source_alone(monkeypatch, gpu: str, tmp_path: Path) -> None:
    x = torch.randn(2, 64, dtype=torch.float64)
    root = tmp_path / "kernels"
    (root / "layer_norm").mkdir(parents=True)
    source = root / "layer_norm" / "cuda.cu"
    source.write_text('#include "../device.cuh"\n#include <cuda.h>\n')
    (root / "device.cuh").write_text("// helpers\n")
    monkeypatch.setattr(passed, "ROOT", root)
    passed.fingerprint.cache_clear()
    try:
        recorded = {f"layer_norm cuda {passed.fingerprint('layer_norm', 'cuda')}": {gpu: None}}
        (root / "passed.json").write_text(json.dumps(recorded))
        assert choice(x) == "cuda"
        (root / "device.cuh").write_text("// other helpers\n")  # an included file counts as the kernel's own
        passed.fingerprint.cache_clear()
        passed.lacks.cache_clear()
        assert choice(x) == "torch"
    finally:
        passed.fingerprint.cache_clear()


def test_what_decides_is_shipped() -> None:
    from clipfast.kernels import __file__ as package

    assert json.loads((Path(package).parent / "passed.json").read_text()) is not None
    for op, home in kernels.OPS.items():
        for kind in home.compiled:
            assert passed.fingerprint(op, kind), f"{op}: no {kind} source beside the package"

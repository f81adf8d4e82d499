"""The README's tables, the pages of results and kernels/passed.json are those of the committed records."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bench import record, tables
from clipfast.kernels import passed


def test_what_is_generated_is_up_to_date() -> None:
    for path, text in record.generated().items():
        assert path.exists() and path.read_text() == text, f"{path.relative_to(record.ROOT)}: run python -m bench.record"
    assert len(re.findall(r"<!-- table: \w+ -->", (record.ROOT / "README.md").read_text())) >= 3


def test_a_figure_for_a_gpu_comes_from_a_record() -> None:
    """Outside the generated tables the README names no speed on a GPU."""
    typed = re.sub(r"<!-- table.*?<!-- end -->", "", (record.ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert not re.search(r"TFLOP/s|GB/s|\bH[12]00\b[^.\n]*\d+(\.\d+)? ?(ms|×|images/s)", typed)


def test_a_table_without_a_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="'gone': expected one of"):
        tables.filled("<!-- table: gone --><!-- end -->", {"cpu": ""})


def made(kernel: str | None, failed: int = 0, finished: bool = True, device: str = "H200") -> dict[str, Any]:
    counts = {"layer_norm": {"cuda": dict(passed=9, failed=failed, kernel=kernel)}}
    return dict(machine=dict(kind="gpu", device=device), tests=counts, tests_finished=finished)


def test_a_kernel_counts_as_passed_only_while_its_source_is_the_same() -> None:
    now = passed.fingerprint("layer_norm", "cuda")

    def state(*records: dict[str, Any], device: str = "H200") -> str:
        return record.state("layer_norm", "cuda", device, dict(enumerate(records)))  # type: ignore[arg-type]

    assert state(made(now)) == "passed"
    assert state(made("0" * 64)) == "changed since"
    assert state(made("0" * 64), made(now)) == "passed"
    assert state(made(now), made(now, failed=1)) == "failed"
    assert state(made("0" * 64, failed=1)) == state(made(now, finished=False)) == state() == "never"
    assert state(made(now), device="H100") == "never"


def test_the_gpu_table_and_the_automatic_choice_follow_the_records() -> None:
    now = passed.fingerprint("layer_norm", "cuda")
    found = {"a": made(now), "b": made("0" * 64, device="H100")}
    table = record.gpu_table(found)
    assert table.startswith("| kernel | H100 | H200 |\n|---|---|---|\n")
    assert "| layer_norm cuda | changed since | passed |" in table and "| layer_norm triton | never | never |" in table
    assert record.passes(found) == {f"layer_norm cuda {now}": ["H200"]}
    assert record.gpu_table({}).startswith("| kernel | on a GPU |\n|---|---|\n") and record.passes({}) == {}


def test_the_machine_says_what_figures_depend_on(monkeypatch) -> None:
    machine = record.machine()
    assert machine["versions"]["torch"] and machine["device"] and len(machine["kernels"]) > 20
    monkeypatch.setattr(record, "ROOT", record.ROOT.parent.parent.parent)  # where git is not
    monkeypatch.setenv("COMMIT", "abc")
    assert record._commit() == "abc"

"""The README's tables are those of the committed records."""

from __future__ import annotations

import pytest

from bench import record


def test_readme_tables_are_made_from_the_records() -> None:
    readme = (record.ROOT / "README.md").read_text()
    assert readme.count("<!-- table:") == 3
    assert record.filled(readme) == readme, "run python -m bench.record"


def test_a_table_without_a_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="'gone': expected a record of that name"):
        record.filled("<!-- table: gone --><!-- end -->")


def test_a_kernel_counts_as_passed_only_while_its_source_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now = record.fingerprints()
    source = "kernels/attention/triton.py"
    for kernels, state in ((now, "passed on H200"), (now | {source: "0"}, "changed since"), ({}, "never run")):
        made = {"gpu": dict(gpu_tests_passed=True, machine=dict(device="H200", kernels=kernels))}
        monkeypatch.setattr(record, "records", lambda made=made: made)
        assert dict(record.gpu_states())["attention triton"].startswith(state)

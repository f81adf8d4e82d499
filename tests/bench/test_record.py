"""The README's tables, the pages of results and kernels/passed.json are those of the committed records."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import record, tables
from clipfast.kernels import passed
from tests.bench.test_bench import record as of_rows
from tests.bench.test_bench import row


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


def made(kernel: str | None, failed: int = 0, left: int = 0, device: str = "H200", rows=()) -> dict[str, Any]:
    counts = {"layer_norm": {"cuda": dict(passed=9, failed=failed, left=left, kernel=kernel)}}
    return dict(machine=dict(kind="gpu", device=device, hardware="9.0"), tests=counts, rows=list(rows))


def test_a_kernel_counts_as_passed_only_while_its_source_is_the_same() -> None:
    now = passed.fingerprint("layer_norm", "cuda")

    def state(*records: dict[str, Any], device: str = "H200") -> str:
        return record.state("layer_norm", "cuda", record.of(dict(enumerate(records)), device=device))  # type: ignore[arg-type]

    assert state(made(now)) == "passed"
    assert state(made("0" * 64)) == "changed since"
    assert state(made("0" * 64), made(now)) == "passed"
    assert state(made(now), made(now, failed=1)) == "failed"
    assert state(made("0" * 64, failed=1)) == state(made(now, left=1)) == state() == "never"
    assert state(made(now), device="H100") == "never"


def test_the_gpu_table_and_the_automatic_choice_follow_the_records() -> None:
    now = passed.fingerprint("layer_norm", "cuda")
    found = {"a": made(now), "b": made("0" * 64, device="H100")}
    table = record.gpu_table(found)
    assert table.startswith("| kernel | H100 | H200 |\n|---|---|---|\n")
    assert "| layer_norm cuda | changed since | passed |" in table and "| layer_norm triton | never | never |" in table
    assert record.passes(found) == {f"layer_norm cuda {now}": {"9.0": None}}
    assert record.gpu_table({}).startswith("| kernel | on a GPU |\n|---|---|\n") and record.passes({}) == {}


def test_how_fast_a_kernel_is_beside_tritons_follows_the_rows() -> None:
    """By the geometric mean over the sizes that have both, in records of the kernel as it is."""
    now = passed.fingerprint("layer_norm", "cuda")

    def rows(*times: tuple[float, float]) -> list[dict[str, Any]]:
        return [row(op="layer_norm", rivals={"our cuda": c, "our triton": t}) for c, t in times]

    absent = row(op="layer_norm", rivals={"our triton": 1.0})
    absent["rivals"]["our cuda"] = {"absent": "it refused"}
    other = row(op="mlp", rivals={"our cuda": 1.0, "our triton": 9.0})
    found = {"a": made(now, rows=[*rows((1.0, 4.0), (2.0, 2.0)), absent, other]), "b": made("0" * 64, rows=rows((1.0, 100.0)))}
    assert record.passes(found) == {f"layer_norm cuda {now}": {"9.0": 2.0}}
    found["c"] = made(now, device="H100", rows=rows((8.0, 1.0)))  # another model of the same capability
    assert record.passes(found) == {f"layer_norm cuda {now}": {"9.0": pytest.approx((4 / 8) ** (1 / 3), abs=1e-3)}}


def test_the_machine_says_what_figures_depend_on(monkeypatch) -> None:
    machine = record.machine()
    assert machine["versions"]["torch"] and machine["device"] and len(machine["kernels"]) > 20
    monkeypatch.setattr(record, "ROOT", record.ROOT.parent.parent.parent)  # where git is not
    monkeypatch.setenv("COMMIT", "abc")
    assert record._commit() == "abc"


@pytest.mark.parametrize(
    ("told", "instructions", "expected"),
    [
        (dict(vendor="AuthenticAMD", family=25, model=17, name="AMD EPYC"), "avx512", "amd-family-25-model-17-avx512"),
        (dict(vendor="AuthenticAMD", family=26, name="AMD EPYC"), "avx2", "amd-family-26-avx2"),
        (dict(vendor="GenuineIntel", family=6, model=0, name="Xeon(R)"), "avx2", "intel-family-6-model-0-avx2"),
        (dict(name="arm"), "neon", "arm-neon"),
    ],
)
def test_a_record_is_called_by_processor_and_instruction_set(told: dict[str, Any], instructions: str, expected: str) -> None:
    machine = dict(kind="cpu", device="d", processor=told, instructions=instructions)
    assert record.stem(machine) == expected
    assert record.stem(machine | dict(kind="gpu", device="NVIDIA H200")) == "nvidia-h200"


def test_committed_records_are_called_by_what_they_are_of() -> None:
    for name, made in record.measured(record.records()).items():
        assert re.sub("-(first|multi)$", "", name) == record.stem(made["machine"])


def test_the_newest_record_of_two_instruction_sets_is_shown() -> None:
    def of(instructions: str, date: str, kind: str = "cpu") -> dict[str, Any]:
        return dict(machine=dict(kind=kind, instructions=instructions, date=date))

    old, new, avx2, neon = of("avx512", "2026-01-31"), of("avx512", "2026-02-01 10:00"), of("avx2", "2025"), of("neon", "2027")
    found = dict(enumerate([neon, avx2, new, old, of("avx512", "2028", "gpu")]))
    assert record.newest(found) == [new, avx2]  # type: ignore[arg-type]
    assert record.newest({"a": neon}) == [neon] and record.newest({}) == []


def test_the_kernels_of_a_record_have_changed_or_not() -> None:
    now = record.fingerprints()
    assert not record.changed(dict(machine=dict(kernels=now)))
    assert not record.changed(dict(machine=dict(kernels=now | {"kernels/mlp/triton.py": "0" * 64})))
    assert record.changed(dict(machine=dict(kernels=now | {"kernels/mlp/cpu.cpp": "0" * 64})))
    assert record.changed(dict(machine=dict(kernels={k: v for k, v in now.items() if k != "kernels/vec.h"})))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one record, here.json, and a README with its table; returns the folder of records."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "README.md").write_text("# a\n<!-- table: cpu -->\n<!-- end -->\n<!-- table: gpu -->\n<!-- end -->\n")
    (results / "here.json").write_text(json.dumps(of_rows(row())))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", results)
    return results


def test_records_become_tables(house: Path, capsys) -> None:
    assert record.main([]) == 0
    readme, now = (record.ROOT / "README.md").read_text(), record.machine()
    assert f"| what | {now['instructions']}: ours, ms | against | peak memory |" in readme
    assert "| mlp, 1 sizes | 10.00 | 1.50 × eager | 2.00 × eager |" in readme
    assert f"- {now['device']}, " in readme and "have changed since." in readme  # this house has no kernels
    assert (house / "here.md").exists() and json.loads((record.ROOT / "kernels" / "passed.json").read_text()) == {}
    assert re.search(r"^contrastive +cuda +never run on its hardware$", capsys.readouterr().out, re.MULTILINE)


def other(change) -> str:
    made = copy.deepcopy(of_rows(row()))
    change(made)
    return json.dumps(made)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("cut", json.dumps(of_rows(row()))[:-90], "cut.json: expected the JSON of a record"),
        ("list", "[1, 2]", "list.json: expected a record as bench/run.py writes it"),
        ("foreign", '{"benchmarks": [], "machine_info": {}}', "foreign.json: expected machine to hold"),
        ("norivals", other(lambda r: r["rows"][0].pop("rivals")), "norivals.json: expected a record as bench/run.py writes it"),
        ("slow", other(lambda r: r["rows"][0]["rivals"]["eager"].update(speedup=None)), "expected a speed-up over eager"),
        ("share", other(lambda r: r["rows"][0].update(roofline=dict(share=-1, rate=1))), "expected a share of the roofline"),
        ("unfinished", other(lambda r: r.update(tests=made("0" * 64, left=-1)["tests"])), "were left, got"),
        ("twice", other(lambda r: r["rows"].append(r["rows"][0])), "['kernels: mlp a'] twice"),
        ("demo", '{"accuracy": [{}]}', "demo.json: expected what make demo writes"),
    ],
)
def test_a_file_that_is_no_record_is_named_and_nothing_written(house: Path, capsys, name: str, text: str, said: str) -> None:
    (house / f"{name}.json").write_text(text)
    before = (record.ROOT / "README.md").read_text()
    assert record.main([]) == 1
    assert said in capsys.readouterr().err
    assert (record.ROOT / "README.md").read_text() == before and not (house / "here.md").exists()


def test_asking_for_help_writes_nothing(house: Path, capsys) -> None:
    for arguments, code in ((["--help"], 0), (["here.json"], 2)):
        with pytest.raises(SystemExit) as ended:
            record.main(arguments)
        assert ended.value.code == code
    assert not (house / "here.md").exists()


def test_a_row_slower_than_its_rival_has_a_note(house: Path, capsys, monkeypatch) -> None:
    made = json.loads((house / "here.json").read_text())
    rows = [row(rivals={"eager": 9.6, "our cpu": 5.0}), row(name="mlp b")]
    (house / "here.json").write_text(json.dumps(made | {"rows": rows}))
    assert record.main([]) == 1
    assert "here.json: kernels: mlp a is slower than eager: no note says why it is kept" in capsys.readouterr().out
    monkeypatch.setitem(tables.KEPT, "kernels: mlp a", "it is exact")
    assert record.main([]) == 0
    assert "kernels: mlp a is slower than eager: it is exact" in capsys.readouterr().out
    assert "0.96 × eager (2.1 MB); 0.50 × our cpu (2.1 MB); kept: it is exact |" in (house / "here.md").read_text()


def test_no_committed_row_lacks_its_note() -> None:
    records = record.measured(record.records())
    assert {name: record.unexplained(made) for name, made in records.items()} == dict.fromkeys(records, [])

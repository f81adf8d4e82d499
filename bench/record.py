"""The records of bench/results/, and what is made from them.

``python -m bench.record`` validates every record, says of each op × backend whether the hardware of the records has passed it
since it last changed, and writes what is generated: the README's tables, a page of all rows beside each record, and
kernels/passed.json, from which a CUDA C++ kernel knows the GPUs that it may run on by itself. ``make cpu-check`` and
``make gpu-check`` make a record.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import tables
from clipfast import kernels
from clipfast.kernels import dispatch, passed, processor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "transformers", "inf-cl", "siglip-kernel", "xformers", "flash-attn",
            "liger-kernel", "quack-kernels", "onnxruntime", "openvino", "nncf", "faster-clip")  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures of a record depend on."""
    gpu = torch.cuda.is_available()
    return dict(
        kind="gpu" if gpu else "cpu",
        device=passed.device_name("cuda" if gpu else "cpu"),
        hardware=passed.hardware("cuda" if gpu else "cpu"),
        processor=processor.cpuid(),
        instructions=processor.NAME,
        held=processor.HELD is not None,
        driver=passed.driver(),
        cuda=torch.version.cuda or "",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions=dict(filter(lambda found: found[1], ((package, _version(package)) for package in PACKAGES))),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "minutes").removesuffix("+00:00"),
        commit=_commit(),
        kernels=fingerprints(),
    )


def stem(machine: dict[str, Any]) -> str:
    """What a record's file is called: by the GPU; else by the processor, of which a name says too little, and the instruction
    set that it was measured with."""
    told = machine["processor"]
    numbers = [f"{key} {told[key]}" for key in ("family", "model") if key in told]
    vendor = re.sub("^(Authentic|Genuine)", "", told.get("vendor", ""))
    of_cpu = [vendor if vendor and numbers else told["name"], *numbers, machine["instructions"]]
    return re.sub(r"\W+", "-", machine["device"] if machine["kind"] == "gpu" else " ".join(of_cpu)).strip("-").lower()


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with the kind of build, which the package's own data may leave out
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit, with ``-dirty`` where files differ from it; where git is not, what ``COMMIT`` in the environment says."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"


def fingerprints() -> dict[str, str]:
    """SHA-256 of every kernel source, by its path."""
    sources = sorted(p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"))
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources}


def records() -> dict[str, dict[str, Any]]:
    """What lies in bench/results/, by its name; ValueError for a file that is no JSON."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"bench/results/{path.name}: expected the JSON of a record: {error}") from error
    return found


def measured(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records of benchmarks among them, every one whole; ValueError with all that is wrong."""
    ours = {name: record for name, record in found.items() if name != "demo"}
    if bad := [f"bench/results/{name}.json: {problem}" for name, record in ours.items() for problem in problems(record)]:
        raise ValueError("\n".join(bad))
    return ours


def problems(record: Any) -> Iterator[str]:
    """What keeps a record of benchmarks from being one: a missing part, a figure that cannot be."""
    try:
        yield from _problems(record)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        yield f"expected a record as bench/run.py writes it: {type(error).__name__}: {error}"


def _problems(record: dict[str, Any]) -> Iterator[str]:
    known = {"kind", "device", "hardware", "processor", "instructions", "held", "driver", "cores", "threads", "python",
             "versions", "date", "commit", "kernels"}  # fmt: skip
    if missing := known - record.get("machine", {}).keys():
        yield f"expected machine to hold {', '.join(sorted(known))}; missing: {', '.join(sorted(missing))}"
        return
    tests = [counts for found in record.get("tests", {}).values() for counts in found.values()]
    hashes = [*record["machine"]["kernels"].values(), *(counts.get("kernel") for counts in tests)]
    if not hashes or not all(re.fullmatch("[0-9a-f]{64}", str(one)) for one in hashes):
        yield "expected the SHA-256 of every kernel source"
    for counts in tests:
        if not all(isinstance(counts.get(k), int) and counts[k] >= 0 for k in ("passed", "failed", "left")):
            yield f"expected counts of tests that passed, failed and were left, got {counts}"
    rows, roofline = record.get("rows", []), record.get("roofline")
    if any(row.get("roofline") for row in rows) and not roofline:
        yield "expected the roofline of the run, whose shares the rows have"
    if roofline and not all(_positive(roofline.get(k)) for k in ("bytes_per_s", "flops_per_s")):
        yield f"expected a roofline of bytes_per_s and flops_per_s, got {roofline}"
    names = [_title(row) for row in rows]
    if len(set(names)) != len(names):
        yield f"expected rows of different names, got {len(rows)} with {sorted({n for n in names if names.count(n) > 1})} twice"
    if not (rows or tests or record.get("light") or record.get("parts")):
        yield "expected something that was tested or measured, got nothing"
    for row in rows:
        yield from (f"{_title(row)}: {problem}" for one in _timed(row) for problem in _impossible(one))
        bad = [name for name, rival in row["rivals"].items() if "absent" not in rival and not _positive(rival["speedup"])]
        if bad:
            yield f"{_title(row)}: expected a speed-up over {', '.join(bad)}"
        if row["roofline"] and not (_positive(row["roofline"]["share"]) and _positive(row["roofline"]["rate"])):
            yield f"{_title(row)}: expected a share of the roofline, got {row['roofline']}"


def _title(row: dict[str, Any]) -> str:
    return f"{row.get('group')}: {row.get('name')}"


def _timed(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row, *(rival for rival in row["rivals"].values() if "absent" not in rival)]


def _impossible(figures: dict[str, Any]) -> Iterator[str]:
    ms, memory = figures["ms"], figures["memory"]
    if not (all(_positive(ms[k]) for k in ms) and ms["p20"] <= ms["median"] <= ms["p80"]):
        yield f"expected 0 < p20 <= median <= p80, got {ms}"
    if memory is not None and memory < 0:
        yield f"expected bytes, got {memory}"


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


# ---- which hardware has passed which kernel ----------------------------------------------------------------------------------


def backends() -> Iterator[tuple[str, str]]:
    """Every op × backend that has a source."""
    for op in kernels.OPS:
        yield from ((op, backend) for backend in dispatch.BACKENDS if passed.source_of(op, backend).exists())


def of(found: dict[str, dict[str, Any]], **machine: str) -> dict[str, dict[str, Any]]:
    """The records of this ``device``, or of this ``hardware``."""
    return {name: r for name, r in found.items() if machine.items() <= r.get("machine", {}).items()}


def state(op: str, backend: str, found: dict[str, dict[str, Any]]) -> str:
    """``passed``, ``failed``, ``changed since`` (it passed before it last changed) or ``never``, by these records.

    Tests of which some are left, since time cut them off or the GPU broke, pass nothing.
    """
    every = (record.get("tests", {}).get(op, {}).get(backend) for record in found.values())
    ran = [counts for counts in every if counts and (counts["failed"] or not counts["left"])]
    now = [counts for counts in ran if counts["kernel"] == passed.fingerprint(op, backend)]
    if any(counts["failed"] for counts in now):
        return "failed"
    if now:
        return "passed"
    return "changed since" if any(not counts["failed"] for counts in ran) else "never"


def devices(found: dict[str, dict[str, Any]], kind: str, by: str = "device") -> list[str]:
    """The models of GPU (or processor) that the records were made on; ``by="hardware"``: each with what a pass is for."""
    return sorted({r["machine"][by] for r in found.values() if r.get("machine", {}).get("kind") == kind})


def passes(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """For kernels/passed.json: the hardware that has passed each CUDA C++ kernel as it is now, and how many times as fast as
    the one beside it it is there."""
    made = {}
    gpus = of(found, kind="gpu")
    for op in (op for op, backend in backends() if backend == "cuda"):
        on = {}
        for hardware in sorted({r["machine"]["hardware"] for r in gpus.values()}):
            if state(op, "cuda", here := of(gpus, hardware=hardware)) == "passed":
                on[hardware] = _times_as_fast(op, here)
        made |= {f"{op} cuda {passed.fingerprint(op, 'cuda')}": on} if on else {}
    return made


def _times_as_fast(op: str, found: dict[str, dict[str, Any]]) -> float | None:
    """The geometric mean, over the sizes at which these records of the kernel as it is now have both, of the time of the one
    beside it over that of CUDA C++; None where there is no such size."""
    logs = []
    for record in found.values():
        current = record.get("tests", {}).get(op, {}).get("cuda", {}).get("kernel") == passed.fingerprint(op, "cuda")
        for row in record["rows"] if current else ():
            ours = [row["rivals"].get(name, {}).get("ms") for name in (f"our {passed.beside(op)}", "our cuda")]
            if row.get("op") == op and all(ours):
                logs.append(math.log(ours[0]["median"] / ours[1]["median"]))
    return round(math.exp(sum(logs) / len(logs)), 3) if logs else None


# ---- what is generated -------------------------------------------------------------------------------------------------------


def gpu_table(found: dict[str, dict[str, Any]]) -> str:
    """Every kernel for a GPU against the models that have run it."""
    gpus = devices(found, "gpu")
    lines = [f"| kernel | {' | '.join(gpus or ['on a GPU'])} |", "|---" * (1 + len(gpus or [""])) + "|"]
    for op, backend in backends():
        if backend in ("cuda", "triton"):
            states = [state(op, backend, of(found, device=gpu)) for gpu in gpus] or ["never"]
            lines.append(f"| {op} {backend} | {' | '.join(states)} |")
    return "\n".join(lines)


def newest(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the README's table: the newest of each of two instruction sets, in the order of ``processor.SETS``."""
    of_cpus = of(found, kind="cpu").values()
    by_set = [[r for r in of_cpus if r["machine"]["instructions"] == name] for name in processor.SETS]
    return [max(records, key=lambda r: r["machine"]["date"]) for records in by_set if records][:2]


def changed(record: dict[str, Any]) -> bool:
    """Whether a source of the CPU's kernels is another than when the record was made."""
    then, now, of_gpus = record["machine"]["kernels"], fingerprints(), (".cu", ".cuh", "triton.py", "tiles.py")
    return any(then.get(path) != now.get(path) for path in then | now if not path.endswith(of_gpus))


def generated() -> dict[Path, str]:
    """Every generated file and what it has to hold; ValueError for a record that is none."""
    found = records()
    benchmarks = measured(found)
    made = {"gpu": gpu_table(benchmarks)}
    if shown := newest(benchmarks):
        made |= {"cpu": tables.summary(shown, [changed(r) for r in shown])}
    try:
        made |= {"demo": tables.demo(found["demo"])} if "demo" in found else {}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bench/results/demo.json: expected what make demo writes: {type(error).__name__}: {error}") from error
    readme = ROOT / "README.md"
    return {
        **{RESULTS / f"{name}.md": tables.page(name, r) for name, r in benchmarks.items()},
        ROOT / "kernels" / "passed.json": json.dumps(passes(benchmarks), indent=1) + "\n",
        readme: tables.filled(readme.read_text(), made),
    }


def unexplained(record: dict[str, Any]) -> list[str]:
    """The rows in which ours is slower than a rival and no note says why it is kept."""
    return [tables.title(row) for row in record["rows"] if tables.slower(row) and tables.title(row) not in tables.KEPT]


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a record is none (nothing is written then) or a row is slower than its rival without a note."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(arguments)
    try:
        found, made = measured(records()), generated()
    except ValueError as error:
        print(f"bench.record: {error}", file=sys.stderr)
        return 1
    for op, backend in backends():
        runs_on = {kind for kind, device in (("cpu", "cpu"), ("gpu", "cuda")) if backend in dispatch.AUTOMATIC[device]}
        states = []
        for kind in sorted(runs_on or {"gpu"}):  # other people's packages are never automatic, and are for GPUs
            by = "hardware" if kind == "cpu" else "device"
            states += [f"{one}: {state(op, backend, of(found, **{by: one}))}" for one in devices(found, kind, by)]
        print(f"{op:17} {backend:10} {'; '.join(states) or 'never run on its hardware'}")
    for path, text in made.items():
        path.write_text(text)
    for name, record in found.items():
        for row in record["rows"]:
            if rivals := tables.slower(row):
                why = tables.KEPT.get(tables.title(row), "no note says why it is kept: bench/tables.py, KEPT")
                print(f"{name}.json: {tables.title(row)} is slower than {', '.join(rivals)}: {why}")
    return int(any(unexplained(record) for record in found.values()))


if __name__ == "__main__":
    sys.exit(main())

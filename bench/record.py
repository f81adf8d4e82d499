"""The records of bench/results/, and what is made from them.

``python -m bench.record`` says which kernels a GPU has passed since they last changed, and rewrites the README's tables.
A record is the JSON that ``pytest bench --benchmark-only --record bench/results/cpu.json`` writes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BACKENDS = {"triton": "triton.py", "cuda": "cuda.cu"}


def machine() -> dict[str, Any]:
    """What the figures of a record depend on."""
    return dict(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions={p: importlib.metadata.version(p) for p in ("torch", "numpy", "open_clip_torch", "transformers")},
        kernels=fingerprints(),
    )


def fingerprints() -> dict[str, str]:
    """SHA-256 of every kernel source, by its path."""
    sources = sorted(p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"))
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources}


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]  # type: ignore[index]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def records() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def gpu_states() -> list[tuple[str, str]]:
    """(op and backend, state) of every kernel written for a GPU."""
    now, states = fingerprints(), []
    gpus = [r["machine"] for r in records().values() if r.get("gpu_tests_passed")]
    for home in sorted(p for p in (ROOT / "kernels").iterdir() if p.is_dir()):
        for backend, file in BACKENDS.items():
            source = f"kernels/{home.name}/{file}"
            if source not in now:
                continue
            passed = [g["device"] for g in gpus if g["kernels"].get(source) == now[source]]
            seen = any(source in g["kernels"] for g in gpus)
            state = (
                f"passed on {', '.join(passed)}"
                if passed
                else "changed since a GPU passed it"
                if seen
                else "never run by a GPU"
            )
            states.append((f"{home.name} {backend}", state))
    return states


def speed_table(record: dict[str, Any]) -> str:
    """Rows of one record as Markdown: ours, and how many times as fast as each rival."""
    m = record["machine"]
    lines = [
        f"{m['device']}, {m['threads']} threads, torch {m['versions']['torch']}; medians of interleaved rounds.",
        "",
        "| what | ours | against |",
        "|---|---|---|",
    ]
    for row in record["rows"]:
        rate = f", {row['items_per_s']:,.0f}/s" if row["items_per_s"] else ""
        rivals = [
            f"{name}: not run ({r['absent']})" if "absent" in r else f"{r['speedup']:.2f} × {name}"
            for name, r in row["rivals"].items()
            if not name.startswith("our ")
        ]
        lines.append(
            f"| {row['group'].replace('_', ' ')}: {row['name']} | {row['ms']['median']:.2f} ms{rate} | {', '.join(rivals)} |"
        )
    return "\n".join(lines)


def demo_table(results: dict[str, Any]) -> str:
    """The figures of `make demo`: the JSON that it writes beside its report."""
    lines = [
        "| drawings of the unseen style | names | clipfast, top-1 / top-5 | nearest pixels | chance |",
        "|---|---|---|---|---|",
    ]
    for row in results["accuracy"]:
        what = f"{row['drawings']:,} of {row['concepts']} concepts{'' if row['flags'] else ', without flags'}"
        shares = (f"{row[f'{kind}top1']:.1%} / {row[f'{kind}top5']:.1%}" for kind in ("", "pixels_", "chance_"))
        lines.append(f"| {what} | {row['names']:,} | {' | '.join(shares)} |")
    pace = f"{results['steps']:,} steps of {results['config']['batch_size']} pairs in {results['seconds']:.0f} s"
    return "\n".join([*lines, "", f"{pace} on {results['versions']['device']}, torch {results['versions']['torch']}."])


def gpu_table() -> str:
    return "\n".join(["| kernel | on a GPU |", "|---|---|", *(f"| {name} | {state} |" for name, state in gpu_states())])


def tables() -> dict[str, str]:
    """The README's generated parts by the name in their marker."""
    found = records()
    made = {"gpu": gpu_table()}
    made |= {name: speed_table(r) for name, r in found.items() if "rows" in r}
    return made | ({"demo": demo_table(found["demo"])} if "demo" in found else {})


def filled(readme: str) -> str:
    """``readme`` with every part between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew."""
    made = tables()

    def part(match: re.Match[str]) -> str:
        if match[1] not in made:
            raise ValueError(f"README table {match[1]!r}: expected a record of that name in bench/results, got {sorted(made)}")
        return f"<!-- table: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", part, readme, flags=re.DOTALL)


if __name__ == "__main__":
    for kernel, state in gpu_states():
        print(f"{kernel:24} {state}")
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))

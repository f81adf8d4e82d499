"""Whether the quick tests still find faults: ``python -m tests.kernels.mutations [PART ...]``.

Each of mutants.py is one fault in a kernel, put into a copy; what ``make test`` runs of that kernel must then fail. PART: of
the names of files, ``attention/`` or ``cpu.cpp``. Kernels in Triton are loaded as modules of their own and run by the
interpreter; C++ is compiled for each fault, CUDA C++ with the emulator.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import NamedTuple

from tests.kernels.mutants import COMPILED, TRITON

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "cmake"
LOSSES = ("contrastive", "pairwise_sigmoid")
SHARED = {  # files of several ops, others the losses'
    "device.cuh": ("layer_norm",),
    "hopper.cuh": ("attention",),
    "output.h": ("int8_linear", "encoder"),
    "crew.h": ("encoder",),
}
SECONDS = 600.0  # a kernel that hangs is found out, too


class Mutation(NamedTuple):
    """``old``, which stands once in a file below kernels/, becomes ``new``; where ``equivalent`` says why, it is no fault."""

    file: str
    old: str
    new: str
    equivalent: str = ""

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new or 'nothing'}"

    def applied(self) -> str:
        text = (ROOT / "kernels" / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: expected to find this once, got {text.count(self.old)} times; write it anew")
        return text.replace(self.old, self.new)

    @property
    def ops(self) -> tuple[str, ...]:
        """Whose tests must find it."""
        op = self.file.partition("/")[0]
        return (op,) if (ROOT / "kernels" / op).is_dir() else SHARED.get(self.file, LOSSES)


ALL = [Mutation(file, *pair) for table in (TRITON, COMPILED) for file, pairs in table.items() for pair in pairs]


# Triton, in a process of its own


def interpreted(mutation: Mutation) -> None:
    """Run the quick rows, and for losses their tests, with the mutated kernel; exit with 1 at the first that fails."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest

    from clipfast import kernels
    from clipfast.check import disagreements
    from tests.kernels import rows

    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "changed.py"
        changed.write_text(mutation.applied(), encoding="utf-8")
        own = mutation.file.endswith("/triton.py")
        if not own:
            sys.modules["clipfast.kernels.tiles"] = _module(changed)
        for op in mutation.ops:
            module, found = _module(changed if own else ROOT / "kernels" / op / "triton.py"), kernels.OPS[op].backend
            kernels.OPS[op].backend = lambda name, module=module, found=found: module if name == "triton" else found(name)
        for row in rows.collected()[0]:
            quick = row.op in mutation.ops and row.interpreted and not row.slow
            if quick and disagreements(row.op, row.backend, row.arguments, twice=False):
                sys.exit(1)
        if mutation.ops[0] in LOSSES:
            sys.exit(int(pytest.main(["-x", "-p", "no:cacheprovider", "tests/loss/test_loss.py", "-k", "triton"])))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}_{path.parent.name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def survives_interpreted(mutation: Mutation) -> bool:
    process = multiprocessing.get_context("forkserver").Process(target=interpreted, args=(mutation,))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode == 0


# C++, in a copy of the house


def survives_compiled(mutation: Mutation) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "house"
        for part in ("clipfast", "kernels", "tests", "bench"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        (tree / "clipfast" / "kernels").symlink_to(tree / "kernels")  # found before the installed one
        (tree / "kernels" / mutation.file).write_text(mutation.applied(), encoding="utf-8")
        if mutation.file.endswith((".cpp", ".h")):
            _build(tree, [f"kernels/{op}/cpu.cpp" for op in mutation.ops])
            rows = " or ".join(f"{op}-cpu" for op in mutation.ops)
            losses = ["tests/loss/test_loss.py"] if mutation.ops[0] in LOSSES else []
            tests = ["tests/kernels/test_kernels.py", *losses, "-k", f"{rows} or (test_loss and cpu)"]
        else:
            tests = [f"tests/kernels/test_{'cuda' if mutation.ops[0] in LOSSES else mutation.ops[0]}_emulated.py"]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        try:
            return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=SECONDS).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def _build(tree: Path, sources: list[str]) -> None:
    """The mutated objects and the library, by the commands of the last build."""
    shutil.copytree(BUILT, tree / "build")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # as setup.py finds it
    asked = [shutil.which("ninja", path=tools) or "ninja", "-C", str(BUILT), "-t", "commands", "_C_cpu.so"]
    commands = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    for command in commands:
        if any(source in command for source in sources) or " -shared " in command:
            here = command.replace(str(BUILT), str(tree / "build")).replace(f"{ROOT}/kernels", f"{tree}/kernels")
            subprocess.run(here, shell=True, check=True, cwd=tree / "build", capture_output=True)
    shutil.copy(tree / "build" / "_C_cpu.so", tree / "clipfast")


# The command


def caught(mutation: Mutation) -> bool:
    start = perf_counter()
    found = not (survives_interpreted if mutation.file.endswith(".py") else survives_compiled)(mutation)
    state = ("passes" if not found else "FAILS") if mutation.old == mutation.new else ("caught" if found else "NOT CAUGHT")
    print(f"{state:10} {perf_counter() - start:5.1f} s  {mutation}", flush=True)
    return found


def changed(since: str) -> set[str]:
    """Files below kernels/ that differ from a commit's; all, where git does not know it."""
    command = ["git", "diff", "--name-only", "--relative=kernels", since, "--", "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {m.file for m in ALL} if done.returncode else set(done.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART")
    parser.add_argument("--since", metavar="COMMIT", help="only kernels that have changed since then")
    parser.add_argument("--list", action="store_true", help="only name the faults, and why what looks like one is none")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{m}{m.equivalent and ': none, ' + m.equivalent}" for m in ALL))
        return 0
    if unknown := [part for part in options.part if not any(part in m.file for m in ALL)]:
        parser.error(f"expected parts of {', '.join(TRITON | COMPILED)}, got {unknown[0]}")
    files = changed(options.since) if options.since else {m.file for m in ALL}
    todo = [m for m in ALL if not m.equivalent and m.file in files and any(part in m.file for part in options.part or [""])]
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "triton", "pytest", "tests.kernels.rows"])
    controls = [Mutation(file, old, old) for file, old in {m.file: m.old for m in todo}.items()]  # without a fault: all passes
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        done = list(workers.map(caught, [*controls, *todo]))
    failing, left = [m for m in done[: len(controls)] if m], [m for m in done[len(controls) :] if not m]
    print(f"{len(todo)} faults, {len(left)} not caught, {len(failing)} kernels whose tests fail without one")
    return int(bool(left or failing))


if __name__ == "__main__":
    sys.exit(main())

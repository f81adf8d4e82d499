"""Checkpoints that were cut, damaged or tampered with: see checkpoints.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.cli import main
from tests.hostile import checkpoints

ROOT = Path(__file__).parents[2]


def tried(*arguments: int) -> str:
    command = [sys.executable, "-m", "tests.hostile.checkpoints", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_damaged_checkpoint_is_the_same_load_or_one_line() -> None:
    assert " damaged checkpoints: " in tried(10, 0, 20)


@pytest.mark.slow
def test_any_damaged_checkpoint_is_the_same_load_or_one_line() -> None:
    said = tried(300, 1, 1)
    assert int(said.split()[0]) > 1000, said


@pytest.mark.parametrize("file", checkpoints.FILES)
def test_the_command_line_refuses_it_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture, file: str) -> None:
    checkpoints.make(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000002"
    os.truncate(path / file, 100)
    assert main(["export", str(path), str(tmp_path / "model.safetensors")]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"clipfast: error: {path}: expected a whole checkpoint: {file}") and "\n" not in told
    assert told.endswith("; take another, or remove it") and not (tmp_path / "model.safetensors").exists()

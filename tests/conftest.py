import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are defined: their rows run on CPU tensors

import bench.rivals  # noqa: E402, F401 - makes open_clip and transformers importable beside a CPU torch, from this folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if rows := sys.modules.get("tests.kernels.rows"):
        terminalreporter.write_line("\n".join(rows.left_out()))

"""What `import clipfast`, `load` and the first `encode_text` bring into a fresh process, and what they keep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipfast.model import CLIP

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "ftfy", "webdataset", "transformers", "open_clip", "huggingface_hub")
SIZES = (64, 32, 1, 64, 32, 77, 49408, 512, 8, 3)  # 140 MB, mostly token embeddings

FRESH = """
import json, sys
import clipfast

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def heavy():
    return [name for name in sys.argv[2].split() if name in sys.modules]

imported, before = heavy(), memory("VmRSS")
model, _ = clipfast.load(sys.argv[1], "cpu", quick_gelu=True)
resident, peak = memory("VmRSS") - before, memory("VmHWM") - before
model.encode_text(clipfast.tokenize(["a photo of a dog"]))
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps([imported, heavy(), resident / weights, peak / weights]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_a_fresh_process_imports_and_keeps_no_more_than_it_needs(tmp_path: Path) -> None:
    """Half-precision weights, converted while they are read, are never there twice."""
    path = tmp_path / "model.pt"
    torch.save(CLIP(*SIZES).half().state_dict(), path)
    done = subprocess.run([sys.executable, "-c", FRESH, path, " ".join(HEAVY)], capture_output=True, text=True, check=True)
    imported, encoded, resident, peak = json.loads(done.stdout)
    assert imported == encoded == []
    assert 0.9 < resident < 1.1 and peak < 1.1, (resident, peak)

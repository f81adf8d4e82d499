"""Checkpoints as people save them, and as nobody should: archives are read without TorchScript, damaged files in one line."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import re
import resource
import subprocess
import sys
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import clipfast
from clipfast.model import CLIP
from clipfast.weights import build_model, convert, export, load
from clipfast.weights.archive import Archive
from tests.model.openai import openai as openai_model
from tests.weights.test_weights import (
    RESNET,
    TEXT,
    VIT,
    assert_equal_features,
    features,
    make_open_clip,
    open_clip_config,
    refused,
    save_open_clip_folder,
    save_torchscript,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return make_open_clip()


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


# ---- what training programs write


@pytest.mark.parametrize("prefix", ["model.", "net.", "clip._orig_mod.", "a.b.module."])
@pytest.mark.parametrize("home", ["state_dict", "model", "model_state_dict"])
def test_prefixes_and_homes(tmp_path: Path, source: nn.Module, prefix: str, home: str) -> None:
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    extra = {"epoch": 3, "best": np.float64(0.7), "step": np.int64(5), "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.98)}}
    extra["optimizer_states"] = [torch.optim.AdamW(source.parameters()).state_dict()]
    path = saved(tmp_path / "m.ckpt", {home: state} | extra)
    assert_equal_features(load(path, "cpu", quick_gelu=True)[0], source)


def test_old_pickles_with_numpy_scalars(tmp_path: Path, source: nn.Module) -> None:
    content = {"state_dict": source.state_dict(), "best": np.float64(0.7), "n": np.int32(1)}
    path = saved(tmp_path / "m.pt", content, _use_new_zipfile_serialization=False)
    assert_equal_features(load(path, "cpu", quick_gelu=True)[0], source)


def test_wrappers_in_the_middle_of_names(tmp_path: Path, source: nn.Module) -> None:
    state = {n.replace("resblocks.1.", "resblocks.1._checkpoint_wrapped_module."): t for n, t in source.state_dict().items()}
    state = {n.replace("visual.", "visual._orig_mod."): t for n, t in state.items()}
    assert_equal_features(load(saved(tmp_path / "m.pt", state), "cpu", quick_gelu=True)[0], source)


def test_what_stands_beside_the_towers(tmp_path: Path, source: nn.Module) -> None:
    state = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    beside = {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3), "loss.temperature": torch.zeros(())}
    path = saved(tmp_path / "m.pt", state | beside)
    refused(partial(load, path, quick_gelu=True), r"3 unexpected: head.bias, .*ignore=\('head.', 'loss.'\)")
    assert_equal_features(load(path, "cpu", quick_gelu=True, ignore=("head.", "loss."))[0], source)
    two = {f"ema.{name}": tensor for name, tensor in source.state_dict().items()}
    refused(
        partial(load, saved(path, state | two), quick_gelu=True), r"holds 2 models, under model., ema.: .*ignore=\('ema.',\)"
    )
    assert_equal_features(load(path, "cpu", quick_gelu=True, ignore="ema.")[0], source)
    twice = state | {"logit_scale": torch.zeros(())}
    refused(partial(load, saved(path, twice), quick_gelu=True), "logit_scale is there twice, with and without model.")


def test_hyper_parameters_that_are_objects(tmp_path: Path, source: nn.Module) -> None:
    import argparse

    path = saved(tmp_path / "m.ckpt", {"state_dict": source.state_dict(), "hyper_parameters": argparse.Namespace(lr=1)})
    refused(partial(load, path), r"holds Python objects besides tensors, .*\(argparse.Namespace\): save model.state_dict\(\)")


def test_a_tower_without_its_first_norm_needs_a_configuration(tmp_path: Path) -> None:
    state = make_open_clip(VIT | {"no_ln_pre": True}).state_dict()
    refused(partial(load, saved(tmp_path / "m.pt", state), quick_gelu=True), "weights alone do not tell .* without ln_pre")


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_folded_resnets(tmp_path: Path, kind: torch.dtype) -> None:
    model = convert(make_open_clip(RESNET)).for_inference().to(kind)
    path = saved(tmp_path / "m.pt", model.state_dict())
    again = load(path, "cpu", quick_gelu=True)[0]
    assert_equal_features(again, model.float())
    assert_equal_features(load(export(model, tmp_path / "m.safetensors"), "cpu")[0], model)
    assert_equal_features(convert(model), model)


@pytest.mark.parametrize(("vision", "quick_gelu"), [(VIT, True), (VIT, False), (RESNET, True)])
def test_archives_without_marks(tmp_path: Path, vision: dict, quick_gelu: bool) -> None:
    """Their code, read and never run, tells the activation."""
    source = make_open_clip(vision, quick_gelu)
    save_torchscript(source, tmp_path / "m.pt")
    model = load(tmp_path / "m.pt", "cpu")[0]
    assert model.quick_gelu is quick_gelu
    assert_equal_features(model, source)
    archive = torch.jit.load(tmp_path / "m.pt")
    built = build_model(archive, quick_gelu)
    assert built.dtype == torch.float16 and all(
        a.shape == b.shape for a, b in zip(features(built.float()), features(source), strict=True)
    )


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_openais_own_loader_reads_the_export(tmp_path: Path, vision: dict, jit: bool) -> None:
    model = convert(make_open_clip(vision))
    with torch.no_grad():  # that loader rounds to half precision, but for embeddings and norms
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    path = export(model, tmp_path / "m.pt", "openai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = importlib.import_module(openai_model.__package__).load(str(path), "cpu", jit=jit)
    generator = torch.Generator().manual_seed(0)
    side, tokens = model.visual.input_resolution, torch.randint(1, 299, (3, 16), generator=generator)
    image = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        for name, given in (("encode_image", image), ("encode_text", tokens)):
            ours = getattr(model, name)(given)
            assert (ours - getattr(theirs, name)(given)).norm() <= 1e-5 * ours.norm()
    assert_equal_features(load(path, "cpu")[0], model)


# ---- memory


# In a process of its own: a suite's heap has free memory that a load may take unseen. For each file what it took at most, in
# KiB, above what was there before; Linux counts VmRSS now, VmHWM at the most since `clear_refs` was told 5.
PEAKS = """
import sys, torch
from pathlib import Path
from clipfast.weights import load

def kibibytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

load(sys.argv[1], "cpu", quick_gelu=True)  # what is imported at the first load
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = kibibytes("VmRSS")
    model = load(path, "cpu", quick_gelu=True)[0]
    assert model.dtype == torch.float32
    print(kibibytes("VmHWM") - before)
    del model
"""


def test_each_tensor_is_held_once(tmp_path: Path) -> None:
    sizes = {"embed_dim": 512, "image_resolution": 32, "vision_layers": 2, "vision_width": 512, "vision_patch_size": 16}
    sizes |= {"context_length": 16, "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8}
    with torch.device("meta"):
        state = CLIP(**sizes, transformer_layers=2).state_dict()
    state = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    weight = sum(tensor.nbytes for tensor in state.values()) / 1024
    moments = {"exp_avg": {name: torch.zeros_like(t) for name, t in state.items()}}  # an optimiser's, not to be read
    torch.save({"state_dict": state, "optimizer": moments}, tmp_path / "m.pt")
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    export(build_model(state).float(), tmp_path / "transformers", "transformers")  # query, key and value apart
    paths = [str(tmp_path / name) for name in ("m.pt", "m.safetensors", "transformers")]
    told = subprocess.run([sys.executable, "-c", PEAKS, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 0, told.stderr
    assert weight > 100_000
    for path, peak in zip(paths, map(int, told.stdout.split()), strict=True):
        assert 0.5 * weight < peak < 1.5 * weight, path


def test_a_loaded_file_may_be_written_again(tmp_path: Path, source: nn.Module) -> None:
    for path in (tmp_path / "m.pt", tmp_path / "m.safetensors"):
        write = torch.save if path.suffix == ".pt" else safetensors.torch.save_file
        write(source.state_dict(), path)
        model = load(path, "cpu", quick_gelu=True)[0]
        path.write_bytes(b"")
        assert_equal_features(model, source)


# ---- archives


class Everything(nn.Module):
    """What TorchScript knows of state: parameters, buffers, half precision, windows into storages, children, constants."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.randn(8, 4)
        self.window = nn.Parameter(shared[2:5].t())
        self.other = nn.Parameter(shared[4:])
        self.halved, self.brain = (nn.Parameter(torch.randn(3, dtype=kind)) for kind in (torch.float16, torch.bfloat16))
        self.linear = nn.Linear(3, 2)
        self.tied = self.linear.weight
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.blocks = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(2, 2)))
        self.names, self.numbers, self.constant = ["a", "b"], {"k": 1.5}, torch.ones(5)  # no state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.constant[:2] + torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_archives_have_torchscripts_state(tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(Everything()) if kind == "script" else torch.jit.trace(Everything(), torch.zeros(1, 3))
        made.save(tmp_path / "m.pt")
        expected = torch.jit.load(tmp_path / "m.pt").state_dict()
    with Archive(tmp_path / "m.pt") as archive:
        state = {name: stored.read() for name, stored in archive.state().items()}
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].equal(tensor) and state[name].dtype == tensor.dtype and state[name].stride() == tensor.stride()


class Runs(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.filled = path, torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        self.filled = torch.from_file(self.path, shared=True, size=1000)  # makes the file


def test_archives_run_no_code(tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    torch.jit.script(Runs(str(bait))).save(tmp_path / "m.pt")
    refused(partial(load, tmp_path / "m.pt"), "expected names with tensors")
    assert not bait.exists()
    torch.jit.load(tmp_path / "m.pt")
    assert bait.exists()  # what TorchScript's reader does with it


def repacked(path: Path, out: Path, change: dict[str, bytes], compress: bool = False) -> Path:
    """The zip with other contents of some entries, named behind the root."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            root, _, name = info.filename.partition("/")
            kind = zipfile.ZIP_DEFLATED if compress and name in change else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(f"{root}/{name}"), change.get(name, old.read(info)), compress_type=kind)
    return out


class Claim:
    """Pickles as a tensor of these sizes over storage 0 of 12 bytes."""

    def __init__(self, count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.count, self.arguments = count, (offset, shape, stride, False, {})


class Writer(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", value.count) if isinstance(value, Claim) else None

    def reducer_override(self, value: Any) -> Any:
        return (torch._utils._rebuild_tensor_v2, (value[0], *value[0].arguments)) if isinstance(value, Box) else NotImplemented


class Box(list):
    pass


def claimed(*numbers: Any) -> bytes:
    out = io.BytesIO()
    Writer(out, 2).dump({"state_dict": {"visual.conv1.weight": Box([Claim(*numbers)])}})
    return out.getvalue()


HOSTILE = {
    "a storage beyond the file": (claimed(10**12, 0, (10**12,), (1,)), "should hold 4,000,000,000,000 bytes"),
    "a tensor beyond its storage": (claimed(3, 2, (2,), (1,)), "does not fit"),
    "a tensor larger than its storage": (claimed(3, 0, (10**12,), (0,)), "does not fit"),
    "strides that go back": (claimed(3, 2, (2,), (-1,)), "strides"),
    "memory for memos": (b"\x80\x02]r\xff\xff\xff\x7f.", "expected a mapping"),
    "memory for a bytearray": (b"\x80\x05\x96" + (10**12).to_bytes(8, "little") + b".", "none, or cut short"),
    "an endless index": (b"\x80\x02" + b"]" * (9 << 20) + b".", "expected at most 8,388,608"),
    "a function": (b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "runs no code from a checkpoint"),
    "an attribute of a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        "gives attributes",
    ),
    "no end": (b"\x80\x02}", "none, or cut short"),
    "nothing": (b"", "none, or cut short"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices(tmp_path: Path, name: str) -> None:
    """Refused in one line, with no more memory than the file has."""
    index, match = HOSTILE[name]
    whole = saved(tmp_path / "whole.pt", {"a": torch.zeros(3)})
    path = repacked(whole, tmp_path / "m.pt", {"data.pkl": index})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(partial(load, path), match)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_hostile_zips(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", {"a": torch.zeros(3)})
    bomb = repacked(whole, tmp_path / "bomb.pt", {"data/0": bytes(300 << 20)}, compress=True)
    assert bomb.stat().st_size < 1 << 20
    refused(partial(load, bomb), "would take 314,572,800 bytes, expected at most")
    refused(
        partial(load, repacked(whole, tmp_path / "z.pt", {"data/0": bytes(12)}, compress=True)),
        "should hold 12 bytes as they are",
    )
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as two, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            two.writestr("m/data.pkl", b"")
    refused(partial(load, tmp_path / "two.pt"), "two of its entries have one name")
    content = bytearray(whole.read_bytes())
    at = content.rfind(b"PK\x01\x02", 0, content.rfind(b"PK\x05\x06"))  # the last entry of the directory
    first = content.find(b"PK\x01\x02")
    content[at + 42 : at + 46] = content[first + 42 : first + 46]  # lies where the first does
    (tmp_path / "overlap.pt").write_bytes(content)
    refused(partial(load, tmp_path / "overlap.pt"), "overlaps what follows it")


def test_modules_that_hold_each_other(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.jit.script(nn.Linear(2, 2)).save(whole)
    with zipfile.ZipFile(whole) as archive:
        named = re.search(rb"c__torch__[^\n]*\n\w+\n", archive.read("whole/data.pkl"))
    linear = named[0] + b")\x81"
    itself = b"\x80\x02" + linear + b"q\x00}X\x01\x00\x00\x00ah\x00sb."
    refused(partial(load, repacked(whole, tmp_path / "m.pt", {"data.pkl": itself})), "holds itself")


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"quick_gelu": "yes"}, "model_config.quick_gelu = 'yes'"),
        ({"quick_gelu": True, "vision_heads": 10**30}, "there is no model of sizes"),
        ({"quick_gelu": True, "vision": {"pool": "best"}}, "expected a pool of token, average"),
        ({"quick_gelu": True, "vision": {"never_heard_of": 1}}, "never_heard_of"),
        ({"quick_gelu": True, "towers": [[]]}, "model_config.towers"),
        ({"quick_gelu": True, "vision_layers": 10**9}, "model_config.vision_layers"),
        ([1], "expected model_config to be a mapping"),
    ],
)
def test_hostile_model_configs(tmp_path: Path, source: nn.Module, told: Any, match: str) -> None:
    refused(partial(load, saved(tmp_path / "m.pt", {"state_dict": source.state_dict(), "model_config": told})), match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": "two"}, "expected vision_layers to be a number"),
        ({"layers": 10**9}, "vision_layers to be a number of at most 1000"),
        ({"head_width": 0}, "another type or value"),
        ({"head_width": [64]}, "another type or value"),
        ({"image_size": {}}, "preprocess_cfg.size: expected pixels a side"),
        ({"mlp_ratio": "x" * 9}, "vision_cfg.mlp_ratio = 'xxxxxxxxx'"),
        ({"mlp_ratio": 1e300}, "vision_cfg.mlp_ratio = "),
    ],
)
def test_hostile_configurations(tmp_path: Path, source: nn.Module, change: dict, match: str) -> None:
    refused(
        partial(load, save_open_clip_folder(tmp_path / "x", source, open_clip_config(VIT | change, quick_gelu=True))), match
    )


def test_other_hostile_configurations(tmp_path: Path, source: nn.Module) -> None:
    folder = save_open_clip_folder(tmp_path / "x", source, open_clip_config(VIT, TEXT | {"context_length": 10**6}))
    refused(partial(load, folder), "context_length to be a number of at most 4096")
    for config in ([], 1, {"model_cfg": 3}, {"model_cfg": {"vision_cfg": 1}}):
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        refused(partial(load, folder), "expected a JSON object|another type or value")
    (folder / "open_clip_config.json").write_text("[" * 100_000)
    refused(partial(load, folder), "expected a JSON object")
    (folder / "open_clip_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": 3}))
    refused(partial(load, folder), "another type or value")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for index in ({"a": ["b"]}, {"a": 3}, ["a"], {"a": "../x.safetensors"}, {"a": "/etc/passwd"}):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        refused(partial(load, folder), "another type or value|expected a file beside it")
    assert clipfast.load is load


@pytest.mark.parametrize("written", ["with checksums", "without"])
@pytest.mark.parametrize("part", [False, True])
def test_a_damaged_weight_is_told(tmp_path: Path, written: str, part: bool) -> None:
    """A bit that fell over in a file: PyTorch reads it as another weight. Files may also be written without checksums."""
    sizes = {"embed_dim": 16, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
    sizes |= {"context_length": 8, "vocab_size": 60, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
    model = CLIP(**sizes)
    state = model.state_dict()
    name = "visual.conv1.weight"
    if part:  # two tensors in one storage: neither is the whole of it
        both = torch.stack([state[name], state[name]])
        state[name] = both[1]
    torch.serialization.set_crc32_options(written == "with checksums")
    try:
        torch.save({"state_dict": state, "model_config": {"quick_gelu": True}}, path := tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load(path, "cpu")[0].visual.conv1.weight, model.visual.conv1.weight)
    data = bytearray(path.read_bytes())
    place = data.rindex(model.visual.conv1.weight.detach().numpy().tobytes()[:64])
    data[place + 5] ^= 1
    path.write_bytes(data)
    if written == "with checksums":
        refused(partial(load, path, "cpu"), "has the checksum [0-9a-f]{8}, expected [0-9a-f]{8}")
    else:
        assert not torch.equal(load(path, "cpu")[0].visual.conv1.weight, model.visual.conv1.weight)

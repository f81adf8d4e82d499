"""Both towers on their way elsewhere: torch.export, ONNX by both exporters, TorchScript, compiled, copied; equal to eager."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clipfast
from tests.model.openai import FAMILIES, RESNET, VIT, compare, difference, gradients, images, pair, texts


class Tower(nn.Module):
    """One tower as a module of one argument, as export tools want it."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x) if self.name == "image" else self.model.encode_text(x)


TOWERS = {"ViT": (VIT, "image"), "ResNet": (RESNET, "image"), "text": (VIT, "text")}
each_tower = pytest.mark.parametrize("which", TOWERS)


def tower(which: str) -> tuple[Tower, Tensor, dict[int, Tensor]]:
    """The tower, an input of three, and inputs of other batch sizes."""
    sizes, name = TOWERS[which]
    model = pair(sizes)[1].requires_grad_(False)
    if name == "image":
        return Tower(model, name).eval(), images(sizes, 3), {n: images(sizes, n) for n in (1, 3, 5)}
    text = torch.cat([texts(), texts().flip(0), texts()])
    text[4, 2], text[4, 3:] = 59, 0
    return Tower(model, name).eval(), text[:3], {n: text[-n:] for n in (1, 3, 5)}


def check(run: Callable[[Tensor], Tensor], module: nn.Module, inputs: dict[int, Tensor]) -> None:
    with torch.no_grad():
        for number, x in inputs.items():
            assert not difference(module(x), run(x)), f"{number} rows"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Exporters warn of what they themselves will stop to do, and tracers of every shape that becomes a constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@each_tower
def test_torch_export(which: str) -> None:
    module, x, inputs = tower(which)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    check(exported.module(), module, inputs)
    assert not [n.target for n in exported.graph.nodes if "clipfast" in str(n.target)], "an export is of torch's operators"
    held = io.BytesIO()
    torch.export.save(exported, held)
    held.seek(0)
    check(torch.export.load(held).module(), module, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
@each_tower
def test_onnx(which: str, dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x, inputs = tower(which)
    path = str(tmp_path / "tower.onnx")
    if dynamo:
        shapes: dict[str, Any] = dict(dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    else:
        shapes = dict(dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}})
    torch.onnx.export(module, (x,), path, dynamo=dynamo, input_names=["x"], output_names=["y"], verbose=False, **shapes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    check(lambda x: torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0])), module, inputs)


@each_tower
def test_openvino(which: str) -> None:
    openvino = pytest.importorskip("openvino")
    module, x, inputs = tower(which)
    compiled = openvino.compile_model(
        openvino.convert_model(module, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    check(lambda x: torch.from_numpy(compiled(x.numpy())[0]), module, inputs)


@each_tower
def test_torch_jit_trace(which: str) -> None:
    module, x, inputs = tower(which)
    traced = torch.jit.trace(module, x)
    check(traced, module, inputs)
    held = io.BytesIO()
    torch.jit.save(traced, held)
    held.seek(0)
    check(torch.jit.load(held), module, inputs)


@each_tower
def test_torch_jit_script(which: str) -> None:
    sizes, name = TOWERS[which]
    module, _, inputs = tower(which)
    modules = [*module.model.modules()]
    with clipfast.kernels.use("reference"):
        scripted = torch.jit.script(module.model)
    assert all(is_ is was for is_, was in zip(module.model.modules(), modules, strict=True))
    check(scripted.encode_image if name == "image" else scripted.encode_text, module, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_without_graph_breaks(family: str) -> None:
    model = pair(FAMILIES[family])[1]
    image, text = images(FAMILIES[family]), texts()
    encode_image = torch.compile(model.encode_image, fullgraph=True, backend="aot_eager")
    encode_text = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    expected = [model.encode_image(image), model.encode_text(text)]
    expected_gradients = gradients(model, expected)
    got = [encode_image(image), encode_text(model.pack(text))]
    assert not difference(expected, got)
    assert not difference(expected_gradients, gradients(model, got))


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def touched(model: Any) -> None:
    """A LoRA in a block of either tower, and a mask of its own in the image tower."""
    for home in (model, model.visual):
        mlp = home.transformer.resblocks[0].mlp
        mlp.c_fc = Lora(mlp.c_fc)
    model.visual.transformer.resblocks[1].attn_mask = torch.randn(17, 17)


def test_a_touched_model_is_compiled_exported_and_traced() -> None:
    """Without a graph break too; the text padded, as what touches it wants it."""
    theirs, ours = pair(VIT, touched)
    ours.requires_grad_(False)
    text = texts()
    for name, x in (("image", images(VIT)), ("text", text)):
        expected, module = Tower(theirs, name).eval(), Tower(ours, name).eval()
        check(module, expected, {2: x})
        check(torch.compile(module, fullgraph=True, backend="aot_eager"), expected, {2: x})
        check(torch.export.export(module, (x,)).module(), expected, {2: x})
        check(torch.jit.trace(module, x), expected, {2: x})


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_copies_share_nothing(family: str) -> None:
    theirs, ours = pair(FAMILIES[family])
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
        for p in theirs.parameters():
            p.mul_(1)
    assert not compare(lambda m: [m.encode_image(images(FAMILIES[family])), m.encode_text(texts())], theirs, ours)
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(2)
    assert not compare(lambda m: [m.encode_image(images(FAMILIES[family])), m.encode_text(texts())], theirs, twin)

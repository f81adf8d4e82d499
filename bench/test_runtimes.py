"""One image, one text and small batches against what users of a CPU would take: ONNX Runtime and OpenVINO, in fp32 and with
weights of 8 bits, from an export of the same weights. They take what the processor has, whatever CLIPFAST_CPU holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.measure import DEVICE
from bench.rivals import imported
from bench.test_towers import CAPTIONS
from clipfast.inputs.tokenizer import tokenize
from clipfast.model import CLIP, MODELS

NAME = "ViT-B/32"
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of CPUs")


class Tower(nn.Module):
    """One tower of a model, as what is exported."""

    def __init__(self, model: CLIP, call: str) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.call)(x)


@pytest.fixture(scope="module")
def models() -> dict[str, CLIP]:
    """A model, and what serves single requests of it, in fp32 and in 8 bits."""
    torch.manual_seed(0)
    model = CLIP(**MODELS[NAME]).eval()
    return {"": model, "fp32": model.for_inference(packed=True), "int8": model.for_inference(int8=True)}


@pytest.fixture(scope="module")
def exported(models: dict[str, CLIP], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tensor], Path | str]:
    """The ONNX file of a tower for batches of any size of such inputs, or the reason why there is none."""

    @functools.cache
    def made(call: str, shape: tuple[int, ...]) -> Path | str:
        if isinstance(found := imported("onnx"), str):
            return found
        path = tmp_path_factory.mktemp("onnx") / f"{call}-{shape[-1]}.onnx"
        x = torch.zeros(2, *shape) if call == "encode_image" else torch.ones(2, *shape, dtype=torch.int64)
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        names: dict[str, Any] = dict(input_names=["x"], output_names=["y"], dynamic_axes=axes)
        torch.onnx.export(Tower(models[""], call), (x,), str(path), dynamo=False, verbose=False, **names)
        return path

    return lambda call, x: made(call, tuple(x.shape[1:]))


def onnx_runtime(path: Path, int8: bool) -> Callable[[Tensor], Any] | str:
    if isinstance(runtime := imported("onnxruntime"), str):
        return runtime
    if int8:
        if isinstance(quantization := imported("onnxruntime.quantization"), str):
            return quantization
        smaller = path.with_suffix(".int8.onnx")
        if not smaller.exists():
            quantization.quantize_dynamic(
                path, smaller, weight_type=quantization.QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
            )
        path = smaller
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def openvino(path: Path, int8: bool) -> Callable[[Tensor], Any] | str:
    if isinstance(runtime := imported("openvino"), str):
        return runtime
    core = runtime.Core()
    model = core.read_model(str(path))
    if int8:
        if isinstance(compression := imported("nncf"), str):
            return compression
        model = compression.compress_weights(model)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", hints)
    return lambda x: compiled(x.numpy())[0]


def rivals(path: Path | str, x: Tensor, expected: Tensor, kind: str) -> dict[str, Callable[[], Any] | str]:
    found: dict[str, Callable[[], Any] | str] = {}
    for name, make in (("onnxruntime", onnx_runtime), ("openvino", openvino)):
        run = path if isinstance(path, str) else make(path, kind == "int8")
        if not isinstance(run, str):
            near = torch.cosine_similarity(torch.as_tensor(run(x)).double(), expected.double(), dim=-1).min()
            assert near > (0.95 if kind == "int8" else 1 - 1e-6), f"{name} computes something else: cosine {near}"
        found[name] = run if isinstance(run, str) else functools.partial(run, x)
    return found


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("B", [1, 32])
def test_images_for_a_runtime(compare, models: dict[str, CLIP], exported, B: int, kind: str) -> None:
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        against = rivals(exported("encode_image", image), image, models[""].encode_image(image), kind)
        compare(lambda: models[kind].encode_image(image), against, items=B)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("B", [1, 32])
def test_texts_for_a_runtime(compare, models: dict[str, CLIP], exported, B: int, kind: str) -> None:
    """Of 12 tokens alone, of 8 to 13 together; the runtimes' are cut after the longest, which nobody pads to 77."""
    text, lengths = tokenize(CAPTIONS[3:4] if B == 1 else CAPTIONS * 2, return_lengths=True)
    text = text[:, : int(lengths.max())].long()
    with torch.no_grad():
        against = rivals(exported("encode_text", text), text, models[""].encode_text(text), kind)
        mean_tokens = float(lengths.double().mean())
        compare(lambda: models[kind].encode_text(text, lengths=lengths), against, items=B, mean_tokens=mean_tokens)

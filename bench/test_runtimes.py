"""One image, one text and 32 against what users of a CPU would take: ONNX Runtime and OpenVINO, in fp32 and with weights of 8
bits, from an export of the same weights, and open_clip. The two runtimes take what the processor has, whatever CLIPFAST_CPU
holds."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench.measure import DEVICE
from bench.rivals import imported, open_clip_model
from bench.test_towers import CAPTIONS, against, image_floor, text_floor
from clipfast.inputs.image import Preprocess
from clipfast.inputs.tokenizer import tokenize
from clipfast.model import CLIP, MODELS
from clipfast.weights.export import export

NAME = "ViT-B/32"
REST = 0.05  # seconds: a runtime's threads wait for more in a loop, on the core that the next one would use
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of CPUs")
Call = Callable[[Tensor], Any]


class Tower(nn.Module):
    """One tower of a model, as what is exported."""

    def __init__(self, model: CLIP, call: str) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.call)(x)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """A model, what serves single requests of it in fp32 and in 8 bits, and open_clip's of the same weights."""
    torch.manual_seed(0)
    model = CLIP(**MODELS[NAME]).eval().requires_grad_(False)
    theirs = open_clip_model(MODELS[NAME], model.state_dict())
    served = {"fp32": model.for_inference(packed=True), "int8": model.for_inference(int8=True)}
    return {"": model, "open_clip": theirs if isinstance(theirs, str) else theirs.eval(), **served}


@pytest.fixture(scope="module")
def exported(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tensor], Path | str]:
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


def onnx_runtime(path: Path, int8: bool) -> Call | str:
    """In 8 bits its weights by channel, as ours. Products alone: with its convolution an image took a quarter longer."""
    if isinstance(runtime := imported("onnxruntime"), str):
        return runtime
    if int8:
        if isinstance(quantization := imported("onnxruntime.quantization"), str):
            return quantization
        smaller, kind = path.with_suffix(".int8.onnx"), quantization.QuantType.QInt8
        if not smaller.exists():
            products = ["MatMul", "Gemm"]
            quantization.quantize_dynamic(path, smaller, weight_type=kind, op_types_to_quantize=products, per_channel=True)
        path = smaller
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def openvino(path: Path, int8: bool) -> Call | str:
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


def runtimes(path: Path | str, x: Tensor, expected: Tensor, kind: str) -> dict[str, Callable[[], Any] | str]:
    """Both on this input, once they were seen to compute the same; or why one does not run."""
    found: dict[str, Callable[[], Any] | str] = {}
    for name, make in (("ONNX Runtime", onnx_runtime), ("OpenVINO", openvino)):
        run = path if isinstance(path, str) else make(path, kind == "int8")
        if not isinstance(run, str):
            near = cosine(torch.as_tensor(run(x)), expected)
            assert near > (0.95 if kind == "int8" else 1 - 1e-6), f"{name} computes something else: cosine {near}"
        found[name] = run if isinstance(run, str) else functools.partial(run, x)
    return found


def cosine(got: Tensor, expected: Tensor) -> float:
    return torch.cosine_similarity(got.double(), expected.double(), dim=-1).min().item()


def note(kind: str, ours: Tensor, expected: Tensor, floor: tuple[int, int], **more: Any) -> dict[str, Any]:
    """The floor of a row and what is kept in it: in 8 bits the weights are a quarter, and the cosine to fp32 is told."""
    if kind != "int8":
        return dict(floor=floor, **more)
    assert (near := cosine(ours, expected)) > 0.995
    return dict(floor=(floor[0], floor[1] // 4), cosine_to_fp32=near, **more)


@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_images(compare, models: dict[str, Any], exported, kind: str, B: int) -> None:
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    model, ours, theirs = models[""], models[kind], models["open_clip"]
    with torch.no_grad():
        expected = model.encode_image(image)
        rivals = runtimes(exported("encode_image", image), image, expected, kind)
        if kind == "fp32":
            rivals |= against(theirs, lambda: theirs.encode_image(image), True)
        else:
            rivals["our fp32"] = lambda: models["fp32"].encode_image(image)
        floor = image_floor(MODELS[NAME], model, image)
        compare(
            lambda: ours.encode_image(image),
            rivals,
            items=B,
            rest=REST,
            **note(kind, ours.encode_image(image), expected, floor),
        )


def test_image_of_a_file(compare, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bytes of a PNG, as faster-clip takes them, whose weights are of 8 bits; its texts have another model."""
    pixels, file = torch.randint(0, 256, (375, 500, 3), dtype=torch.uint8), io.BytesIO()
    Image.fromarray(pixels.numpy()).resize((250, 188)).resize((500, 375)).save(file, "PNG")
    preprocess, rival = Preprocess(224), imported("faster_clip")

    def encode(model: CLIP) -> Tensor:
        return model.encode_image(preprocess(Image.open(file))[None])

    if not isinstance(rival, str):  # it looks for the published weights in a folder before it asks the network
        monkeypatch.setenv("FASTER_CLIP_CACHE", str(tmp_path))
        export(models[""], tmp_path / "sentence-transformers__clip-ViT-B-32" / "0_CLIPModel", "transformers")
        theirs = rival.ClipModel()
        assert cosine(torch.tensor(theirs.encode_image([file.getvalue()])), encode(models[""])) > 0.99  # it resizes otherwise
    call = rival if isinstance(rival, str) else lambda: theirs.encode_image([file.getvalue()])
    with torch.no_grad():
        compare(lambda: encode(models["int8"]), {"faster-clip": call}, items=1, rest=REST)


@pytest.mark.parametrize("B", [1, 32])
@pytest.mark.parametrize("kind", ["fp32", "int8", "padded"])
def test_texts(compare, models: dict[str, Any], exported, kind: str, B: int) -> None:
    """Of 12 tokens alone, of 8 to 13 together: the runtimes' are cut after the longest; or, as "padded" and in open_clip,
    filled up to 77, which ours never computes."""
    text, lengths = tokenize(CAPTIONS[3:4] if B == 1 else CAPTIONS * 2, return_lengths=True)
    text = text.long() if kind == "padded" else text[:, : int(lengths.max())].long()
    model, ours, theirs = models[""], models["int8" if kind == "int8" else "fp32"], models["open_clip"]
    with torch.no_grad():
        expected = model.encode_text(text, lengths=lengths)
        rivals = runtimes(exported("encode_text", text), text, expected, kind)
        if kind == "padded":
            rivals["open_clip"] = theirs if isinstance(theirs, str) else lambda: theirs.encode_text(text)
        elif kind == "int8":
            rivals["our fp32"] = lambda: models["fp32"].encode_text(text, lengths=lengths)
        got, floor = ours.encode_text(text, lengths=lengths), text_floor(MODELS[NAME], lengths)
        kept = note(kind, got, expected, floor, mean_tokens=float(lengths.double().mean()))
        compare(lambda: ours.encode_text(text, lengths=lengths), rivals, items=B, rest=REST, **kept)

"""Towers of 8-bit weights against ONNX Runtime's, from an export of the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.test_towers import image_floor, text_floor
from clipfast.model import CLIP, MODELS

SIZES = MODELS["ViT-B/32"]
TOKENS = 12  # of each caption: both sides then compute as many
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="8-bit weights are for CPUs")
BATCHES = [1, pytest.param(8, marks=pytest.mark.full), 32]


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**SIZES).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def runtime(model: CLIP, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Tensor], Any]:
    """(tower, an input) -> a call of ONNX Runtime on it with 8-bit weights by channel, or why there is none."""
    folder = tmp_path_factory.mktemp("onnx")

    def made(tower: str, x: Tensor) -> Callable[[], Tensor] | str:
        try:
            import onnxruntime

            session = onnxruntime.InferenceSession(exported(model, tower, x, folder), options(onnxruntime))
        except Exception as error:  # noqa: BLE001 - whatever a rival raises is the reason
            return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return made


def options(onnxruntime: Any) -> Any:
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = torch.get_num_threads()
    return found


class Tower(nn.Module):
    def __init__(self, model: CLIP, name: str) -> None:
        super().__init__()
        self.model, self.name = model, f"encode_{name}"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.name)(x)


def exported(model: CLIP, tower: str, x: Tensor, folder: Path) -> str:
    """The file of a tower with 8-bit weights, made once. Products alone are rounded: with its convolution an image took a
    quarter longer there."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, rounded = (str(folder / f"{tower}{kind}.onnx") for kind in ("", " in int8"))
    if not Path(rounded).exists():
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Tower(model, tower), (x,), plain, dynamo=False, input_names=["x"], output_names=["y"],
                              dynamic_axes=axes)  # fmt: skip
            kinds = ["MatMul", "Gemm"]
            quantize_dynamic(plain, rounded, weight_type=QuantType.QInt8, op_types_to_quantize=kinds, per_channel=True)
    return rounded


def measured(
    compare: Callable, runtime: Callable, model: CLIP, tower: str, x: Tensor, floor: tuple[int, int], **given: Any
) -> None:
    ours = model.for_inference(int8=True)
    encode, plain = (getattr(m, f"encode_{tower}") for m in (ours, model))
    cosine = torch.cosine_similarity(encode(x, **given), plain(x, **given)).min().item()
    assert cosine > 0.995
    rivals = {"ONNX Runtime int8": runtime(tower, x), "our fp32": lambda: plain(x, **given)}
    compare(lambda: encode(x, **given), rivals, items=len(x), floor=floor, cosine_to_fp32=cosine)


@pytest.mark.parametrize("B", BATCHES)
def test_int8_image(compare, runtime, model: CLIP, B: int) -> None:
    image = torch.randn(B, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    flops, weights = image_floor(SIZES, model, image)
    measured(compare, runtime, model, "image", image, (flops, weights // 4))


@pytest.mark.parametrize("B", BATCHES)
def test_int8_text(compare, runtime, model: CLIP, B: int) -> None:
    text = torch.randint(1, 49405, (B, TOKENS), generator=torch.Generator().manual_seed(0))
    text[:, -1] = 49407
    flops, weights = text_floor(SIZES, torch.full((B,), TOKENS))
    measured(compare, runtime, model, "text", text, (flops, weights // 4), lengths=[TOKENS] * B)

"""The plan of a large job: its counts against a count of the operations that run, and the page that is made of it."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import plan
from bench.rivals import open_clip
from clipfast.model import MODELS


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14"])
def test_the_image_tower_costs_what_open_clip_runs_less_the_last_block(name: str) -> None:
    """Matrix products, convolutions and attention of one image, counted by torch on no device."""
    m = MODELS[name]
    vision = {"image_size": 224, "layers": m["vision_layers"], "width": m["vision_width"], "patch_size": m["vision_patch_size"]}
    with torch.device("meta"):
        model = open_clip.model.CLIP(m["embed_dim"], vision, {"layers": 1})
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.visual(image)
    L, C = (224 // m["vision_patch_size"]) ** 2 + 1, m["vision_width"]
    last = 24 * C**2 * L + 4 * L**2 * C - (4 * L * C * C // 64 + 20 * C**2)
    assert plan.tower_flops(name)[0] + last == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_steps_add_up() -> None:
    rates = plan.Rates()
    one, many = (plan.plan("ViT-B/32", gpus, 32_768, 256, rates) for gpus in (1, 256))
    assert one["bytes_features"] == one["bytes_weights"] == 0 and one["step"] == one["towers"] + one["loss"]
    assert many["loss"] == pytest.approx(one["loss"] / 256)
    assert many["towers"] == pytest.approx(one["towers"] / 256 * 3 / 4)  # 128 rows are one micro-batch: no second forward pass
    assert many["bytes_weights"] == pytest.approx(2 * 255 / 256 * 151_277_313 * 4)
    found = plan.breaks("ViT-B/32", 256, 256, rates)
    at = plan.plan("ViT-B/32", 1, found["loss"], 256, rates)
    assert at["loss"] == pytest.approx(at["towers"], rel=1e-3)
    with pytest.raises(ValueError, match="expected a batch that 3 GPUs share evenly"):
        plan.plan("ViT-B/32", 3, 32_768, 256, rates)
    with pytest.raises(ValueError, match="expected a ViT"):
        plan.tower_flops("RN50")


def test_the_page_is_what_the_function_makes() -> None:
    assert Path(plan.__file__).with_name("plan.md").read_text() == plan.page()

"""``for_inference(int8=True)``: features beside those of fp32, memory, what may be done with such a model and what not."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from clipfast.model import CLIP
from tests.model.test_model import captions, relative, small_batch
from tests.model.test_towers import FAMILIES, small

# Of a published model's proportions: blocks and vocabulary hold nearly all of its weights.
SIZES = dict(
    embed_dim=128, image_resolution=64, vision_layers=4, vision_width=256, vision_patch_size=16, context_length=32,
    vocab_size=49408, transformer_width=128, transformer_heads=2, transformer_layers=4,
)  # fmt: skip


def medium(**changes: object) -> CLIP:
    torch.manual_seed(0)
    return CLIP(**(SIZES | changes)).eval()  # type: ignore[arg-type]


def batch(model: CLIP, B: int = 5) -> tuple[Tensor, Tensor]:
    side = model.visual.input_resolution
    text = captions([3 + i for i in range(B)], model.context_length, model.vocab_size)
    return torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0)), text


def held(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_are_those_of_fp32_but_for_rounding(quick_gelu: bool) -> None:
    model = medium(quick_gelu=quick_gelu)
    image, text = batch(model)
    int8 = model.for_inference(int8=True)
    features = (int8.encode_image(image), model.encode_image(image)), (int8.encode_text(text), model.encode_text(text))
    for got, expected in features:
        cosine = F.cosine_similarity(got, expected)
        assert got.dtype == torch.float32 and not got.requires_grad and cosine.min() > 0.999 and cosine.max() < 1 - 1e-7
    assert torch.equal(int8.encode_text(text), int8.encode_text(text))
    scale = model.logit_scale.exp()
    assert (int8(image, text)[0] - model(image, text)[0]).abs().max() < 0.02 * scale  # of cosines from -1 to 1
    assert int8.encode_image(image[:0]).shape == (0, 128)


def test_memory_is_a_third() -> None:
    model = medium()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    int8 = model.for_inference(int8=True)
    assert held(int8) < held(model) / 3
    rounded = ("attn.in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "token_embedding.weight")
    weights = sum(4 * p.numel() for name, p in model.named_parameters() if name.endswith(rounded))
    others = held(model) - weights
    assert held(int8) - others < 0.32 * weights
    shared = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not any(t.data_ptr() in shared for t in [*int8.parameters(), *int8.buffers()] if t.numel())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in int8.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tower_runs(family: str) -> None:
    """A ResNet's image tower too, whose numbers stay as they are."""
    model, (image, text) = small(family).eval(), small_batch(family)
    int8 = model.for_inference(int8=True)
    assert F.cosine_similarity(int8.encode_image(image), model.encode_image(image)).min() > 0.995
    assert F.cosine_similarity(int8.encode_text(text), model.encode_text(text)).min() > 0.995


def test_a_hook_and_a_replaced_module_are_obeyed() -> None:
    """What somebody looks into runs as itself, in 8 bits as well."""
    model = medium()
    image, text = batch(model)
    int8 = model.for_inference(int8=True)
    plain, seen = (int8.encode_image(image), int8.encode_text(text)), []
    for transformer in (int8.visual.transformer, int8.transformer):
        for module in transformer.resblocks.modules():
            module.register_forward_hook(lambda module, args, out: seen.append(module))
    for got, expected in zip((int8.encode_image(image), int8.encode_text(text)), plain, strict=True):
        assert relative(got, expected) < 0.02
    assert {type(m).__name__ for m in seen} >= {"Int8Linear", "Int8Attention", "LayerNorm", "QuickGELU"}
    int8 = model.for_inference(int8=True)
    int8.visual.transformer.resblocks[1].mlp.c_fc = model.visual.transformer.resblocks[1].mlp.c_fc
    with torch.no_grad():
        assert relative(int8.encode_image(image), plain[0]) < 0.02


def test_it_can_be_kept() -> None:
    model = medium()
    _, text = batch(model)
    int8 = model.for_inference(int8=True)
    expected, file = int8.encode_text(text), io.BytesIO()
    torch.save(int8, file)
    file.seek(0)
    for same in (copy.deepcopy(int8), torch.load(file, weights_only=False)):
        assert torch.equal(same.encode_text(text), expected)
    other = medium(quick_gelu=True)
    nn.init.zeros_(other.ln_final.weight)
    other = other.for_inference(int8=True)
    other.load_state_dict(int8.state_dict())
    assert torch.equal(other.encode_text(text), expected)


def test_what_it_is_not_for_is_refused_in_one_line(tmp_path: Path) -> None:
    model = medium()
    image, _ = batch(model)
    int8 = model.for_inference(int8=True)
    with pytest.raises(RuntimeError, match="8-bit weights only infer; train the fp32 model"):
        int8.encode_image(image.requires_grad_())
    with pytest.raises(ValueError, match="expected a model of fp32 weights, got int8 ones"):
        clipfast.export(int8, tmp_path / "out")
    with pytest.raises(ValueError, match="expected a float32 model on the CPU, got int8 on cpu"):
        int8.for_inference(int8=True)
    with pytest.raises(ValueError, match="expected a float32 model on the CPU, got torch.bfloat16 on cpu"):
        medium().bfloat16().for_inference(int8=True)
    with pytest.raises(ValueError, match="expected one of packed, int8 and bf16, got several"):
        model.for_inference(packed=True, int8=True)
    with pytest.raises(ValueError, match="torch.jit.script: expected a model of fp32 weights, got int8 ones"):
        torch.jit.script(int8)
    with pytest.raises(ValueError, match="ask the fp32 model"):
        int8.transformer.resblocks[0].attn(image, image, image, need_weights=True)

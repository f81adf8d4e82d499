"""Accelerated models of timm against the same models before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionPoolLatent, LayerScale, Mlp
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from clipfast.interop import accelerate, restore
from clipfast.interop import timm as swapped
from tests.interop.models import changed_copies, compare, compare_gradients, doubled, images, tensors_of

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3, num_classes=5)


def shaken(model: Any, double: bool = True) -> Any:
    for parameter in model.parameters():  # biases start at zero and gains at one
        nn.init.normal_(parameter, std=0.2)
    return model.double() if double else model


def model_of(double: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    return shaken(VisionTransformer(**SIZES | dict(pre_norm=True) | options).eval(), double)


KINDS: dict[str, dict[str, Any]] = {
    "clip": {},
    "quick": dict(act_layer="quick_gelu"),
    "tanh": dict(act_layer="gelu_tanh"),
    "deit3": dict(pre_norm=False, init_values=0.1, no_embed_class=True, reg_tokens=2),
    "no biases": dict(qkv_bias=False, proj_bias=False),
    "average": dict(global_pool="avg", pre_norm=False),
    "siglip": dict(global_pool="map", class_token=False, pre_norm=False),
    "fc_norm": dict(fc_norm=True),
    "features": dict(num_classes=0, global_pool=""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_and_gradient(kind: str) -> None:
    model = model_of(**KINDS[kind])
    before, report = copy.deepcopy(model), accelerate(model)
    assert report and list(model.state_dict()) == list(before.state_dict())
    assert all(type(m) is type(b) for m, b in zip(model.modules(), before.modules(), strict=True))
    assert not any(line.kind == "Block" for line in report.left)
    for call in (lambda m: m(images()), lambda m: m.forward_features(images())):
        outputs = call(model), call(before)
        compare(*outputs, tolerance=1e-12)
        for of, output in zip((model, before), outputs, strict=True):
            of.zero_grad(set_to_none=True)
            output.pow(2).sum().backward()
        compare_gradients(model, before)
    restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def blocks_seen(monkeypatch, call: Callable[[], Any]) -> list[tuple]:
    seen, block = list[tuple](), swapped.fused_block
    monkeypatch.setattr(swapped, "fused_block", lambda s, p: seen.append((tuple(s.s.shape), s.read)) or block(s, p))
    call()
    monkeypatch.undo()
    return seen


def test_which_blocks_run_for_one_token(monkeypatch) -> None:
    """The last one where the class token alone is read, none where all states are, whatever ``reset_classifier`` did."""
    model = model_of()
    accelerate(model)
    all_states, one = ((2, 17, 32), False), ((2, 17, 32), True)
    assert blocks_seen(monkeypatch, lambda: model(images())) == [all_states, one]
    assert blocks_seen(monkeypatch, lambda: model.forward_features(images())) == [all_states] * 2
    model.reset_classifier(3, "avg")
    shaken(model.head)
    before = copy.deepcopy(model)
    restore(before)
    assert blocks_seen(monkeypatch, lambda: model(images())) == [all_states] * 2
    compare(model(images()), before(images()))
    model.reset_classifier(0, "token")
    before.reset_classifier(0, "token")
    assert blocks_seen(monkeypatch, lambda: compare(model(images()), before(images()))) == [all_states, one]


def test_intermediate_states_masks_and_causality() -> None:
    model = model_of()
    before = copy.deepcopy(model)
    accelerate(model)
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(3)) > 0.3
    for call in (
        lambda m: m.forward_intermediates(images(), norm=True, return_prefix_tokens=True),
        lambda m: m.forward_intermediates(images(), [0], stop_early=True, output_dict=True),
        lambda m: m.get_intermediate_layers(images(), 2, reshape=True),
        lambda m: m(images(), attn_mask=mask),
        lambda m: m(images(), is_causal=True),
        lambda m: m.blocks[1](m.blocks[0](m.patch_embed(images())), None, True),
        lambda m: m.forward_head(m.forward_features(images()), pre_logits=True),
    ):
        compare(call(model), call(before))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(qk_norm=True), "qk_norm"),
        (dict(mlp_layer=timm.layers.SwiGLU), "SwiGLU is not computed"),
        (dict(attn_layer=timm.layers.DiffAttention), "DiffAttention"),
        (dict(block_fn=ParallelScalingBlock), "of a kind that is not computed"),
        (dict(dynamic_img_size=True), "dynamic_img_size"),
        (dict(norm_layer="rmsnorm"), "of another class"),
        (dict(attn_drop_rate=0.3), "while it trains"),
        (dict(drop_path_rate=0.5, depth=3), "while it trains"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_left_and_named(options: dict[str, Any], told: str) -> None:
    model = model_of(**options)
    model.train("while it trains" in told)
    before, report = copy.deepcopy(model), accelerate(model)
    assert any(told in line.says for line in report.left), str(report)
    outputs = []
    for of in (model, before):
        torch.manual_seed(4)
        outputs.append(of(images()))
    compare(*outputs)
    if model.training:  # in evaluation nothing is dropped
        model.eval(), before.eval()
        assert not [line for line in accelerate(model).left if line.kind != "VisionTransformer"]
        compare(model(images()), before(images()))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "heads": (lambda m: setattr(m.blocks[1], "attn", Attention(32, 2, attn_head_dim=8, qkv_bias=True)), "another width"),
    "one bias": (lambda m: setattr(m.blocks[1], "mlp", Mlp(32, 48, bias=(True, False))), "a bias in one linear"),
    "fast norm": (lambda m: setattr(m.blocks[1].norm1, "_fast_norm", True), "timm's fast one"),
    "one scale": (lambda m: setattr(m.blocks[1], "ls1", LayerScale(32, 0.3)), "layer scale is another"),
    "scaled": (lambda m: (setattr(m.blocks[1].attn, "scale", 0.7), setattr(m.blocks[1].attn, "fused_attn", False)), "scale"),
    "two queries": (lambda m: setattr(m, "attn_pool", AttentionPoolLatent(32, num_heads=2, latent_len=2)), "several queries"),
    "normed queries": (
        lambda m: setattr(m, "attn_pool", AttentionPoolLatent(32, num_heads=2, qk_norm=True, norm_layer=nn.LayerNorm)),
        "norms, or widths",
    ),
    "step": (lambda m: setattr(m, "forward_features", lambda x, **_: torch.ones(2, 17, 32).double()), "a part of its forward"),
    "size": (lambda m: setattr(m.patch_embed, "strict_img_size", False), "images of any size"),
    "pad": (lambda m: setattr(m.patch_embed, "dynamic_img_pad", True), "images of any size"),
    "overlap": (lambda m: setattr(m.patch_embed, "proj", nn.Conv2d(3, 32, 9, 8, padding=4)), "its patches overlap"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_left_and_named(change: str) -> None:
    model = model_of()
    make, told = CHANGES[change]
    make(model)
    shaken(model)
    before, report = copy.deepcopy(model), accelerate(model)
    assert any(told in line.says for line in report.left), str(report)
    with torch.no_grad():
        compare(model(images()), before(images()))


def test_other_architectures() -> None:
    """Rotary positions and SwiGLU are named; a subclass's blocks are fused, its forward is its own."""
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1).eval()
    expected = eva(torch.ones(1, 3, 28, 28))
    report = accelerate(eva)
    assert [line.kind for line in report.left] == ["EvaBlock"]
    compare(eva(torch.ones(1, 3, 28, 28)), expected, 1e-5)
    torch.manual_seed(0)
    two = dict(img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2)
    distilled = shaken(timm.create_model("deit_tiny_distilled_patch16_224", **two)).eval()
    expected = distilled(images())
    report = accelerate(distilled)
    assert [line.kind for line in report.left] == ["VisionTransformerDistilled"] and len(report.accelerated) == 4
    compare(distilled(images()), expected)
    resnet = accelerate(timm.create_model("resnet10t"))
    assert not resnet and "nothing is known" in str(resnet)


def test_hooks_see_what_they_saw() -> None:
    model = model_of(init_values=0.1, fc_norm=False)
    before = copy.deepcopy(model)
    accelerate(model)

    def seen(of: nn.Module, name: str) -> tuple[Any, list]:
        outputs: list[Any] = []
        handle = of.get_submodule(name).register_forward_hook(lambda m, args, out: outputs.append(tensors_of(out)))
        with torch.no_grad():
            out = of(images())
        handle.remove()
        return out, outputs

    for name, _ in before.named_modules():
        compare(seen(model, name), seen(before, name))
    compare(model(images()), before(images()))


def test_replaced_parts_run_as_themselves() -> None:
    model = model_of(init_values=0.1)
    before = copy.deepcopy(model)
    accelerate(model)
    leaves = [name for name, m in before.named_modules() if name and not list(m.children())]
    assert len(leaves) == 47
    for name in leaves:
        with doubled(name, model, before), torch.no_grad():
            compare(model(images()), before(images()))


def test_peft_lora(monkeypatch) -> None:
    """Adapters: outputs, gradients, and the fused way again once they are merged."""
    peft = pytest.importorskip("peft")
    model = model_of()
    accelerate(model)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False))
    before = copy.deepcopy(model)
    restore(before)
    outputs = model(images()), before(images())
    compare(*outputs)
    for output in outputs:
        output.sum().backward()
    compare_gradients(model, before)
    assert len([p for p in before.parameters() if p.grad is not None]) == 8
    merged = model.merge_and_unload()
    assert len(blocks_seen(monkeypatch, lambda: compare(merged(images()), outputs[1]))) == 2


def test_moved_cast_copied_pickled_and_twice() -> None:
    model = model_of(double=False)
    accelerate(model)
    assert len(accelerate(model).accelerated) == 5
    for other, twin in changed_copies(model):
        assert other.forward._module() is other and "forward" not in twin.__dict__
        model.load_state_dict(other.state_dict())
        compare((model(images(torch.float)), other(images(torch.float))), (twin(images(torch.float)),) * 2, 1e-5)
    model.double(), twin.double()
    compare(model(images()), twin(images()))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m.float()(images(torch.float)).float() for m in (model, twin))
    assert (got - expected).norm() < 0.05 * expected.norm()
    got, expected = (m.bfloat16()(images(torch.bfloat16)).float() for m in (model, twin))
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_recomputed_in_backward(monkeypatch) -> None:
    model = model_of().train()
    model.set_grad_checkpointing()
    before = copy.deepcopy(model)
    accelerate(model)
    before(images()).pow(2).sum().backward()
    assert len(blocks_seen(monkeypatch, lambda: model(images()).pow(2).sum().backward())) == 4
    compare_gradients(model, before)


def test_images_of_another_size_are_refused_as_timm_does() -> None:
    model = model_of()
    accelerate(model)
    with pytest.raises(AssertionError, match="doesn't match model"):
        model(images()[..., :24])


def test_compiled_exported_and_on_the_meta_device() -> None:
    model = model_of(depth=1)
    with torch.no_grad():
        expected = model(images())
        accelerate(model)
        torch._dynamo.reset()
        compare(torch.compile(model, backend="eager", fullgraph=True)(images()), expected)
        exported = torch.export.export(model, (images(),))
        assert "clipfast" not in str(exported.graph)
        compare(exported.module()(images()), expected)
        assert model.to("meta")(images().to("meta")).shape == (2, 5)

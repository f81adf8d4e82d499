"""Accelerated models of transformers against the same models before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from clipfast.interop import accelerate, restore
from clipfast.interop.deferred import Later
from tests.interop.models import (
    BERT,
    L,
    changed_copies,
    compare,
    compare_gradients,
    doubled,
    images,
    inputs_of,
    model_of,
    tensors_of,
    texts,
)

KINDS = [
    "CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection",
    "CLIPForImageClassification", "CLIPSegModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "SiglipModel",
    "Siglip2Model", "VisionTextDualEncoderModel",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_output_and_gradient(name: str) -> None:
    model = model_of(name)
    before, report = copy.deepcopy(model), accelerate(model)
    assert report and all(type(m) is type(b) for m, b in zip(model.modules(), before.modules(), strict=True))
    assert list(model.state_dict()) == list(before.state_dict())
    outputs, expected = (m(**inputs_of(model, masked=True)) for m in (model, before))
    compare(outputs, expected)
    for output in (outputs, expected):
        sum(t.pow(2).sum() for t in tensors_of(output).values()).backward()  # type: ignore[union-attr]
    compare_gradients(model, before)
    for of in (model, before):  # of what is read as a rule
        of.zero_grad(set_to_none=True)
        out = of(**inputs_of(model))
        read = [out[k] for k in ("logits_per_image", "text_embeds", "image_embeds", "logits") if k in out]
        (read or [out.pooler_output])[0].pow(2).sum().backward()
    compare_gradients(model, before)
    restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["CLIPModel", "MetaClip2Model", "SiglipModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("asked", [dict(output_hidden_states=True), dict(output_attentions=True), dict(return_dict=False)])
def test_states_attentions_and_tuples_on_request(name: str, asked: dict[str, bool]) -> None:
    model = model_of(name, attn_implementation="eager" if "output_attentions" in asked else "sdpa")
    before = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        compare(model(**inputs_of(model), **asked), before(**inputs_of(model), **asked))
        after = model(**inputs_of(model))  # the hooks of transformers that recorded are still there
        compare(after, before(**inputs_of(model)), 1e-6)  # eager attention has its softmax in fp32


def test_features_alone_take_the_short_way(monkeypatch) -> None:
    """No block sees a padded text, and the last one works for the token that is read alone; after states were recorded too."""
    from clipfast.interop import transformers_towers

    model = accelerated = model_of("CLIPModel")
    before = copy.deepcopy(model)
    accelerate(accelerated)
    ids, mask = texts()
    accelerated(ids, images(), output_hidden_states=True)
    seen, block = [], transformers_towers.fused_block
    monkeypatch.setattr(transformers_towers, "fused_block", lambda s, p: seen.append((tuple(s.s.shape), s.read)) or block(s, p))
    with torch.no_grad():
        compare(model.get_text_features(ids, mask).pooler_output, before.get_text_features(ids, mask).pooler_output)
        assert seen == [((24, 32), False), ((24, 32), True)]
        assert (model.get_image_features(images())[1] - before.get_image_features(images())[1]).abs().max() < 1e-12
        assert seen[2:] == [((2, 17, 32), True)]


@pytest.mark.parametrize("end", [2, 5, 59])
def test_end_tokens(end: int) -> None:
    """The highest id for 2; else the first place of the token, the first token where there is none."""
    model = model_of("CLIPModel", text=dict(eos_token_id=end))
    ids, _ = texts()
    ids[0, 4:6] = 5
    expected = model.get_text_features(ids).pooler_output
    accelerate(model)
    compare(model.get_text_features(ids).pooler_output, expected)


@pytest.mark.parametrize("changed", ["left", "positions", "longer", "embedding"])
def test_what_is_not_packed_runs_as_itself(changed: str) -> None:
    model = model_of("CLIPModel")
    ids, mask = texts()
    asked: dict[str, Any] = dict(input_ids=ids)
    if changed == "left":  # a mask that hides a token before the one that is read
        asked["attention_mask"] = mask.index_fill(1, torch.tensor([0]), 0)
    if changed == "positions":
        asked["position_ids"] = torch.arange(L - 1, -1, -1)[None]
    if changed == "embedding":
        model.text_model.embeddings.token_embedding = nn.Sequential(model.text_model.embeddings.token_embedding, nn.Tanh())
    if changed == "longer":
        accelerate(model)
        with pytest.raises(ValueError, match="max_position_embeddings"):  # transformers' own error
            model.get_text_features(ids.repeat(1, 2))
        return
    expected = model.get_text_features(**asked)
    accelerate(model)
    compare(model.get_text_features(**asked), expected)


def test_images_of_another_size() -> None:
    model = model_of("CLIPModel")
    large = torch.randn(1, 3, 40, 48, dtype=torch.double)
    expected = model.get_image_features(large, interpolate_pos_encoding=True)
    accelerate(model)
    compare(model.get_image_features(large, interpolate_pos_encoding=True), expected)
    with pytest.raises(ValueError, match="doesn't match model"):
        model.get_image_features(large)


def test_the_last_hidden_state_is_computed_when_it_is_read() -> None:
    model = model_of("CLIPModel")
    ids, mask = texts()
    expected = model.get_text_features(ids, mask).last_hidden_state
    accelerate(model)

    def output() -> Any:
        with torch.no_grad():
            return model.get_text_features(ids, mask)

    assert type(output().unread()) is Later
    assert isinstance(output(), transformers.modeling_outputs.BaseModelOutputWithPooling)
    for read in (
        lambda o: o.last_hidden_state, lambda o: o["last_hidden_state"], lambda o: o[0], lambda o: o[:1][0],
        lambda o: o.get("last_hidden_state"), lambda o: dict(o)["last_hidden_state"], lambda o: {**o}["last_hidden_state"],
        lambda o: o.to_tuple()[0], lambda o: next(iter(o.values())), lambda o: torch.utils._pytree.tree_leaves(o)[0],
        lambda o: pickle.loads(pickle.dumps(o)).last_hidden_state, lambda o: copy.deepcopy(o)["last_hidden_state"],
    ):  # fmt: skip
        o = output()
        with torch.enable_grad():
            got = read(o)
        compare(got, expected)
        assert not got.requires_grad  # as the call was
    o = output()
    assert list(o) == ["last_hidden_state", "pooler_output"] and len(o) == 2 and o[1] is o["pooler_output"] is o.pooler_output
    assert type(o.unread()) is Later
    o = output()
    with torch.no_grad():
        model.text_model.encoder.layers[0].mlp.fc1.bias.add_(1)
    with pytest.raises(RuntimeError, match="expected the model's weights to be those of the call"):
        o.last_hidden_state  # noqa: B018


def test_moved_cast_loaded_copied_pickled_and_twice() -> None:
    model = model_of("CLIPModel", double=False)
    ids, mask = texts()
    accelerate(model)
    report = accelerate(model)
    assert len(report.accelerated) == 9
    for other, twin in changed_copies(model):
        assert other.text_model.forward._module() is other.text_model
        compare(other(ids, images(torch.float)), twin(ids, images(torch.float)), 1e-5)
        assert not any("forward" in m.__dict__ for m in twin.modules()) and "forward" in other.text_model.__dict__
        model.load_state_dict(other.state_dict())
        compare(model(ids, images(torch.float)), twin(ids, images(torch.float)), 1e-5)
    model.double()
    compare(model(ids, images()), twin.double()(ids, images()))
    model.bfloat16(), twin.bfloat16()
    got, expected = model.get_text_features(ids).pooler_output, twin.get_text_features(ids).pooler_output
    assert (got.float() - expected.float()).norm() < 0.05 * expected.float().norm()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m.float().get_image_features(images(torch.float)).pooler_output for m in (model, twin))
    assert (got.float() - expected.float()).norm() < 0.05 * expected.float().norm()


def test_the_call_keeps_its_signature_and_the_model_its_files(tmp_path) -> None:
    import inspect

    model = model_of("CLIPModel")
    before = inspect.signature(model.text_model.forward)
    expected = model(*texts()[:1], images())
    accelerate(model)
    assert inspect.signature(model.text_model.forward) == before
    model.save_pretrained(tmp_path)
    again = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.double)
    assert not any("forward" in m.__dict__ for m in again.modules())
    compare(again(*texts()[:1], images()), expected)


def test_hooks_and_replaced_layers_run_as_themselves() -> None:
    """Each module in turn is hooked, and each linear and norm replaced by one that doubles: outputs and what hooks see."""
    model = model_of("CLIPModel")
    before = copy.deepcopy(model)
    accelerate(model)
    ids, mask = texts()

    def seen(of: nn.Module, name: str) -> tuple[Any, list]:
        shapes: list[Any] = []
        handle = of.get_submodule(name).register_forward_hook(lambda m, args, out: shapes.append(tensors_of(out)))
        with torch.no_grad():
            out = of(ids, images(), mask)
        handle.remove()
        return out, shapes

    for name, module in before.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            (out, shapes), (expected, wanted) = seen(model, name), seen(before, name)
            compare(out.logits_per_image, expected.logits_per_image)
            assert len(shapes) == len(wanted), name
            for got, other in zip(shapes, wanted, strict=True):
                compare(got, other)
    compare(model(ids, images(), mask), before(ids, images(), mask))

    for name in [name for name, m in before.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)]:
        with doubled(name, model, before):
            compare(model(ids, images(), mask), before(ids, images(), mask))


def test_peft_lora() -> None:
    """Adapters on projections and MLPs: outputs, gradients, and the fused way again once they are merged."""
    peft = pytest.importorskip("peft")
    model = model_of("CLIPModel")
    accelerate(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config)
    before = copy.deepcopy(model)
    restore(before)
    ids, mask = texts()
    outputs, expected = (
        m(input_ids=ids, pixel_values=images(), attention_mask=mask, return_loss=False) for m in (model, before)
    )
    compare(outputs, expected)
    for output in (outputs, expected):
        output.logits_per_image.sum().backward()
    grads = {k: p.grad for k, p in before.named_parameters() if p.requires_grad}
    assert len(grads) == 16
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - grads[name]).norm() <= 1e-9 * (1e-3 + grads[name].norm()), name
    report = accelerate(model)
    assert {line.kind for line in report.left} == {"CLIPTextModel", "CLIPEncoderLayer"}
    merged = model.merge_and_unload()
    assert type(merged.get_text_features(ids).unread()) is Later
    compare(merged(ids, images(), mask), expected)


def test_linears_that_are_replaced_as_quantisers_do() -> None:
    """A class of its own, whose weight is not what it multiplies by."""

    class Linear8bit(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * 0.5, self.bias)

    model = model_of("CLIPModel")
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.__class__ = Linear8bit
    expected = model(*texts()[:1], images())
    report = accelerate(model)
    assert "replaced, wrapped or hooked" in str(report)
    compare(model(*texts()[:1], images()), expected)


def test_training_with_dropout_and_checkpointing() -> None:
    ids, mask = texts()
    model = model_of("CLIPModel", text=dict(attention_dropout=0.5), image=dict(attention_dropout=0.5)).train()
    before = copy.deepcopy(model)
    accelerate(model)
    outputs = []
    for of in (model, before):
        torch.manual_seed(4)
        outputs.append(of(ids, images(), mask))
    compare(*outputs)
    model = model_of("CLIPModel").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    before = copy.deepcopy(model)
    accelerate(model)
    for of in (model, before):
        of(ids, images(), mask).logits_per_image.sum().backward()
    compare_gradients(model, before)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModelWithProjection"])
def test_compiled(name: str) -> None:
    model = model_of(name, dict(num_hidden_layers=1), dict(num_hidden_layers=1))
    with torch.no_grad():
        expected = model(**inputs_of(model))
        accelerate(model)
        torch._dynamo.reset()
        compare(torch.compile(model, backend="eager", fullgraph=True)(**inputs_of(model)), expected)


def test_exported_and_on_the_meta_device() -> None:
    """An export is of torch's own operators; shapes are found without numbers."""
    model = model_of("CLIPModel", dict(num_hidden_layers=1), dict(num_hidden_layers=1))
    ids, _ = texts()
    with torch.no_grad():
        expected = model(ids, images()).logits_per_image
        accelerate(model)
        exported = torch.export.export(model, (ids, images()))
        assert "clipfast" not in str(exported.graph)
        compare(exported.module()(ids, images()).logits_per_image, expected)
        model.to("meta")
        assert model(ids.to("meta"), images().to("meta")).logits_per_image.shape == (2, 3)


def test_the_attention_implementation() -> None:
    ids, mask = texts()
    for name in ("CLIPModel", "SiglipModel", "BertModel"):
        if name == "BertModel":
            model = transformers.BertModel(transformers.BertConfig(**BERT)).eval().double()
            given = dict(input_ids=ids, attention_mask=mask)
        else:
            model = model_of(name)
            given = dict(input_ids=ids, pixel_values=images(), attention_mask=mask)
        unmasked = {k: v for k, v in given.items() if k != "attention_mask"}
        expected = model(**given), model(**unmasked)
        accelerate(model), restore(model)  # which registers it
        model.set_attn_implementation("clipfast")
        compare((model(**given), model(**unmasked)), expected)


@pytest.mark.parametrize("case", ["causal", "all", "masked", "scaled", "crossed", "dropped"])
def test_the_attention_function(monkeypatch, case: str) -> None:
    """Ours where it computes what is asked, sdpa's where not: the same either way."""
    from clipfast.interop import attention_interface

    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 4, 6, 16, generator=generator, dtype=torch.double)
    k, v = (k[:, :, :5], v[:, :, :5]) if case == "crossed" else (k, v)
    mask = (torch.rand(2, 1, 6, 6, generator=generator) > 0.3) | torch.eye(6, dtype=torch.bool) if case == "masked" else None
    more = dict(
        scaling=0.3 if case == "scaled" else 0.25, is_causal=case == "causal", dropout=0.5 if case == "dropped" else 0.0
    )
    calls, ours = [], attention_interface.attention
    monkeypatch.setattr(attention_interface, "attention", lambda *a, **b: calls.append(1) or ours(*a, **b))
    outputs = []
    for function in (attention_interface.forward, attention_interface.sdpa_attention_forward):
        torch.manual_seed(6)
        outputs.append(function(nn.Identity(), q, k, v, mask, **more)[0])
    compare(*outputs)
    assert len(calls) == (case in ("causal", "all"))


def test_the_report() -> None:
    unknown = accelerate(transformers.BertModel(transformers.BertConfig(**BERT)))
    assert not unknown and "nothing is known" in str(unknown) and unknown.left[0].kind == "BertModel"
    report = accelerate(model_of("AltCLIPModel"))
    assert "AltCLIPEncoderLayer" in str(report) and [line.name for line in report.left] == ["text_model"]
    with pytest.raises(TypeError, match="expected a model, an nn.Module, got str"):
        accelerate("a model")  # type: ignore[arg-type]
    model = model_of("CLIPModel", attn_implementation="eager")
    assert {line.name[:10] for line in accelerate(model).left} == {"text_model"}  # whose blocks get a mask
    model = model_of("CLIPVisionModel")
    model.encoder.forward = lambda *args, **kwargs: None
    report = accelerate(model)
    assert [line.says for line in report.left] == ["its forward is already replaced by somebody else's"]
    restore(model)
    assert "forward" in model.encoder.__dict__

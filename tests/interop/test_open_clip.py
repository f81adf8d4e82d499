"""Accelerated models of open_clip against the same models before."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.factory import _MODEL_CONFIGS
from open_clip.transformer import CustomTransformer
from torch import nn

from clipfast.interop import accelerate, restore
from clipfast.interop import open_clip as swapped
from clipfast.interop.accelerate import Report
from tests.interop.models import L, R, changed_copies, compare, compare_gradients, doubled, images, tensors_of, texts

VISION = dict(image_size=R, patch_size=8, layers=2, width=32, head_width=16)
TEXT = dict(context_length=L, vocab_size=60, width=32, heads=2, layers=2)
LAST = dict(pool_type="last", no_causal_mask=True)


def model_of(name: str = "CLIP", vision: dict | None = None, text: dict | None = None, double: bool = True, **more: Any) -> Any:
    """A tiny model of random weights, in eval mode."""
    vision, text = VISION | (vision or {}), TEXT | (text or {})
    torch.manual_seed(0)
    if name == "CoCa":
        vision, text = vision | dict(output_tokens=True), dict(embed_cls=True, output_tokens=True) | text
        decoder = dict(context_length=L, vocab_size=60, width=32, heads=2, layers=2)
        model = open_clip.CoCa(32, decoder, text, vision, **more)
    else:
        model = getattr(open_clip.model, name)(32, vision, text, **more)
    for parameter in model.parameters():  # biases start at zero and gains at one
        nn.init.normal_(parameter, std=0.2)
    return (model.double() if double else model).eval()


def called(model: Any) -> tuple:
    """What a model gives of images and texts in every way that asks for features."""
    ids, x = texts()[0], images(next(model.parameters()).dtype)
    if isinstance(model, open_clip.CoCa):  # whose decoder takes pairs
        return model(x, ids[:2], output_labels=False), model.encode_image(x), model.encode_text(ids)
    return model(x, ids), model.encode_image(x), model.encode_text(ids), model.get_logits(x, ids)


def everything(model: Any) -> tuple:
    """And its blocks' states."""
    ids, x = texts()[0], images()
    fmt = "NLC" if isinstance(model.visual, open_clip.model.VisionTransformer) else "NCHW"
    return *called(model), model.forward_intermediates(x, ids, normalize_intermediates=fmt == "NLC", image_output_fmt=fmt)


KINDS: dict[str, tuple[str, dict, dict, dict]] = {
    "OpenAI's": ("CLIP", {}, {}, dict(quick_gelu=True)),
    "ls": ("CLIP", dict(ls_init_value=0.1, act_kwargs=dict(approximate="tanh")), dict(norm_kwargs=dict(eps=1e-3)), {}),
    "CLIPA": ("CLIP", dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True), LAST, dict(init_logit_bias=-10)),
    "worldwide": ("CLIP", dict(mlp_ratio=2.5), dict(pool_type="eos", eos_id=2), dict(output_dict=True)),
    "SigLIP's text": ("CustomTextCLIP", {}, LAST | dict(proj_bias=True), {}),
    "causal, last": ("CustomTextCLIP", {}, dict(pool_type="last", proj_type="none", ls_init_value=0.1), {}),
    "all, first": ("CustomTextCLIP", dict(pool_type="none"), dict(pool_type="first", no_causal_mask=True), {}),
    "all, argmax": ("CustomTextCLIP", dict(output_tokens=False, block_type="custom"), dict(no_causal_mask=True), {}),
    "causal, first": ("CustomTextCLIP", dict(pos_embed_type="sin_cos_2d"), dict(pool_type="first"), {}),
    "custom": ("CustomTextCLIP", dict(block_type="custom", ls_init_value=0.1), dict(block_type="custom"), {}),
    "ResNet": ("CLIP", dict(layers=[1, 1, 1, 1], width=8, head_width=32, image_size=R), {}, {}),
    "CoCa": ("CoCa", dict(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5), {}, {}),
    "CoCa base": ("CoCa", {}, dict(embed_cls=False), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_output_and_gradient(kind: str) -> None:
    name, vision, text, more = KINDS[kind]
    model = model_of(name, vision, text, **more)
    before, report = copy.deepcopy(model), accelerate(model)
    assert report and list(model.state_dict()) == list(before.state_dict())
    assert all(type(m) is type(b) for m, b in zip(model.modules(), before.modules(), strict=True))
    call = called if kind == "all, first" else everything  # whose image features are of every token
    call = (lambda m: (m.encode_image(images()), m.encode_text(texts()[0]))) if kind == "all, first" else call
    for mode in (False, True):
        model.train(mode), before.train(mode)
        outputs = call(model), call(before)
        compare(*outputs)
        for of, output in zip((model, before), outputs, strict=True):
            of.zero_grad(set_to_none=True)
            sum(t.pow(2).sum() for t in tensors_of(output).values()).backward()  # type: ignore[union-attr]
        compare_gradients(model, before)
    restore(model)
    assert not any({"forward", "encode_text"} & vars(module).keys() for module in model.modules())


def blocks_seen(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[tuple]:
    seen, block = list[tuple](), swapped.fused_block
    monkeypatch.setattr(swapped, "fused_block", lambda s, p: seen.append((tuple(s.s.shape), s.read)) or block(s, p))
    call()
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP"])
def test_features_take_the_short_way(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No block sees what follows the end token, and the last one works for the token that is read alone."""
    model = model_of(name)
    accelerate(model)
    ids, _ = texts()
    assert blocks_seen(monkeypatch, lambda: model.encode_text(ids)) == [((24, 32), False), ((24, 32), True)]
    assert blocks_seen(monkeypatch, lambda: model.encode_image(images())) == [((2, 17, 32), False), ((2, 17, 32), True)]
    assert blocks_seen(monkeypatch, lambda: model(images(), ids)) == [
        ((2, 17, 32), False), ((2, 17, 32), True), ((24, 32), False), ((24, 32), True)
    ]  # fmt: skip
    model.visual.output_tokens = True
    assert blocks_seen(monkeypatch, lambda: model.visual(images())) == [((2, 17, 32), False)] * 2
    last = model_of("CustomTextCLIP", text=LAST)  # whose padding is seen
    accelerate(last)
    assert blocks_seen(monkeypatch, lambda: last.encode_text(ids)) == [((3, L, 32), False), ((3, L, 32), True)]


def test_states_tokens_and_blocks_called_alone() -> None:
    ids, x = texts()[0], torch.randn(L, 3, 32, dtype=torch.double)
    for name, more in (("CLIP", {}), ("CustomTextCLIP", {}), ("CustomTextCLIP", dict(output_tokens=True))):
        model = model_of(name, more, more)
        before = copy.deepcopy(model)
        accelerate(model)
        for call in (
            lambda m: m.forward_intermediates(images(), ids, image_output_extra_tokens=True, normalize_intermediates=True),
            lambda m: m.forward_intermediates(images(), ids, [0], [1], stop_early=True, intermediates_only=True),
            lambda m: m.visual(images()),
            lambda m: getattr(m, "text", m.encode_text)(ids),
            lambda m: m.visual.transformer.resblocks[0](x),
            lambda m: m.visual.transformer.resblocks[0](x, x + 1, x - 1),
            lambda m: m.visual.transformer(images()[:, 0]),
        ):  # fmt: skip
            compare(call(model), call(before))
        with pytest.raises(RuntimeError):  # open_clip's own error
            model.visual(torch.zeros(1, 3, R + 8, R))
        assert inspect.signature(model.visual.forward) == inspect.signature(before.visual.forward)
        if name == "CLIP":
            assert inspect.signature(model.encode_text) == inspect.signature(before.encode_text)


@pytest.mark.parametrize("kind", ["length first", "checkpointing", "patch dropout", "pruned", "CustomTransformer"])
def test_other_ways_through_a_transformer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = model_of(vision=dict(patch_dropout=0.5 if kind == "patch dropout" else 0.0)).train()
    if kind == "length first":
        for module in model.modules():
            if hasattr(module, "batch_first"):
                module.batch_first = False
    if kind == "checkpointing":
        model.set_grad_checkpointing()
    if kind == "pruned":
        model.visual.prune_intermediate_layers([0], prune_norm=True)
    if kind == "CustomTransformer":
        custom = CustomTransformer(32, 2, 2).double()
        custom.load_state_dict(custom.state_dict())
        model.transformer = custom
    before = copy.deepcopy(model)
    accelerate(model)
    for inside in (None, "transformer.resblocks.0.mlp.c_fc"):  # a hook in a block, which then runs as itself
        outputs = []
        for of in (model, before):
            handle = of.get_submodule(inside).register_forward_hook(lambda m, i, o: None) if inside else None
            of.zero_grad(set_to_none=True)
            torch.manual_seed(4)
            outputs.append(of(images(), texts()[0]))
            if kind == "CustomTransformer":
                outputs[-1] = outputs[-1][1]
            sum(t.pow(2).sum() for t in tensors_of(outputs[-1]).values()).backward()  # type: ignore[union-attr]
            if handle is not None:
                handle.remove()
        compare(*outputs)
        compare_gradients(model, before)
    if kind == "checkpointing":
        seen = blocks_seen(monkeypatch, lambda: model.encode_text(texts()[0]).sum().backward())
        assert seen == [((24, 32), False), ((24, 32), True), ((24, 32), False)]  # the first block twice


def test_masks() -> None:
    """Causal, all or first columns; any other runs as itself, also one that was causal a moment ago."""
    causal = torch.full((L, L), -torch.inf).triu(1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert swapped.causality(causal[:5, :5], 5) and swapped.causality(causal.clone(), L)
            assert swapped.causality(None, 7) is False
            for other in (causal[1:6, 1:6], causal[:5, 1:6], causal.T, causal.isinf(), causal[None], causal[:4, :4], -causal):
                length = other.shape[-1] + (len(other) == 4)
                assert swapped.causality(other, length) is (True if torch.equal(other, causal[1:6, 1:6]) else None)
    model = model_of()
    accelerate(model)
    ids, _ = texts()
    restored = copy.deepcopy(model)
    restore(restored)
    for change in (lambda m: m.attn_mask.zero_(), lambda m: m.attn_mask.copy_(causal), lambda m: m.attn_mask[3, 1].fill_(-2)):
        for of in (model, restored):
            change(of)
        compare(model.encode_text(ids), restored.encode_text(ids))
    with pytest.raises(RuntimeError):  # texts of another length: open_clip's own error
        model.encode_text(ids[:, :-1])


def hooked(of: nn.Module, name: str) -> tuple[Any, list]:
    shapes: list[Any] = []
    handle = of.get_submodule(name).register_forward_hook(lambda m, args, out: shapes.append(tensors_of(out)))
    with torch.no_grad():
        out = called(of)
    handle.remove()
    return out, shapes


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("CLIP", dict(ls_init_value=0.1), {}),
        ("CustomTextCLIP", dict(block_type="custom"), LAST | dict(proj_bias=True)),
    ],
    ids=["CLIP", "CustomTextCLIP"],
)
def test_hooks_and_replaced_parts_run_as_themselves(name: str, vision: dict, text: dict) -> None:
    """Each module in turn is hooked, and each leaf replaced by one that doubles."""
    model = model_of(name, vision, text)
    before = copy.deepcopy(model)
    accelerate(model)
    for module in [m for m, _ in before.named_modules() if m and not m.endswith("resblocks")]:
        compare(hooked(model, module), hooked(before, module))
    leaves = [m for m, of in before.named_modules() if isinstance(of, nn.Linear | nn.LayerNorm | nn.Embedding | nn.Conv2d)]
    leaves = [m for m in leaves if m != "text.text_projection"]  # which open_clip takes as a linear or a matrix alone
    leaves += [m for m, _ in before.named_modules() if m.endswith((".gelu", ".ls_1", ".ls_2"))]
    assert len(leaves) > 30
    for leaf in leaves:
        with doubled(leaf, model, before), torch.no_grad():
            compare(called(model), called(before))
    compare(called(model), called(before))


def test_moved_cast_loaded_copied_pickled_and_twice() -> None:
    model = model_of(double=False, cast_dtype=torch.bfloat16)  # whose norms sum in fp32
    accelerate(model)
    assert len(accelerate(model).accelerated) == 8
    for other, twin in changed_copies(model):
        assert other.encode_text._module() is other and "encode_text" not in vars(twin)
        compare(called(other), called(twin), 1e-5)
        model.load_state_dict(other.state_dict())
        compare(called(model), called(twin), 1e-5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = (m(images(torch.float), texts()[0])[:2] for m in (model, twin))
    compare(got, expected, 0.02)
    for of in (model, twin):  # as open_clip's precision "bf16": norms stay in fp32
        open_clip.model.convert_weights_to_lp(of, torch.bfloat16)
    assert model.visual.ln_post.weight.dtype == torch.float
    got, expected = ((m.encode_image(images(torch.bfloat16)), m.encode_text(texts()[0])) for m in (model, twin))
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    compare([t.float() for t in got], [t.float() for t in expected], 0.03)


def test_compiled_exported_and_on_the_meta_device() -> None:
    one = dict(layers=1)
    model = model_of("CustomTextCLIP", one, one | LAST)
    ids, x = texts()[0], images()
    with torch.no_grad():
        expected = model(x, ids)
        accelerate(model)
        torch._dynamo.reset()
        compare(torch.compile(model, backend="eager", fullgraph=True)(x, ids), expected)
        exported = torch.export.export(model, (x, ids))
        assert "clipfast" not in str(exported.graph)
        compare(exported.module()(x, ids), expected)
        model.to("meta")
        assert model(x.to("meta"), ids.to("meta"))[1].shape == (3, 32)
    model = model_of("CLIP", one, one)
    expected = model(x, ids)
    accelerate(model)
    compare(torch.compile(model, backend="eager")(x, ids), expected)
    assert model.to("meta")(x.to("meta"), ids.to("meta"))[1].shape == (3, 32)


# ---- every configuration


def cut(name: str) -> tuple[str, dict, dict]:
    """The class of a configuration, and its towers in our tiny sizes; a small trunk of timm for any of timm's."""
    config = _MODEL_CONFIGS[name]
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    kind = "CoCa" if "multimodal_cfg" in config else "CustomTextCLIP" if config.get("custom_text") else "CLIP"
    if text.get("hf_model_name"):
        kind, text = "CoCa" if kind == "CoCa" else "CustomTextCLIP", {}
    if vision.get("timm_model_name"):
        return kind, dict(timm_model_name="resnet10t", timm_pool="avg", timm_proj="linear"), text | TEXT
    for field in ("hf_tokenizer_name", "tokenizer_kwargs"):
        text.pop(field, None)
    small = dict(layers=[1, 1, 1, 1], width=8, head_width=32) if isinstance(vision.get("layers"), list) else VISION
    return kind, vision | small | dict(image_size=R), text | TEXT


def said(report: Report, tower: str) -> str:
    """In a word, what became of a tower."""
    inside = ("visual",) if tower == "image" else ("text", "transformer", "")
    left, runs = ([x for x in part if x.name.split(".")[0] in inside] for part in (report.left, report.accelerated))
    words = {
        "without padding": "packed", "padding is seen": "padded", "class token alone": "one token",
        "of all tokens are read": "all states", "not formed": "ResNet's pool",
    }  # fmt: skip
    found = [word for line in runs for told, word in words.items() if told in line.says]
    return ", ".join([*dict.fromkeys(found), *dict.fromkeys(f"not {line.kind}" for line in left)])


def test_every_configuration_of_open_clip() -> None:
    """All are equal; towers of one architecture are computed once. What stays open_clip's own is told, and stands here."""
    found: Counter[tuple[str, str]] = Counter()
    done: dict[str, str] = {}
    for name, config in _MODEL_CONFIGS.items():
        kind, *towers = cut(name)
        quick = config.get("quick_gelu", False)
        for tower, options in zip(("image", "text"), towers, strict=True):
            key = repr((tower, kind, options, quick))
            if key not in done:
                model = model_of(kind, **{"vision" if tower == "image" else "text": options}, quick_gelu=quick)
                with torch.no_grad():
                    expected = called(model)
                    report = accelerate(model)
                    compare(called(model), expected)
                done[key] = said(report, tower)
            hf = tower == "text" and config["text_cfg"].get("hf_model_name")
            found[tower, "transformers'" if hf else done[key]] += 1
    assert found == {
        ("image", "one token"): 46, ("image", "all states"): 8, ("image", "ResNet's pool"): 10,
        ("image", "not TimmModel"): 78,  # of whose trunks timm's file speaks
        ("image", "all states, not AttentionalPooler"): 2,  # CoCa
        ("text", "packed"): 92, ("text", "padded"): 39, ("text", "transformers'"): 10,
        ("text", "not TextTransformer, not Transformer, not ResidualAttentionBlock"): 3,  # CoCa, whose masks hide padding
    }  # fmt: skip


def test_the_report() -> None:
    for options, told in (
        (dict(qk_norm=True), "qk_norm"), (dict(scaled_cosine_attn=True), "scaled cosines"), (dict(scale_heads=True), "heads"),
        (dict(scale_attn=True), "scale_attn"), (dict(scale_attn_inner=True), "scale_attn_inner"), (dict(scale_fc=True), "fc"),
    ):  # fmt: skip
        model = model_of("CustomTextCLIP", text=options)
        ids, _ = texts()
        if "scaled_cosine_attn" not in options:  # whose forward open_clip 3.3 cannot run
            expected = model.encode_text(ids)
        report = accelerate(model)
        kinds = [line.kind for line in report.left if told in line.says]
        assert kinds == ["TextTransformer"] + ["CustomResidualAttentionBlock"] * 2, str(report)
        if "scaled_cosine_attn" not in options:
            compare(model.encode_text(ids), expected)
    model = model_of()
    model.encode_text = lambda text: text
    assert [line.says for line in accelerate(model).left] == ["its encode_text is already replaced by somebody else's"]
    restore(model)
    assert "encode_text" in vars(model)
    del model.encode_text
    report = accelerate(model)
    assert not report.left and "CLIP ((itself)): text without padding, the end token alone" in str(report)
    model.visual.transformer.resblocks[1].attn.dropout = 0.1
    assert not accelerate(model).left  # in evaluation nothing is dropped
    model.train()
    assert [line.name for line in accelerate(model).left] == ["visual.transformer.resblocks.1"]


def test_towers_of_other_libraries() -> None:
    """timm's trunk is accelerated by timm's file; a BERT of transformers is told of."""
    vision = dict(timm_model_name="vit_tiny_patch16_224", timm_pool="", timm_proj="linear")
    model = model_of("CustomTextCLIP", vision)
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60, intermediate_size=48
    )
    model.text = open_clip.model.HFTextEncoder("", 32, config, proj_type="linear").double().eval()
    given = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)).double(), texts()[0]
    with torch.no_grad():
        expected = model(*given)
        report = accelerate(model)
        compare(model(*given), expected)
    assert Counter(line.kind for line in report.accelerated)["Block"] == 12
    assert [line.kind for line in report.left if line.name.count(".") == 0] == ["TimmModel", "HFTextEncoder"]

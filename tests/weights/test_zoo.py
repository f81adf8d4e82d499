"""Every CLIP that open_clip and transformers can make of their own classes: features equal, live and saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from open_clip.factory import _MODEL_CONFIGS

import clipfast
from clipfast.weights import beyond_shapes, convert, export, from_tensors, load
from tests.weights.test_weights import (
    TEXT,
    VIT,
    assert_equal_features,
    make_open_clip,
    make_transformers,
    open_clip_config,
    randomised,
    refused,
    save_open_clip_folder,
)  # fmt: skip

OTHERS = ("timm_model_name", "hf_model_name")
ZOO = [
    name for name, config in _MODEL_CONFIGS.items()
    if not (config.get("multimodal_cfg") or any(config[part].get(o) for part in ("vision_cfg", "text_cfg") for o in OTHERS))
]  # fmt: skip


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with two blocks a tower, two heads, four patches, 300 token ids."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    else:
        width = 2 * vision.get("head_width", 64)
        vision |= {"layers": 2, "width": width, "image_size": 2 * vision["patch_size"]}
    text |= {"layers": 2, "width": 128, "heads": 2, "vocab_size": 300}
    return config | {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}


def texts(length: int, end: int) -> torch.Tensor:
    """[4, length]: the end token at places 3, 5, 9 and the last, padding behind, one id twice."""
    tokens = torch.randint(3, 299, (4, length), generator=torch.Generator().manual_seed(2))
    for row, at in enumerate((3, 5, 9, length - 1)):
        tokens[row, at + 1 :], tokens[row, at] = 0, end
    tokens[0, 5] = end
    return tokens


@torch.no_grad()
def assert_same(ours: Any, theirs: Any, end: int = 299) -> None:
    visual = theirs.visual
    side = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    tokens = texts(theirs.context_length, end)
    for a, b in (
        (ours.encode_image(image), theirs.encode_image(image)),
        (ours.encode_text(tokens), theirs.encode_text(tokens)),
    ):
        assert a.shape == b.shape and (a - b).norm() <= 2e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:.*clipfast.tokenize is not for this model")
@pytest.mark.parametrize("name", ZOO)
def test_configurations_of_open_clip(tmp_path: Path, name: str) -> None:
    config = cut(_MODEL_CONFIGS[name])
    text = config["text_cfg"]
    kind = open_clip.model.CustomTextCLIP if config.get("custom_text") else open_clip.model.CLIP
    arguments = {field: config[field] for field in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if field in config}
    theirs = randomised(kind(**arguments))
    end = text["eos_id"] if text.get("pool_type") == "eos" else 299
    ours = convert(theirs)
    assert_same(ours, theirs, end)
    assert_same(from_tensors(ours.state_dict(), json.loads(json.dumps(beyond_shapes(ours)))), theirs, end)
    folder = save_open_clip_folder(tmp_path / "x", theirs, {"model_cfg": config, "preprocess_cfg": {}})
    loaded, preprocess = load(folder, "cpu")
    assert_same(loaded, theirs, end)
    assert preprocess.resolution == loaded.visual.input_resolution


def test_the_zoo_is_whole() -> None:
    assert len(ZOO) == 55


TANH = {"act_kwargs": {"approximate": "tanh"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "final norm": {"vision": VIT | {"final_ln_after_pool": True}},
    "layer scale": {"vision": VIT | {"ls_init_value": 0.1}, "text": TEXT | {"ls_init_value": 0.1}},
    "no ln_pre": {"vision": VIT | {"no_ln_pre": True}},
    "tanh": {"vision": VIT | TANH, "quick_gelu": False},
    "eps": {"text": TEXT | {"norm_kwargs": {"eps": 1e-6}}},
    "last": {"text": TEXT | {"pool_type": "last"}},
    "eos": {"text": TEXT | {"pool_type": "eos", "eos_id": 7}},
    "mask": {"text": TEXT | {"no_causal_mask": True}, "kind": open_clip.model.CustomTextCLIP},
    "bias": {"init_logit_bias": -10.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_open_clip(tmp_path: Path, name: str) -> None:
    options = VARIANTS[name]
    theirs = make_open_clip(**options)
    end = 7 if name == "eos" else 299
    assert_same(convert(theirs), theirs, end)
    config = open_clip_config(options.get("vision", VIT), options.get("text", TEXT), quick_gelu=options.get("quick_gelu", True))
    assert_same(load(save_open_clip_folder(tmp_path / "x", theirs, config), "cpu")[0], theirs, end)
    again = load(export(convert(theirs), tmp_path / "again", "open_clip"), "cpu")[0]
    assert_same(again, theirs, end)
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").eval()
    assert_same(again, loaded, end)
    assert_same(load(export(convert(theirs), tmp_path / "a.safetensors"), "cpu")[0], theirs, end)
    if name == "bias":
        assert load(tmp_path / "again", "cpu")[0].logit_bias.item() == theirs.logit_bias.item()


def test_a_foreign_tokenizer_is_told(tmp_path: Path) -> None:
    text = TEXT | {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    folder = save_open_clip_folder(tmp_path / "x", make_open_clip(), open_clip_config(VIT, text, quick_gelu=True))
    with pytest.warns(UserWarning, match=r"hf_tokenizer_name = 'bert-base-uncased'.*clipfast.get_tokenizer\('.*x'\)"):
        load(folder, "cpu")


def test_the_checkpoint_says_how_images_are_made(tmp_path: Path) -> None:
    config = open_clip_config(quick_gelu=True)
    config["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}  # as LAION's ViT-L/14
    preprocess = load(save_open_clip_folder(tmp_path / "x", make_open_clip(), config), "cpu")[1]
    assert (preprocess.mean, preprocess.std, preprocess.resolution) == ((0.5,) * 3, (0.5,) * 3, 48)
    model = load(tmp_path / "x", "cpu")[0]
    assert model.visual.preprocess == preprocess and model.visual.preprocess_cfg["mean"] == (0.5,) * 3
    for layout in ("open_clip", "transformers", "safetensors"):
        again = load(export(model, tmp_path / f"m.{layout}", layout), "cpu")[1]
        assert replace(again, rgb_first=False, round_down=False) == preprocess
    for path in (hub := tmp_path / "m.transformers", export(load(hub, "cpu")[0], tmp_path / "kept.safetensors")):
        assert load(path, "cpu")[1] == replace(preprocess, rgb_first=True, round_down=True)
    with pytest.warns(UserWarning, match=r"images are made by Preprocess\(48, mean=\(0.5, 0.5, 0.5\)"):
        export(model, tmp_path / "openai.pt", "openai")
    live = open_clip.create_model(f"local-dir:{tmp_path / 'm.open_clip'}")
    assert convert(live).visual.preprocess == preprocess and live.visual.preprocess_cfg["mean"] == [0.5] * 3
    open_clip.model.set_model_preprocess_cfg(model, model.visual.preprocess_cfg | {"interpolation": "bilinear"})
    assert model.visual.preprocess == replace(preprocess, interpolation="bilinear")
    model.visual.preprocess = replace(preprocess, resize="longest")
    refused(lambda: export(model, tmp_path / "no", "transformers"), "transformers has no transform")
    assert not (tmp_path / "no").exists()
    make_transformers().save_pretrained(tmp_path / "y")
    told = {"image_processor": {"image_std": [1, 1, 1], "image_mean": [0, 0, 0], "resample": 2}}
    (tmp_path / "y" / "processor_config.json").write_text(json.dumps(told))
    preprocess = load(tmp_path / "y", "cpu")[1]
    assert (preprocess.std, preprocess.interpolation, preprocess.resolution) == ((1, 1, 1), "bilinear", 48)
    (tmp_path / "y" / "processor_config.json").write_text(json.dumps({"image_processor": {"resample": 9}}))
    refused(lambda: load(tmp_path / "y"), "processor_config.json.*resample")


# ---- transformers


TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (of the text tower, of the image tower)
    "mlp": ({"intermediate_size": 200}, {"intermediate_size": 300}),
    "eps": ({"layer_norm_eps": 1e-6}, {"layer_norm_eps": 1e-3}),
    "activations": ({"hidden_act": "gelu"}, {"hidden_act": "quick_gelu"}),
    "tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_new"}),
    "one channel": ({}, {"num_channels": 1}),
    "end token": ({"eos_token_id": 7}, {}),
    "dropout": ({"attention_dropout": 0.1}, {"attention_dropout": 0.2}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_variants_of_transformers(tmp_path: Path, name: str) -> None:
    text, vision = TRANSFORMERS[name]
    base = make_transformers().config
    theirs = randomised(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=base.text_config.to_dict() | text,
                vision_config=base.vision_config.to_dict() | vision,
                projection_dim=64,
            )
        )
    )
    theirs.save_pretrained(tmp_path / "x")
    image = torch.randn(2, vision.get("num_channels", 3), 48, 48)
    tokens = texts(16, text.get("eos_token_id", 299))
    with torch.no_grad():
        expected = theirs.get_image_features(image).pooler_output, theirs.get_text_features(tokens).pooler_output
    again = export(convert(theirs), tmp_path / "again", "transformers")
    for model in (convert(theirs), load(tmp_path / "x", "cpu")[0], load(again, "cpu")[0]):
        with torch.no_grad():
            for a, b in zip((model.encode_image(image), model.encode_text(tokens)), expected, strict=True):
                assert (a - b).norm() <= 2e-5 * b.norm()
    with torch.no_grad():
        loaded = transformers.CLIPModel.from_pretrained(again).eval()
        assert loaded.get_text_features(tokens).pooler_output.allclose(expected[1], atol=1e-5)
        assert loaded.get_image_features(image).pooler_output.allclose(expected[0], atol=1e-5)
    if name == "dropout":
        assert model.transformer.resblocks[0].attn.dropout == 0.1 and model.visual.transformer.resblocks[1].attn.dropout == 0.2


TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection")


@pytest.mark.parametrize("form", ["live", "saved", "prefix", "own"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_alone(tmp_path: Path, name: str, form: str) -> None:
    config, text = make_transformers().config, "Text" in name
    theirs = randomised(getattr(transformers, name)(config.text_config if text else config.vision_config))
    given = texts(16, 299) if text else torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        out = theirs(given)
    expected = out.pooler_output if "Projection" not in name else out.text_embeds if text else out.image_embeds
    if form == "live":
        model = convert(theirs)
    elif form == "own":
        model = load(export(convert(theirs), tmp_path / "a.safetensors"), "cpu")[0]
    else:
        theirs.save_pretrained(tmp_path)
        if form == "prefix":  # as versions before 5.6 saved it
            state = theirs.state_dict()
            prefix = "text_model." if text else "vision_model."
            state = {n if n.startswith(prefix) or "projection." in n else prefix + n: t for n, t in state.items()}
            (tmp_path / "model.safetensors").unlink()
            torch.save(state, tmp_path / "pytorch_model.bin")
        model = load(tmp_path, "cpu")[0]
    with torch.no_grad():
        got = model.encode_text(given) if text else model.encode_image(given)
    assert got.shape == expected.shape and (got - expected).norm() <= 2e-5 * expected.norm()
    assert (model.visual if text else model.transformer) is None
    for layout in ("openai", "open_clip", "transformers"):
        refused(lambda layout=layout: export(model, tmp_path / "out", layout), "one tower alone")


def test_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    theirs = make_transformers()
    theirs.save_pretrained(tmp_path / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert_equal_features(load(tmp_path, "cpu")[0], theirs)
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    refused(lambda: load(tmp_path), "found neither", FileNotFoundError)


def test_what_is_refused_says_what_serves() -> None:
    siglip = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.SiglipConfig(text_config=siglip | {"vocab_size": 40}, vision_config=siglip | {"image_size": 32})
    refused(lambda: convert(transformers.SiglipModel(config)), r"model_type = 'siglip'.*clipfast.accelerate\(model\)")
    assert callable(clipfast.convert)

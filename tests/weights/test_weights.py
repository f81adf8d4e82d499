"""`clipfast.weights` against the libraries whose files and modules it reads; every file is made here, with random weights."""

import hashlib
import http.server
import importlib
import json
import threading
import warnings
import zipfile
from functools import partial
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from clipfast.inputs.image import MEAN, STD, Preprocess
from clipfast.model import CLIP, MODELS
from clipfast.weights import hub, names
from clipfast.weights import open_clip as open_clip_names
from clipfast.weights import transformers as transformers_names

VIT = {"layers": 2, "width": 128, "patch_size": 16, "image_size": 48}
RESNET = {"layers": [1, 2, 1, 1], "width": 16, "image_size": 64}
TEXT = {"context_length": 16, "vocab_size": 300, "width": 128, "heads": 2, "layers": 3}
CASES = [(VIT, True), (VIT, False), (RESNET, True), (RESNET, False)]
CASE_IDS = ["vit-quickgelu", "vit-gelu", "resnet-quickgelu", "resnet-gelu"]

weights = importlib.import_module("clipfast.weights.load")  # `clipfast.weights.load` is the function


def randomised(module: nn.Module) -> nn.Module:
    """No weight left at 0 or 1, so that two exchanged gains, biases or statistics change the features."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return module.eval()


def make_open_clip(vision: dict = VIT, quick_gelu: bool = True, kind=open_clip.model.CLIP, text: dict = TEXT, **options):
    return randomised(kind(64, vision, text, quick_gelu=quick_gelu, **options))


def make_transformers(activation: str = "quick_gelu", eos: int = 299, **vision) -> transformers.CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "hidden_act": activation}
    text = tower | {"num_hidden_layers": 3, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": eos}
    vision = tower | {"num_hidden_layers": 2, "image_size": 48, "patch_size": 16} | vision
    return randomised(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    )


@torch.no_grad()
def features(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image features, text features, scale; the end token (299) stands at places 1 to 15, followed by padding."""
    generator = torch.Generator().manual_seed(1)
    size = 64 if "visual.layer1.0.conv1.weight" in model.state_dict() else 48
    image = torch.randn(3, 3, size, size, generator=generator)
    text = torch.randint(1, 299, (5, 16), generator=generator)
    for row, end in enumerate((1, 4, 8, 11, 15)):
        text[row, end], text[row, end + 1 :] = 299, 0
    if isinstance(model, transformers.CLIPModel):
        outputs = model.get_image_features(image).pooler_output, model.get_text_features(text).pooler_output
    else:
        outputs = model.encode_image(image), model.encode_text(text)
    return *outputs, model.logit_scale.exp().reshape(())


def assert_equal_features(model: CLIP, source) -> None:
    for ours, theirs in zip(features(model), features(source), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def with_marks(source: nn.Module) -> nn.Module:
    """The three extra entries by which OpenAI's archives are known."""
    sizes = {"input_resolution": source.visual.image_size, "context_length": 16, "vocab_size": 300}
    for mark, value in sizes.items():
        if hasattr(source, mark):
            delattr(source, mark)
        source.register_buffer(mark, torch.tensor(value[0] if isinstance(value, tuple) else value))
    return source


def save_torchscript(source: nn.Module, path: Path) -> None:
    size = source.visual.image_size
    arguments = torch.zeros(1, 3, *(size if isinstance(size, tuple) else [size] * 2)), torch.zeros(1, 16, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer remarks on open_clip's shape checks, and on its own age
        torch.jit.trace(source, arguments, check_trace=False).save(path)


def save_open_clip_folder(folder: Path, source, config: dict, name: str = "open_clip_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(source.state_dict(), folder / name)
    else:
        torch.save(source.state_dict(), folder / name)
    return folder


def open_clip_config(vision: dict = VIT, text: dict = TEXT, **fields) -> dict:
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text} | fields
    return {"model_cfg": model, "preprocess_cfg": preprocess | {"interpolation": "bicubic", "resize_mode": "shortest"}}


# ---- files and folders give the features of what was saved


@pytest.mark.parametrize(("vision", "quick_gelu"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("form", ["state", "checkpoint", "safetensors", "torchscript", "folder", "folder-bin", "marked"])
def test_load_files(tmp_path: Path, vision: dict, quick_gelu: bool, form: str) -> None:
    source, known = make_open_clip(vision, quick_gelu), {"quick_gelu": quick_gelu}
    path = tmp_path / "model.pt"
    if form == "state":
        torch.save(source.state_dict(), path)
    elif form == "checkpoint":  # as open_clip's training saves it under DistributedDataParallel
        wrapped = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
        optimizer = torch.optim.AdamW(source.parameters()).state_dict()
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped, "optimizer": optimizer}, path)
    elif form == "safetensors":
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(source.state_dict(), path)
    elif form == "torchscript":
        save_torchscript(source, path)
    elif form == "marked":
        save_torchscript(with_marks(source), path)
        known = {} if quick_gelu else {"quick_gelu": False}  # OpenAI's mean QuickGELU, unless the caller says otherwise
    else:
        name = "open_clip_model.safetensors" if form == "folder" else "open_clip_pytorch_model.bin"
        fields = {"quick_gelu": True} if quick_gelu else {}
        path, known = save_open_clip_folder(tmp_path / "x", source, open_clip_config(vision, **fields), name), {}
    model, preprocess = weights.load(path, "cpu", **known)
    assert isinstance(preprocess, Preprocess) and model.visual.input_resolution == vision["image_size"]
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert_equal_features(model, source)


def test_torchscript_is_recognised_by_its_content(tmp_path: Path) -> None:
    """The archive above is one: else `load` would have read it as a pickle."""
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    assert any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(tmp_path / "a.pt").namelist())
    with pytest.raises(ValueError, match="not the two towers of CLIP: lacks visual.conv1.weight"):
        weights.load(tmp_path / "a.pt")


@pytest.mark.parametrize("wrapper", ["text tower", "_orig_mod.module.", "module._orig_mod.", "nonscalar", "own"])
def test_load_layouts(tmp_path: Path, wrapper: str) -> None:
    source, known = make_open_clip(), {"quick_gelu": True}
    state = source.state_dict()
    if wrapper == "text tower":
        source = make_open_clip(kind=open_clip.model.CustomTextCLIP)
        assert "text.positional_embedding" in source.state_dict()
        state = source.state_dict()
    elif wrapper == "nonscalar":
        state["logit_scale"] = state["logit_scale"].reshape(1)
    elif wrapper == "own":  # sizes beside the weights: nothing is to be told, not even heads of an odd width
        source = make_open_clip(VIT | {"head_width": 32}, quick_gelu=False)
        state, known = source.state_dict(), {}
        state = {"state_dict": state, "model_config": {"quick_gelu": False, "vision_heads": 4}}
    else:
        state = {wrapper + name: tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "m.pt")
    assert_equal_features(weights.load(tmp_path / "m.pt", "cpu", **known)[0], source)


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards", "gelu", "eos 2", "written twice"])
def test_load_transformers(tmp_path: Path, form: str) -> None:
    source = make_transformers("gelu" if form == "gelu" else "quick_gelu", 2 if form == "eos 2" else 299)
    source.save_pretrained(tmp_path, max_shard_size="200KB" if form == "shards" else "5GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}  # old versions saved these
        torch.save(source.state_dict() | positions, tmp_path / "pytorch_model.bin")
    elif form == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    elif form == "written twice":  # as in older repositories: the second wins
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"text_config_dict": config["text_config"], "text_config": {"num_attention_heads": 1}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert_equal_features(weights.load(tmp_path, "cpu")[0], source)


def test_defaults_are_those_of_the_libraries() -> None:
    """A saved config.json leaves defaults out."""
    vision, text, clip = open_clip.CLIPVisionCfg(), open_clip.CLIPTextCfg(), transformers.CLIPConfig()
    theirs = {"vision_cfg": vision, "text_cfg": text, "vision_config": clip.vision_config, "text_config": clip.text_config}
    for section, fields in {**open_clip_names.DEFAULTS, **transformers_names.DEFAULTS}.items():
        assert fields == {field: getattr(theirs[section], field) for field in fields}
    for field, value in open_clip_names.VALUES.items():
        assert getattr(vision, field, value) in (value, None) and getattr(text, field, value) in (value, None)


@pytest.mark.parametrize("head_width", [32, 64, 128])
def test_heads_from_configuration(tmp_path: Path, head_width: int) -> None:
    vision = VIT | {"head_width": head_width}
    source = make_open_clip(vision)
    folder = save_open_clip_folder(tmp_path / "x", source, open_clip_config(vision, quick_gelu=True))
    assert_equal_features(weights.load(folder, "cpu")[0], source)
    assert_equal_features(weights.convert(source), source)


# ---- live modules


def as_openai(source: open_clip.model.CLIP) -> nn.Module:
    """A module as OpenAI's code has it: same attributes, none of open_clip's."""
    module = nn.Module()
    module.visual = source.visual
    module.visual.input_resolution = source.visual.image_size[0]
    for name in ("image_size", "pool_type", "final_ln_after_pool", "patch_dropout"):
        delattr(module.visual, name)
    for name in ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale"):
        setattr(module, name, getattr(source, name))
    module.context_length, module.vocab_size = source.context_length, source.vocab_size
    return module.eval()


@pytest.mark.parametrize(("vision", "quick_gelu"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("kind", [open_clip.model.CLIP, open_clip.model.CustomTextCLIP])
def test_convert_open_clip(vision: dict, quick_gelu: bool, kind: type) -> None:
    source = make_open_clip(vision, quick_gelu, kind)
    model = weights.convert(source)
    assert model.quick_gelu is quick_gelu
    assert_equal_features(model, source)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_convert_transformers(activation: str) -> None:
    source = make_transformers(activation)
    assert_equal_features(weights.convert(source), source)


def test_convert_openai_and_ours() -> None:
    source = make_open_clip()
    expected = features(source)
    model = weights.convert(as_openai(source))
    for ours, theirs in zip(features(model), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    twin = weights.convert(model)
    assert twin is not model and all(a.equal(b) for a, b in zip(features(twin), features(model), strict=True))


@pytest.mark.parametrize("make", [make_open_clip, make_transformers])
def test_convert_keeps_state_and_copies(make) -> None:
    source = make().half().train()
    for name, parameter in source.named_parameters():
        parameter.requires_grad_(not name.startswith("vis"))
    source.logit_scale.data = source.logit_scale.data.float()
    with torch.no_grad():
        model = weights.convert(source)
    assert model.training and model.visual.conv1.weight.dtype == torch.float16 and model.logit_scale.dtype == torch.float32
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if not name.startswith("visual.")
    }
    before = [p.detach().clone() for p in source.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(a.equal(b) for a, b in zip(before, source.parameters(), strict=True))


# ---- OpenAI's functions


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_convert_weights_is_openais(tmp_path: Path, vision: dict) -> None:
    source = make_open_clip(vision)
    torch.save(source.state_dict(), tmp_path / "m.pt")
    ours = weights.convert(source)
    weights.convert_weights(ours)
    loaded, _ = weights.load(tmp_path / "m.pt", "meta", quick_gelu=True)  # "meta" stands for any device but the CPU
    open_clip.model.convert_weights_to_fp16(source)
    expected = {name: tensor.dtype for name, tensor in source.state_dict().items()}
    for model in (ours, loaded):
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == expected
    assert set(expected.values()) >= {torch.float16, torch.float32}
    assert loaded.logit_scale.device.type == "meta"


@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_build_model(vision: dict) -> None:
    source = make_open_clip(vision)
    state = {name: tensor for name, tensor in with_marks(source).state_dict().items() if "batches_tracked" not in name}
    names = list(state)
    model = weights.build_model(state)
    assert list(state) == names and model.dtype == torch.float16 and not model.training
    halved = {name: tensor.half().float() for name, tensor in state.items() if tensor.dtype.is_floating_point}
    rounded = model.float().state_dict()
    assert all(torch.equal(rounded[name], tensor) or torch.equal(rounded[name], state[name]) for name, tensor in halved.items())


@pytest.mark.parametrize("name", list(MODELS))
def test_sizes_are_read_from_shapes(name: str) -> None:
    with torch.device("meta"):
        state = CLIP(**MODELS[name]).state_dict()
    sizes, renamed = names.from_state(name, state)
    width = MODELS[name]["vision_width"] * (32 if name.startswith("RN") else 1)
    assert sizes == MODELS[name] | {"vision_heads": width // 64} and renamed.keys() == state.keys()


def test_names_and_addresses() -> None:
    assert weights.available_models() == list(MODELS)
    for name, url in weights.URLS.items():
        theirs = open_clip.get_pretrained_url(name.replace("/", "-").replace("@", "-").removesuffix("px"), "openai")
        assert url == theirs and len(url.split("/")[-2]) == 64


def test_jit_is_said(tmp_path: Path) -> None:
    torch.save(make_open_clip().state_dict(), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="no TorchScript model"):
        weights.load(tmp_path / "m.pt", "cpu", jit=True, quick_gelu=True)


# ---- refusals: one line that names the field and the remedy


def refused(call, match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_activation_is_never_guessed(tmp_path: Path) -> None:
    torch.save(make_open_clip().state_dict(), tmp_path / "m.pt")
    refused(partial(weights.load, tmp_path / "m.pt"), r"pass quick_gelu=True .* or quick_gelu=False")


def test_heads_of_wide_towers_are_never_guessed(tmp_path: Path) -> None:
    vision = {"layers": 1, "width": 1280, "head_width": 80, "patch_size": 16, "image_size": 48}
    source = make_open_clip(vision)
    torch.save(source.state_dict(), tmp_path / "m.pt")
    refused(partial(weights.load, tmp_path / "m.pt", quick_gelu=True), "width 1280: pass vision_heads=")
    assert_equal_features(weights.load(tmp_path / "m.pt", "cpu", quick_gelu=True, vision_heads=16)[0], source)


def test_every_wrong_key_is_listed(tmp_path: Path) -> None:
    state = make_open_clip().state_dict()
    gone = ["visual.ln_pre.bias", "transformer.resblocks.1.mlp.c_fc.weight", "logit_scale"]
    for name in gone:
        del state[name]
    state["extra.weight"] = torch.zeros(1)
    state["ln_final.weight"] = torch.zeros(7)
    state["visual.class_embedding"] = state["visual.class_embedding"].to(torch.int8)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError) as caught:
        weights.load(tmp_path / "m.pt", quick_gelu=True)
    message = str(caught.value)
    assert "3 missing: " in message and all(name in message for name in gone)
    assert "1 unexpected: extra.weight" in message and "ln_final.weight (expected [128], got [7])" in message
    assert "1 not of floating point: visual.class_embedding" in message


def test_positions_are_not_resized(tmp_path: Path) -> None:
    source = make_open_clip()
    folder = save_open_clip_folder(tmp_path / "x", source, open_clip_config(VIT | {"image_size": 64}))
    refused(partial(weights.load, folder), r"visual.positional_embedding \(expected \[17, 128\], got \[10, 128\]\)")


@pytest.mark.parametrize(
    ("vision", "text", "fields", "match"),
    [
        ({"timm_model_name": "vit_base"}, {}, {}, "vision_cfg.timm_model_name"),
        ({"pool_type": "avg"}, {}, {}, "vision_cfg.pool_type = 'avg'"),
        ({"attentional_pool": True}, {}, {}, "vision_cfg.attentional_pool"),
        ({"image_size": [48, 64]}, {}, {}, "vision_cfg.image_size"),
        ({"never_heard_of": 1}, {}, {}, "vision_cfg.never_heard_of"),
        ({}, {"hf_model_name": "roberta-base"}, {}, "text_cfg.hf_model_name"),
        ({}, {"embed_cls": True}, {}, "text_cfg.embed_cls"),
        ({}, {"pool_type": "first"}, {}, "text_cfg.pool_type = 'first'"),
        ({}, {"norm_kwargs": {"elementwise_affine": False}}, {}, "text_cfg.norm_kwargs"),
        ({"act_kwargs": {"negative_slope": 1}}, {}, {}, "vision_cfg.act_kwargs"),
        ({"patch_dropout": 0.5}, {}, {}, r"vision_cfg.patch_dropout.*clipfast.accelerate\(model\)"),
        ({}, {}, {"multimodal_cfg": {"layers": 2}}, "model_cfg.multimodal_cfg"),
    ],
)
def test_open_clip_configurations_refused(tmp_path: Path, vision: dict, text: dict, fields: dict, match: str) -> None:
    config = open_clip_config(VIT | vision, TEXT | text, **fields)
    folder = save_open_clip_folder(tmp_path / "x", nn.Linear(1, 1), config)
    refused(partial(weights.load, folder), match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vision": VIT | {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision": VIT | {"patch_dropout": 0.5}}, "vision_cfg.patch_dropout"),
        ({"vision": VIT | {"attentional_pool": True}}, "unexpected: visual.attn_pool"),
        ({"vision": VIT | {"scale_fc": True}}, "block = 'CustomResidualAttentionBlock'"),
        ({"text": TEXT | {"proj_bias": True}, "kind": open_clip.model.CustomTextCLIP}, "lacks text_projection"),
    ],
)
def test_live_modules_refused(options: dict, match: str) -> None:
    refused(partial(weights.convert, make_open_clip(**options)), match)


def test_end_token_at_the_largest_id_is_accepted() -> None:
    source = make_open_clip(text=TEXT | {"pool_type": "eos", "eos_id": 299})
    assert_equal_features(weights.convert(source), source)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "siglip"}, "model_type = 'siglip'"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act = 'relu'"),
        ({"text_config": {"eos_token_id": [7, 8]}}, r"text_config.eos_token_id = \[7, 8\]"),
        ({"architectures": ["CLIPForImageClassification"]}, "architectures = 'CLIPForImageClassification'.*accelerate"),
        ({"vision_config": {"image_size": 224}}, "mis-shaped: visual.positional_embedding"),
        ({"text_config": {"num_hidden_layers": 4}}, "missing: transformer.resblocks.3.attn.in_proj_bias"),
    ],
)
def test_transformers_configurations_refused(tmp_path: Path, change: dict, match: str) -> None:
    make_transformers().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value in change.items():
        config[field] = config[field] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(partial(weights.load, tmp_path), match)


class Malicious:
    def __reduce__(self):
        return open, ("should-not-exist", "w")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, tmp_path / "m.pt", _use_new_zipfile_serialization=form == "zip")
    refused(partial(weights.load, tmp_path / "m.pt"), "clipfast runs no code from a checkpoint")
    assert not (tmp_path / "should-not-exist").exists()


@pytest.mark.parametrize("form", ["half", "tail", "empty", "text", "half safetensors", "half torchscript"])
def test_damaged_files(tmp_path: Path, form: str) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / f"m.{'safetensors' if 'safetensors' in form else 'pt'}"
    state = make_open_clip().state_dict()
    if "torchscript" in form:
        torch.jit.script(nn.Linear(50, 50)).save(whole)
    elif "safetensors" in form:
        safetensors.torch.save_file(state, whole)
    else:
        torch.save(state, whole)
    content = whole.read_bytes()
    cut = {"empty": b"", "text": b"<html>not found</html>", "tail": content[:-10]}
    path.write_bytes(cut.get(form, content[: len(content) // 2]))
    refused(partial(weights.load, path), r"got \d+ bytes that are none, or cut short .*: download or copy the file again")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.zeros(3), "expected a mapping of names to tensors, got Tensor"),
        ({}, "expected names with tensors"),
        ({"model": {"a": torch.zeros(1)}}, "not the two towers of CLIP: lacks visual.conv1.weight.*has a"),
        ({"net": {"a": torch.zeros(1)}}, "expected names with tensors, got .*'net': 'dict'"),
        ({"fc.weight": torch.zeros(2, 2)}, "not the two towers of CLIP: lacks visual.conv1.weight.*has fc.weight"),
        (
            {"visual.trunk.patch_embed.weight": torch.zeros(2, 2)},
            "an image tower of timm's .visual.trunk.patch_embed.weight, .*loaded by clipfast.interop.mobileclip.load",
        ),
        ({"logit_bias": torch.zeros(1)}, "has logit_bias"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(4)}, "loaded with its config.json, by its folder"),
    ],
)
def test_not_a_clip(tmp_path: Path, content, match: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(partial(weights.load, tmp_path / "m.pt"), match)


def test_not_a_module() -> None:
    refused(partial(weights.convert, nn.Linear(1, 1)), "expected a CLIP of OpenAI's clip", TypeError)


@pytest.mark.parametrize(("name", "near"), [("ViT-B-32", "nearest: ViT-B/32"), ("RN50x", "nearest: RN50"), ("~/zq", "folder")])
def test_unknown_names(name: str, near: str) -> None:
    refused(partial(weights.load, name), f"{name!r} not found.*{near}", RuntimeError)


def test_folders_that_lack_files(tmp_path: Path) -> None:
    refused(partial(weights.load, tmp_path), "neither open_clip_config.json nor config.json", FileNotFoundError)
    (tmp_path / "config.json").write_text("{")
    refused(partial(weights.load, tmp_path), "expected a JSON object")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    refused(partial(weights.load, tmp_path), "lacks model.safetensors and pytorch_model.bin", FileNotFoundError)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    refused(partial(weights.load, tmp_path), "lists one.safetensors, which is not there", FileNotFoundError)
    for config, match in (("{", "expected a JSON object"), ("{}", "lacks open_clip_model.safetensors")):
        (tmp_path / "open_clip_config.json").write_text(config)
        refused(partial(weights.load, tmp_path), match, ValueError if config == "{" else FileNotFoundError)


# ---- the Hugging Face cache, and OpenAI's archives over HTTP


def test_hub_cache_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--org--name", "0" * 40
    refused(
        partial(weights.load, "hf-hub:org/name", download_root=str(tmp_path)),
        "hf-hub:org/name: found neither .* without a network place in a folder",
        FileNotFoundError,
    )
    source = make_transformers()
    source.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("hf-hub:org/name", f"hf-hub:org/name@{commit}"):
        assert_equal_features(weights.load(name, "cpu", download_root=str(tmp_path))[0], source)
    refused(partial(weights.load, "hf-hub:a/b/c"), "check the name", OSError)


def test_hub_is_retried_only_once_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def unreachable(repo_id: str, file: str, local_files_only: bool, **_) -> str:
        tried.append(local_files_only)
        raise huggingface_hub.utils.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    refused(partial(weights.load, "hf-hub:org/name"), "without a network", FileNotFoundError)
    assert tried[0] is False and all(tried[1:])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An archive on 127.0.0.1 under the name "ViT-B/32"; `.cut` set: the connection breaks off halfway."""
    source = make_open_clip()
    expected = features(source)
    save_torchscript(with_marks(source), tmp_path / "archive.pt")
    body = (tmp_path / "archive.pt").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if owner.cut else body)

        def log_message(self, *_) -> None:
            pass

    owner = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    owner.requests, owner.cut, owner.expected = 0, False, expected
    owner.handle_error = lambda *_: None  # a client that leaves in the middle is part of the tests
    owner.url = f"http://127.0.0.1:{owner.server_port}/{hashlib.sha256(body).hexdigest()}/tiny.pt"
    owner.root = tmp_path / "cache" / "clip"
    thread = threading.Thread(target=owner.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setitem(weights.URLS, "ViT-B/32", owner.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield owner
    owner.shutdown()
    owner.server_close()
    thread.join()


def test_download_is_verified_and_kept(server, capfd: pytest.CaptureFixture) -> None:
    load = partial(weights.load, "ViT-B/32", "cpu", download_root=str(server.root))
    for _ in range(2):
        for ours, theirs in zip(features(load()[0]), server.expected, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert server.requests == 1 and "tiny.pt: 100%" in capfd.readouterr().err
    assert [path.name for path in server.root.iterdir()] == ["tiny.pt"]
    (server.root / "tiny.pt").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="expected SHA-256 .* downloading it again"):
        load()
    assert server.requests == 2 and (server.root / "tiny.pt").stat().st_size > 1000


def test_failed_downloads_leave_nothing(server, monkeypatch: pytest.MonkeyPatch) -> None:
    load = partial(weights.load, "ViT-B/32", "cpu", download_root=str(server.root))
    server.cut = True
    refused(load, r"broke off after \d+ of \d+ bytes\): without a network place it at .*tiny.pt", ConnectionError)
    assert not list(server.root.iterdir())
    server.cut = False
    monkeypatch.setitem(weights.URLS, "ViT-B/32", server.url.replace(server.url.split("/")[-2], "0" * 64))
    refused(load, "expected SHA-256 0000.*, got .*: try again", RuntimeError)
    assert not list(server.root.iterdir())
    monkeypatch.setattr(hub.tqdm, "update", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not list(server.root.iterdir())


def test_no_network_says_what_to_place_where(server) -> None:
    server.shutdown()
    server.server_close()
    load = partial(weights.load, "ViT-B/32", "cpu", download_root=str(server.root))
    refused(load, f"cannot download {server.url} .*place it at {server.root}/tiny.pt", ConnectionError)
    assert not list(server.root.iterdir())


def test_folder_that_cannot_be_written(server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file" / "below", tmp_path / "file"):
        refused(partial(weights.load, "ViT-B/32", download_root=str(root)), "give a writable download_root", OSError)
    (server.root / "tiny.pt").mkdir(parents=True)
    refused(partial(weights.load, "ViT-B/32", download_root=str(server.root)), "not a regular file", RuntimeError)

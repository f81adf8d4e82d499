"""Other people's programs on accelerated models, and on ours: the real packages, on tiny random weights."""

from __future__ import annotations

import copy
import importlib.util
import string
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from clipfast import CLIP, tokenize
from clipfast.interop import accelerate

WORDS = ["a red dog", "two cups of tea", "snow"]
END = 2 * len(string.ascii_lowercase) + 1


def tokenizer() -> Any:
    """A CLIPTokenizer of letters, which pads to 20 with its end token, the last of the vocabulary."""
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=20)


def text_config(end: int = END) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=END + 1, projection_dim=16,
        max_position_embeddings=20, eos_token_id=end, bos_token_id=END - 1, pad_token_id=END,
    )  # fmt: skip


def vision_config() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip


def random(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def clip_model() -> Any:
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    return random(transformers.CLIPModel(config))


def processor() -> Any:
    image = transformers.CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    return transformers.CLIPProcessor(image_processor=image, tokenizer=tokenizer())


def photos() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def close(got: Any, expected: Any) -> None:
    got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    assert got.shape == expected.shape and (got - expected).norm() <= 1e-5 * expected.norm()


def pipeline(text_encoder: Any, image_encoder: Any = None, checker: Any = None) -> Any:
    """A pipeline of Stable Diffusion that encodes."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    features = transformers.CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer(), unet, scheduler, checker, features, image_encoder,
        requires_safety_checker=checker is not None,
    )  # fmt: skip


def prompts(pipe: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack(pipe.encode_prompt(WORDS, "cpu", 1, True, negative_prompt=["blurred"] * 3, **more))


def test_diffusers_prompts() -> None:
    """All states, those behind the end token as well, which the U-Net reads; clip_skip, which diffusers 0.42 reads through a
    ``text_model`` that transformers has no more, works where one is put there, and fails as before where not."""
    encoder = random(transformers.CLIPTextModel(text_config(end=2)))
    before, pipe = pipeline(copy.deepcopy(encoder)), pipeline(encoder)
    report = accelerate(encoder)
    assert {line.kind for line in report.accelerated} == {"CLIPEncoder", "CLIPEncoderLayer"}
    expected = prompts(before)
    close(prompts(pipe), expected)
    assert expected[:, :, 15:].abs().min() > 0
    for each in (pipe, before):
        with pytest.raises(AttributeError, match="text_model"):
            prompts(each, clip_skip=1)
        object.__setattr__(
            each.text_encoder, "text_model", SimpleNamespace(final_layer_norm=each.text_encoder.final_layer_norm)
        )
    close(prompts(pipe, clip_skip=1), prompts(before, clip_skip=1))


def test_diffusers_safety_checker_and_image_encoder() -> None:
    safety = pytest.importorskip("diffusers.pipelines.stable_diffusion.safety_checker")
    config = transformers.CLIPConfig(text_config=text_config(), vision_config=vision_config(), projection_dim=16)
    checker = random(safety.StableDiffusionSafetyChecker(config))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    cosines: list[Tensor] = []
    measure, safety.cosine_distance = safety.cosine_distance, lambda *a: cosines.append(measure(*a)) or cosines[-1]
    try:
        expected = checker(images, torch.ones(3, 3, 8, 8))[1]
        assert accelerate(checker)
        assert checker(images, torch.ones(3, 3, 8, 8))[1] == expected
    finally:
        safety.cosine_distance = measure
    close(torch.cat([c.flatten() for c in cosines[2:]]), torch.cat([c.flatten() for c in cosines[:2]]))

    encoder = random(transformers.CLIPVisionModelWithProjection(vision_config()))
    before = pipeline(random(transformers.CLIPTextModel(text_config())), copy.deepcopy(encoder))
    pipe = pipeline(before.text_encoder, encoder)
    assert accelerate(encoder)
    for states in (False, True):  # IP-Adapter, and IP-Adapter Plus, which reads the last states but one
        with torch.no_grad():
            got, expected = (torch.stack(p.encode_image(photos(), "cpu", 1, states)) for p in (pipe, before))
        close(got, expected)


def test_sentence_transformers(tmp_path) -> None:
    """A folder as clip-ViT-B-32 is: modules.json beside 0_CLIPModel."""
    package = pytest.importorskip("sentence_transformers")
    clip_model().save_pretrained(tmp_path / "0_CLIPModel")
    processor().save_pretrained(tmp_path / "0_CLIPModel")
    module = "sentence_transformers.models.CLIPModel"
    (tmp_path / "modules.json").write_text(f'[{{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "{module}"}}]')
    model = package.SentenceTransformer(str(tmp_path), device="cpu")
    expected = model.encode(WORDS, show_progress_bar=False), model.encode(photos(), show_progress_bar=False)
    report = accelerate(model)
    assert {"CLIPTextModel", "CLIPVisionModel"} <= {line.kind for line in report.accelerated}
    close(model.encode(WORDS, show_progress_bar=False), expected[0])
    close(model.encode(photos(), show_progress_bar=False), expected[1])


class Features(nn.Module):
    """What transformers before 5 had: features as tensors, for programs that were written for it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_text_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model.get_text_features(*args, **kwargs).pooler_output

    def get_image_features(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.model.get_image_features(*args, **kwargs).pooler_output

    encode_text, encode_image = get_text_features, get_image_features


def test_torchmetrics_clip_score() -> None:
    """torchmetrics 1.9 wants features as tensors: it fails on transformers 5 by itself, and runs on a model that gives them."""
    multimodal = pytest.importorskip("torchmetrics.multimodal")
    model, pixels = clip_model(), torch.stack([torch.as_tensor(np.array(p)).permute(2, 0, 1) for p in photos()])

    def score(of: Any) -> Tensor:
        metric = multimodal.CLIPScore(model_name_or_path=lambda: (of, processor()))
        metric.update(pixels, WORDS)
        return metric.compute()

    expected = score(Features(copy.deepcopy(model)))
    accelerate(model)
    close(score(Features(model)), expected)
    with pytest.raises(AttributeError, match="norm"):
        score(model)


def benchmarked(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """clip_benchmark's zero-shot classification and retrieval."""
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labelled: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(3)), 2)
    labelled.dataset.classes = WORDS
    classifier = classification.zero_shot_classifier(model, tokenizer, WORDS, ["a photo of {c}", "{c}"], "cpu", amp=False)
    found = classification.evaluate(model, labelled, tokenizer, WORDS, ["a photo of {c}", "{c}"], "cpu", amp=False)
    pairs = [(images, [[words, f"the {words}"] for words in WORDS])]
    return (
        found | retrieval.evaluate(model, pairs, tokenizer, "cpu", amp=False, recall_k_list=[1]) | dict(classifier=classifier)
    )


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # clip_benchmark's own
def test_clip_benchmark() -> None:
    text, model = tokenizer(), clip_model()

    def tokens(words: list[str]) -> Tensor:
        return text(words, padding="max_length", truncation=True, return_tensors="pt").input_ids

    expected = benchmarked(Features(copy.deepcopy(model)), tokens)
    accelerate(model)
    torch.manual_seed(0)
    ours = CLIP(16, 32, 2, 32, 8, 77, 49408, 32, 2, 2, vision_heads=2).eval()
    found = benchmarked(Features(model), tokens)
    close(found.pop("classifier"), expected.pop("classifier"))
    assert found.keys() == expected.keys()
    assert str(found) == str(expected)  # with acc5 NaN, of three classes
    classifier = benchmarked(ours, tokenize)["classifier"]  # the mean of the unit embeddings of both templates
    with torch.no_grad():
        classes = [ours.encode_text(tokenize([f"a photo of {w}", w]), normalize=True).mean(0) for w in WORDS]
    close(classifier, torch.stack([c / c.norm() for c in classes], 1))


def test_clip_retrievals_mapper(tmp_path, monkeypatch) -> None:
    """Its mapper takes ``encode_image`` and ``encode_text`` of what all_clip loads."""
    import packaging.version

    monkeypatch.setitem(sys.modules, "pkg_resources", SimpleNamespace(packaging=packaging))  # which clip-anytorch asks for
    all_clip = pytest.importorskip("all_clip")
    package = importlib.util.find_spec("clip_retrieval")
    if package is None or package.origin is None:
        pytest.skip("clip_retrieval is not installed")
    # By its file: the package's own import wants a web server and an index.
    spec: Any = importlib.util.spec_from_file_location("mapper", Path(package.origin).parent / "clip_inference" / "mapper.py")
    mapper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mapper)
    model, images = clip_model(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = tokenizer()(WORDS, padding="max_length", return_tensors="pt").input_ids
    item = dict(image_tensor=images, image_filename=["a", "b", "c"], text_tokens=ids, text=WORDS)

    def mapped(of: nn.Module) -> dict[str, Any]:
        monkeypatch.setattr(mapper, "load_clip", lambda **_: (of, None, None))
        return mapper.ClipMapper(True, True, False, False, "tiny", False, None)(item)

    expected = mapped(Features(copy.deepcopy(model)))
    accelerate(model)
    found = mapped(Features(model))
    for name in ("image_embs", "text_embs"):
        assert np.abs(found[name].astype(float) - expected[name].astype(float)).max() < 2e-3  # it rounds to fp16
    ours = CLIP(16, 32, 2, 32, 8, 20, END + 1, 32, 2, 2, vision_heads=2).eval()
    with torch.no_grad():
        features = ours.encode_text(ids, normalize=True)
    assert np.abs(mapped(ours)["text_embs"].astype(float) - features.double().numpy()).max() < 2e-3
    # all_clip's own loader of transformers' models gives what transformers 5 returns, which the mapper cannot divide.
    model.save_pretrained(tmp_path), processor().save_pretrained(tmp_path)
    wrapped = all_clip.main.load_hf_clip(str(tmp_path), False, "cpu", None)[0]
    assert accelerate(wrapped)
    close(wrapped.encode_text(ids).pooler_output.detach(), model.get_text_features(ids).pooler_output.detach())

"""The front door: OpenAI's names, and ours beside them."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch

import clipfast
import clipfast as clip
from tests.model.openai import openai as openai_model

PACKAGE = openai_model.__package__


@pytest.mark.parametrize("home", ["clip", "model", "simple_tokenizer"])
def test_every_name_of_openais_package(home: str) -> None:
    theirs, ours = importlib.import_module(f"{PACKAGE}.{home}"), importlib.import_module(f"clipfast.{home}")
    own = {name for name, value in vars(theirs).items() if getattr(value, "__module__", theirs.__name__) == theirs.__name__}
    missing = {name for name in own if not name.startswith("__") and not hasattr(ours, name)}
    imported = {
        "os",
        "gzip",
        "html",
        "re",
        "ftfy",
        "hashlib",
        "urllib",
        "warnings",
        "torch",
        "nn",
        "np",
        "F",
        "packaging",
        "Image",
    }
    assert missing - imported == set()
    assert getattr(clip, home) is ours


def test_names_beside_openais() -> None:
    assert all(hasattr(clipfast, name) for name in clipfast.__all__)
    assert {"accelerate", "restore", "convert", "get_tokenizer", "load", "export"} <= set(clipfast.__all__)
    assert clip.clip._MODELS.keys() == set(clip.available_models())
    assert clip.clip._tokenizer.encode("a dog") == [320, 1929]
    with pytest.raises(AttributeError, match="no attribute 'never'"):
        clip.never  # noqa: B018


def test_download_is_openais(tmp_path: Path) -> None:
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes
    (tmp_path / "x.pt").touch()
    assert clip.clip._download(f"http://localhost:1/{digest}/x.pt", str(tmp_path)) == str(tmp_path / "x.pt")


def test_tokenizers_of_checkpoints(tmp_path: Path) -> None:
    texts = ["a dog", "a cat " * 100]
    expected = clip.tokenize(texts, truncate=True)
    (tmp_path / "m.pt").touch()
    for name in ("ViT-B/32", tmp_path / "m.pt", tmp_path):
        assert clipfast.get_tokenizer(name)(texts).equal(expected)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {"context_length": 12}}}))
    assert clipfast.get_tokenizer(str(tmp_path))(texts).equal(clip.tokenize(texts, 12, truncate=True))
    with pytest.raises(RuntimeError, match="model 'ViT' not found: expected a file, a folder, hf-hub:"):
        clipfast.get_tokenizer("ViT")


def test_a_model_made_under_inference_mode() -> None:
    """Its tensors count no changes: the masks must be compared, or be plain tensors."""
    sizes = {"embed_dim": 32, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16}
    sizes |= {"context_length": 8, "vocab_size": 300, "transformer_width": 64, "transformer_heads": 1}
    text = torch.randint(1, 299, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made = clipfast.CLIP(**sizes, transformer_layers=2).eval()
        copied = copy.deepcopy(made)
        got, again = made.encode_text(text), copied.encode_text(text)
        whole = [block._mask.is_inference() for model in (made, copied) for block in model.transformer.resblocks]
        assert whole == [False, False, True, True]
        expected = clipfast.convert(made).encode_text(text)
        copied.transformer.resblocks[0].attn_mask.zero_()  # now every token sees every other
        changed = copied.encode_text(text)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(again, expected)
    assert (changed - expected).norm() > 1e-3 * expected.norm()

"""Zero-shot by likelihood against brute force: every image with every prompt, one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast.data.sources import Rows, Sample
from clipfast.evaluate import class_likelihoods, encode_texts, likelihood, zero_shot_source
from clipfast.inputs import tokenize
from clipfast.model import CLIP
from clipfast.train.config import arguments_for
from tests.evaluate.test_evaluate import PREPROCESS, SIZES
from tests.model.test_model import shake

NAMES = ["cat", "cat face", "dog dog", "a red heart", "cat"]
TEMPLATES = ["{}", "a drawing of {}"]


@pytest.fixture(params=["words", "caption"])
def model(request: pytest.FixtureRequest) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**arguments_for(request.param, SIZES | {"transformer_layers": 2})).eval()
    shake(model)
    return model


def brute_force(model: CLIP, image: Tensor, text: str) -> float:
    """image [D]"""
    state = image / image.norm() * len(image) ** 0.5
    ids = tokenize([text])[0]
    ids = ids[: int(ids.argmax()) + 1].long()
    if model.words is not None:
        own, best = model.words(state).log_softmax(0)[ids[1:-1]], torch.bincount(ids[1:-1]).double() / (len(ids) - 2)
        return (own.mean() - (best[best > 0] * best[best > 0].log()).sum()).item()
    x = model.embed_text(ids[None])
    x = torch.cat([x[:, :1] + model.prefix(state), x[:, 1:]], 1)
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)))[:, 0]
    return (x @ model.token_embedding.weight.T).log_softmax(1)[range(len(ids) - 1), ids[1:]].sum().item()


@torch.no_grad()
@pytest.mark.parametrize("states", [1 << 24, 1 << 10], ids=["at once", "in blocks"])
def test_scores_are_those_of_brute_force(model, monkeypatch, states):
    monkeypatch.setattr(likelihood, "STATES", states)
    features = torch.randn(3, SIZES["embed_dim"])
    got = class_likelihoods(model, features, NAMES, TEMPLATES)
    expected = [[sum(brute_force(model, image, t.format(name)) for t in TEMPLATES) / 2 for name in NAMES] for image in features]
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(class_likelihoods(model, 7 * features, NAMES, TEMPLATES), got)  # of any length


def test_a_source_is_classified_by_them(model):
    torch.manual_seed(1)
    images = (torch.rand(6, 40, 40, 3) * 255).byte().numpy()
    labels = [0, 1, 2, 3, 1, 0]
    source = Rows([Sample(str(n), image, None, {"class": labels[n]}) for n, image in enumerate(images)])
    found = zero_shot_source(model, PREPROCESS, source, {n: n for n in NAMES[:4]}, TEMPLATES)
    with torch.no_grad():
        features = torch.cat([model.encode_image(PREPROCESS(image)[None]) for image in images])
    scores = class_likelihoods(model, features, NAMES[:4], TEMPLATES)
    assert found["top1"] == pytest.approx((scores.argmax(1) == torch.tensor(labels)).double().mean().item())


def test_what_has_no_likelihood_is_told(model):
    with pytest.raises(ValueError, match="expected a contrastive model for text features, got one that predicts the"):
        encode_texts(model, ["a cat"])
    with pytest.raises(ValueError, match="expected a model that predicts words or a caption, got one for contrastive"):
        class_likelihoods(CLIP(**SIZES), torch.randn(1, 16), ["a"])
    if model.objective == "words":
        with pytest.raises(ValueError, match="expected a word in every prompt, got none in prompt 1"):
            class_likelihoods(model, torch.randn(1, 16), ["a", ""], "{}")

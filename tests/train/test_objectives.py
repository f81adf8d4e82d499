"""The objectives of the paper's figure 2 beside the contrastive one: a bag of words, and prediction of words or the caption."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.data import Batch
from clipfast.model import CLIP
from clipfast.train import train
from clipfast.train.config import arguments_for
from clipfast.train.engine import Engine, Objective, Towers, backward, split
from clipfast.train.job import ALONE
from clipfast.weights import LAYOUTS, export, load
from tests.train.test_train import SIZES, Interrupt, config, dense_loss, endless, log, pairs, stop_at

OTHERS = ("bag", "words", "caption")


def made(objective: str, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(**arguments_for(objective, SIZES))


def image_states(model: CLIP, batch: Batch) -> Tensor:
    image = model.encode_image(batch.pixels)
    return image / image.norm(dim=1, keepdim=True) * image.shape[1] ** 0.5


def words_of(batch: Batch, row: int) -> Tensor:
    return batch.tokens[row, 1 : int(batch.lengths[row]) - 1].long()


def bag_loss(model: CLIP, batch: Batch) -> Tensor:
    means = [model.token_embedding.weight[words_of(batch, i)].mean(0) for i in range(len(batch.tokens))]
    text = model.ln_final(torch.stack(means)) @ model.text_projection
    return dense_loss(model.encode_image(batch.pixels), text, model.logit_scale.exp(), None)


def words_loss(model: CLIP, batch: Batch) -> Tensor:
    """Row by row against the words' shares; a caption without words has nothing to predict."""
    logits, losses = model.words(image_states(model, batch)), []
    for row in range(len(batch.tokens)):
        if len(own := words_of(batch, row)):
            shares = torch.bincount(own, minlength=model.vocab_size).to(logits.dtype) / len(own)
            losses.append(F.cross_entropy(logits[row : row + 1], shares[None]))
    return torch.stack(losses).mean()


def caption_loss(model: CLIP, batch: Batch) -> Tensor:
    """One caption at a time through the plain blocks, in OpenAI's shapes."""
    first, losses = model.prefix(image_states(model, batch)), []
    for row, n in enumerate(batch.lengths.tolist()):
        x = (model.token_embedding(batch.tokens[row, :n].long()) + model.positional_embedding[:n])[:, None]
        x = torch.cat([x[:1] + first[row], x[1:]])
        for block in model.transformer.resblocks:
            y = block.ln_1(x)
            mask = torch.full((n, n), -math.inf, dtype=x.dtype).triu(1)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        logits = model.ln_final(x)[:, 0] @ model.token_embedding.weight.T
        losses.append(F.cross_entropy(logits[:-1], batch.tokens[row, 1:n].long(), reduction="none"))
    return torch.cat(losses).mean()


ORACLES = {"bag": bag_loss, "words": words_loss, "caption": caption_loss}


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("objective", OTHERS)
def test_the_gradient_is_that_of_a_plain_loop_however_the_batch_is_split(objective, parts):
    model, batch = made(objective).double(), pairs(0)
    if objective != "bag":  # the last row has no words
        batch.tokens[-1, 1:], batch.lengths[-1] = torch.tensor([63] + [0] * 10), 2
    truth = deepcopy(model)
    expected = ORACLES[objective](truth, batch._replace(pixels=batch.pixels.double()))
    expected.backward()
    Engine(config(Path("unused"), objective=objective), ALONE, model)  # which leaves out what the objective does not read
    loss = backward(Towers(model), Objective(model), split(batch._replace(pixels=batch.pixels.double()), parts))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert ours.requires_grad == (theirs.grad is not None), name
        if theirs.grad is not None:
            assert ours.grad is not None and theirs.grad.norm() > 0, name
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-13, rtol=1e-8, msg=lambda t, n=name: f"{n}: {t}")


def test_a_hooked_decoder_predicts_the_same():
    model, batch = made("caption"), pairs(1)
    expected = Towers(model)(*batch[:3]).item()
    seen: list[tuple] = []
    model.transformer.resblocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert Towers(model)(*batch[:3]).item() == pytest.approx(expected, rel=1e-5) and len(seen[0]) == 3


@pytest.mark.parametrize("objective", OTHERS)
def test_each_learns_resumes_bitwise_and_loads(tmp_path, objective):
    steps = {"objective": objective, "steps": 30, "lr": 3e-3, "ema": 0.5}
    straight = train(config(tmp_path / "straight", **steps), endless)
    losses = [line["loss"] for line in log(tmp_path / "straight")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0, losses
    part = config(tmp_path / "part", **steps, checkpoint_every=20, resume="auto")
    with pytest.raises(Interrupt):
        train(part, endless, on_step=stop_at(22))
    resumed = train(part, endless)
    for kind in ("model", "ema"):
        for name, value in getattr(resumed, kind).state_dict().items():
            assert torch.equal(value, getattr(straight, kind).state_dict()[name]), name
    again, _ = load(str(tmp_path / "part" / "model.pt"), "cpu")
    assert again.objective == objective
    for name, value in resumed.ema.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match=f"objective {objective} -> contrastive"):
        train(config(tmp_path / "part", **steps | {"objective": "contrastive"}, resume="auto"), endless)


@pytest.mark.parametrize("objective", OTHERS)
def test_other_libraries_have_no_such_model(tmp_path, objective):
    model = made(objective)
    for layout in LAYOUTS:
        if layout == "safetensors":
            again, _ = load(str(export(model, tmp_path / "model.safetensors")), "cpu")
            assert again.objective == objective
        else:
            with pytest.raises(ValueError, match="has no"):
                export(model, tmp_path / layout, layout)


def test_a_bag_knows_no_order_and_no_place():
    model = made("bag").eval()
    ids, lengths = torch.tensor([[61, 5, 9, 63, 0], [61, 9, 5, 63, 0], [61, 5, 63, 0, 0], [61, 63, 0, 0, 0]]), [4, 4, 3, 2]
    with torch.no_grad():
        features = model.encode_text(ids, lengths=lengths)
    torch.testing.assert_close(features[0], features[1])
    assert not torch.allclose(features[0], features[2]) and features.isfinite().all()
    assert not len(model.transformer.resblocks)
    with pytest.raises(ValueError, match="got a bag of words"):
        torch.jit.script(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "guess"}, "expected objective contrastive, bag, words or caption, got 'guess'"),
        ({"objective": "words", "loss": "siglip"}, "expected neither a contrastive loss nor lock_text for objective words"),
        ({"objective": "caption", "lock_text": True}, "objective caption, got loss clip, lock_text True"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_a_model_made_for_another_objective_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a model made for the objective contrastive, got one for words"):
        train(config(tmp_path), endless, made("words"))
    with pytest.raises(ValueError, match="expected a model made for the objective caption, got one for contrastive"):
        train(config(tmp_path, objective="caption"), endless, made("contrastive"))
    with pytest.raises(ValueError, match="expected text to be without bag beside predicts"):
        CLIP(**SIZES, text={"bag": True}, predicts="words")

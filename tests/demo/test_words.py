"""demo/words.py: a training of the embeddings that occur is one of the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clipfast
from clipfast.data import Batch
from clipfast.model.clip import _SIZES
from clipfast.train import TrainConfig, new_model, train
from demo.words import Vocabulary, narrow, widen

TEXTS = ["a red heart", "two clocks", "a drawing of a green fish", "the moon"]


def test_a_vocabulary_numbers_what_it_knows():
    words = Vocabulary(["a red heart", "two clocks"])
    tokens, lengths = words(["two red clocks", "a"], 8, return_lengths=True)
    full, expected = clipfast.tokenize(["two red clocks", "a"], 8, return_lengths=True)
    assert torch.equal(words.ids[tokens.long()], full.long()) and torch.equal(lengths, expected)
    assert torch.equal(tokens.argmax(1) + 1, lengths) and int(tokens.max()) == len(words) - 1
    with pytest.raises(ValueError, match="expected texts of the vocabulary's"):
        words(["a submarine"], 8)


def test_a_narrow_training_is_one_of_the_whole_table(tmp_path: Path):
    sizes = dict(zip(_SIZES, (16, 32, (1, 1, 1, 1), 8, None, 16, 49408, 64, 1, 1), strict=True))
    words = Vocabulary(TEXTS)
    tokens, lengths = clipfast.tokenize(TEXTS, 16, return_lengths=True)
    pixels = torch.rand(6, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def config(name: str) -> TrainConfig:
        run = {"lr": 0.01, "batch_size": 4, "steps": 6, "tensorboard": False, "progress": False}
        return TrainConfig(model=sizes, out=str(tmp_path / name), **run)

    whole = train(config("whole"), lambda step: (Batch(own, tokens, lengths) for own in pixels[step:])).model
    model, rates = new_model(config("narrow")), []
    table = narrow(model, words)
    assert model.token_embedding.weight.shape == (len(words), 64) and table.shape == (49408, 64)
    few = words.renumbered(tokens)
    train(config("narrow"), lambda step: (Batch(own, few, lengths) for own in pixels[step:]), model,
          lambda step, model, metrics: rates.append(metrics["lr"]))  # fmt: skip
    widen(model, words, table, torch.tensor([1 - 0.2 * rate for rate in rates]).double().prod().item())

    expected = whole.state_dict()
    assert model.state_dict().keys() == expected.keys() and model.vocab_size == 49408
    for name, tensor in model.state_dict().items():
        own = (tensor, expected[name])
        if name == "token_embedding.weight":
            torch.testing.assert_close(*own, rtol=1e-6, atol=0)  # of those without a gradient, the product is rounded once
            own = (tensor[words.ids], expected[name][words.ids])
        assert torch.equal(*own), name
    untouched = torch.ones(49408, dtype=torch.bool).index_fill_(0, words.ids, False)
    assert not torch.equal(model.token_embedding.weight[untouched], new_model(config("new")).token_embedding.weight[untouched])
    torch.testing.assert_close(
        model.encode_text(tokens, lengths=lengths), whole.encode_text(tokens, lengths=lengths), rtol=0, atol=0
    )

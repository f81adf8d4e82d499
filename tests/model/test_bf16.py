"""``for_inference(bf16=True)``: features beside those of fp32, memory, and where it is declined."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import processor
from clipfast.kernels.linear import onednn
from clipfast.model import products
from clipfast.model.products import Timed
from tests.model.test_int8 import batch, held, medium

FASTER, SLOWER = Timed(1.3, 1.0), Timed(1.1, 1.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A measurement that finds bf16 faster, for whatever width; which widths were asked for."""
    asked: list[int] = []
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "_inferring", lambda width, threads: asked.append(width) or FASTER)
    return asked


@pytest.mark.skipif(not processor.BF16, reason="this processor does not multiply bf16")
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_are_those_of_fp32_but_for_rounding(measured: list[int], quick_gelu: bool) -> None:
    model = medium(quick_gelu=quick_gelu)
    image, text = batch(model)
    low = model.for_inference(bf16=True)
    features = (low.encode_image(image), model.encode_image(image)), (low.encode_text(text), model.encode_text(text))
    for got, expected in features:
        cosine = F.cosine_similarity(got, expected)
        assert got.dtype == low.dtype == torch.float32 and cosine.min() > 0.9995 and cosine.max() < 1 - 1e-7
    assert torch.equal(low.encode_text(text), low.encode_text(text))
    assert low.encode_image(image[:0]).shape == (0, 128) and measured == [256]
    weights = [w for block in low.transformer.resblocks for w in (block.mlp.c_fc.weight, block.attn.out_proj.weight)]
    assert {w.dtype for w in weights} == {torch.bfloat16} and all(w.is_mkldnn for w in weights)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert held(low.visual.transformer) < 0.6 * held(model.visual.transformer)


def test_where_it_does_not_pay_a_warning_says_why(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = medium()
    _, text = batch(model)
    expected = model.encode_text(text)

    def declined(reason: str) -> None:
        with pytest.warns(UserWarning, match=f"weights are not in bf16: {reason}"):
            assert torch.equal(model.for_inference(bf16=True).encode_text(text), expected)

    if reason := onednn.lacks_packed(model.logit_scale):
        pytest.skip(reason)
    monkeypatch.setattr(processor, "BF16", "")
    declined("this processor .* has no instructions for products of bf16")
    monkeypatch.setattr(processor, "BF16", "avx512_bf16")
    monkeypatch.setattr(products, "_inferring", lambda width, threads: SLOWER)
    declined("an MLP of the model takes 1100.0 ms in fp32, 1000.0 ms in bf16")
    monkeypatch.setattr(products, "LEAST", 1 << 20)
    declined("its blocks are narrower than 512 channels, got 256")
    with pytest.raises(ValueError, match="expected one of packed, int8 and bf16, got several"):
        model.for_inference(packed=True, bf16=True)

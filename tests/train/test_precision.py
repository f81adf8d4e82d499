"""What a run computes in on a CPU: the products of bf16, and who chooses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import processor
from clipfast.model import products
from clipfast.model.products import Timed, timed
from clipfast.train import precision, train
from clipfast.train.job import ALONE
from tests.train.test_train import SIZES, config, endless, log, pairs, tiny

WIDE = SIZES | {"vision_width": 512, "vision_layers": 1, "transformer_layers": 1}  # wide enough to be measured
SLOWER, FASTER = Timed(1.0, 0.9), Timed(1.3, 1.0)


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Callable[[Timed | None], list[tuple[int, int]]]:
    """Puts a measurement in the place of the clock's, or (None) forbids any; gives what is asked for."""
    monkeypatch.setattr(processor, "BF16", processor.BF16 or "avx512_bf16")

    def put(found: Timed | None) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []

        def stand_in(width: int, rows: int, training: bool) -> Timed:
            assert found is not None and training
            asked.append((width, rows))
            return found

        monkeypatch.setattr(precision, "timed", stand_in)
        return asked

    return put


def losses(out: Path, **options) -> list[float]:
    train(config(out, **({"steps": 4, "model": WIDE} | options)), endless)
    return [line["loss"] for line in log(out)]


def settings(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(("found", "taken"), [(FASTER, "bf16"), (SLOWER, "fp32")])
def test_auto_takes_what_was_measured(tmp_path, measures, capsys, found: Timed, taken: str) -> None:
    asked = measures(found)
    got = losses(tmp_path / "auto", micro_batch=4, progress=True)
    told = f"{taken}: an MLP of the model takes {1e3 * found.fp32:.1f} ms in fp32, {1e3 * found.bf16:.1f} ms in bf16"
    assert asked == [(512, 4 * precision.CAPTION)] and f"precision {told}\n" in capsys.readouterr().err
    written = settings(tmp_path / "auto")
    assert (written["precision"], written["computes_in"], written["because"]) == ("auto", taken, told)
    measures(None)
    assert got == losses(tmp_path / "given", micro_batch=4, precision=taken)
    assert settings(tmp_path / "given")["computes_in"] == taken and "because" not in settings(tmp_path / "given")


def test_a_run_goes_on_as_it_began(tmp_path, measures, monkeypatch, capsys) -> None:
    """Whatever a measurement would say now, and on a machine that has no instructions for it."""
    measures(FASTER)
    whole, checkpoint = losses(tmp_path / "whole", checkpoint_every=2), tmp_path / "whole" / "checkpoints" / "step_00000002"
    measures(None)
    assert losses(tmp_path / "parts", resume=str(checkpoint)) == whole[2:]
    same = [torch.load(tmp_path / name / "model.pt", weights_only=False)["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(same[1][name], tensor) for name, tensor in same[0].items())
    assert "precision" not in capsys.readouterr().err
    monkeypatch.setattr(processor, "BF16", "")
    assert losses(tmp_path / "without", resume=str(checkpoint), progress=True) == pytest.approx(whole[2:], rel=0.02)
    assert settings(tmp_path / "without")["computes_in"] == "bf16"
    assert "precision bf16, as the run began, though this processor has no instructions for it" in capsys.readouterr().err


def test_a_run_from_elsewhere_chooses_anew_and_says_so(measures) -> None:
    given = config(Path("unused"))
    measures(SLOWER)
    begun = precision.Begun("bf16", "cuda")
    assert precision.chosen(given, tiny(), 1, ALONE, begun) == ("fp32", "fp32, after bf16 on a cuda")
    assert precision.chosen(given, tiny(), 1, ALONE, precision.Begun("fp32", "cuda")) == ("fp32", "")
    assert precision.chosen(given, tiny(), 1, ALONE, None) == ("fp32", "")
    assert precision.chosen(config(Path("unused"), precision="bf16"), tiny(WIDE), 1, ALONE, begun) == ("bf16", "")


def test_nothing_is_measured_where_there_is_no_choice(tmp_path, measures, monkeypatch) -> None:
    """Small models, so that a run repeats bit for bit; a bag of words beside a ResNet; a processor without bf16."""
    measures(None)
    expected = losses(tmp_path / "small", model=SIZES)
    assert products.lacks(None) == "the model has no transformer of ours"
    monkeypatch.setattr(processor, "BF16", "")
    wide = losses(tmp_path / "wide")
    for name, model, same in (("small", SIZES, expected), ("wide", WIDE, wide)):
        assert losses(tmp_path / f"{name} in fp32", model=model, precision="fp32") == same
        assert settings(tmp_path / name)["computes_in"] == "fp32"


def test_the_loss_falls_as_in_fp32(tmp_path) -> None:
    exact, half = (losses(tmp_path / p, model=SIZES, steps=200, precision=p) for p in ("fp32", "bf16"))
    means, others = (torch.tensor(curve).view(-1, 20).mean(1) for curve in (exact, half))
    assert exact != half and (means - others).abs().max() < 0.03 and others[-1] < others[0] - 0.5


def test_products_are_lowered_in_blocks_that_nobody_looks_into() -> None:
    batch, model = pairs(0), tiny()
    with torch.no_grad():
        exact = model.encode_text(batch.tokens)
        with precision.products_in(torch.bfloat16, model):
            low = model.encode_text(batch.tokens)
            hook = model.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: None)
            mixed = model.encode_text(batch.tokens)
            hook.remove()
        assert torch.equal(model.encode_text(batch.tokens), exact)
    assert low.dtype == torch.float32 and not torch.equal(low, exact) and not torch.equal(low, mixed)
    for features in (low, mixed):
        assert F.cosine_similarity(features, exact).min() > 0.9995


def test_a_measurement_is_of_medians_in_turn() -> None:
    """By a clock that makes fp32 twice as slow but for one outlier."""
    now, calls = [0.0], [0]

    def clock() -> float:
        calls[0] += 1
        turn, which = divmod((calls[0] - 1) // 2, 2)
        if calls[0] % 2 == 0:
            now[0] += 50.0 if (turn, which) == (2, 1) else 2.0 - which
        return now[0]

    assert timed(8, 4, True, clock) == (2.0, 1.0)
    assert Timed(1.2, 1.0).pays and not Timed(1.19, 1.0).pays

"""The contrastive loss: open_clip and dense float64 as oracles, labels, memory, the edges of the numbers, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from torch import Tensor

from clipfast import kernels
from clipfast.kernels import dispatch
from clipfast.kernels.contrastive import spec
from clipfast.loss import ClipLoss, clip_loss

LABELS = {
    "pairs of duplicates": [0, 1, 2, 0, 3, 4, 2, 5, 9, -7, 5],
    "all equal": [3] * 11,
    "one group": [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
}


def features(N: int, D: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = F.normalize(torch.randn(2, N, D, generator=generator, dtype=torch.float64), dim=-1)
    return image.to(dtype), F.normalize(text + 0.5 * image, dim=-1).to(dtype)


def gradients(function, *given: Tensor, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its gradients in all tensors of ``given``."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    loss = function(*leaves, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def dense(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None = None) -> Tensor:
    """The loss by its definition: cross-entropy with the target mass of each row shared by its positives."""
    s = scale * image @ text.T
    labels = torch.arange(len(s)) if labels is None else labels
    target = (labels[:, None] == labels).to(s.dtype)
    target = target / target.sum(1, keepdim=True)
    return -(target * (s.log_softmax(1) + s.log_softmax(0))).sum() / (2 * len(s))


def tensor(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("N", [1, 2, 61, 257])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0])
def test_equals_open_clip(N: int, dtype: torch.dtype, tolerance: float, scale: float) -> None:
    given = (*features(N, dtype=dtype), tensor(scale, dtype))
    loss, grads = gradients(ClipLoss(), *given)
    expected, expected_grads = gradients(OpenClipLoss(), *given)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * max(scale, 1) / N)


def test_module_takes_what_open_clip_takes() -> None:
    image, text = features(5)
    module = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    plain = clip_loss(image, text, tensor(10.0))
    assert module(image, text, tensor(10.0).reshape(1), logit_bias=tensor(-3.0), output_dict=True) == {
        "contrastive_loss": plain
    }
    with pytest.raises(ValueError, match="expected one process .*, got rank 1, world_size 4"):
        ClipLoss(rank=1, world_size=4)


def test_normalize() -> None:
    image, text = features(7)
    loss = clip_loss(3 * image, text * torch.arange(1, 8)[:, None], tensor(10.0), normalize=True)
    torch.testing.assert_close(loss, clip_loss(image, text, tensor(10.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_labels_equal_the_dense_definition(labels: list[int]) -> None:
    given, labels = (*features(11, dtype=torch.float64), tensor(20.0, torch.float64)), torch.tensor(labels)
    loss, grads = gradients(clip_loss, *given, labels=labels)
    expected, expected_grads = gradients(dense, *given, labels=labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    assert (loss - dense(*given)).abs() > 1e-3  # the labels did count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distinct_labels_change_no_bit(dtype: torch.dtype) -> None:
    given = (*features(101, dtype=dtype), tensor(30.0))
    labels = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:101].int()
    loss, grads = gradients(clip_loss, *given, labels=labels)
    expected, expected_grads = gradients(clip_loss, *given)
    assert torch.equal(loss, expected) and all(map(torch.equal, grads, expected_grads))


def test_gradcheck() -> None:
    image, text = (x.requires_grad_() for x in features(5, 3, torch.float64))
    scale = tensor(7.0, torch.float64).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(clip_loss, (image, text, scale))
    assert torch.autograd.gradcheck(lambda *leaves: clip_loss(*leaves, labels=labels), (image, text, scale))
    assert torch.autograd.gradcheck(
        lambda i, t, s: kernels.contrastive(i, t, s, 2), (image[1:3].detach().requires_grad_(), text, scale)
    )


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1, 4, 5])])
def test_compiles_whole(labels: Tensor | None) -> None:
    given = (*features(7), tensor(14.0))
    compiled = torch.compile(clip_loss, fullgraph=True, backend="aot_eager")
    loss, grads = gradients(compiled, *given, labels=labels)
    expected, expected_grads = gradients(clip_loss, *given, labels=labels)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_only_the_gradients_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    backward = spec.backward
    monkeypatch.setattr(spec, "backward", lambda *args: asked.append(args[-2:]) or backward(*args))
    (image, text), scale = features(6), tensor(5.0)
    with dispatch.use("torch"):
        every = gradients(clip_loss, image, text, scale)[1]
        for only, wanted in ((0, (True, False)), (1, (False, True)), (2, (True, False))):
            leaves = [x.clone().requires_grad_(k == only) for k, x in enumerate((image, text, scale))]
            clip_loss(*leaves).backward()
            torch.testing.assert_close(leaves[only].grad, every[only])
            assert asked[-1] == wanted and all((x.grad is None) == (k != only) for k, x in enumerate(leaves))
        asked.clear()
        with torch.no_grad():
            assert not clip_loss(image, text, scale.requires_grad_()).requires_grad
    assert not asked


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upstream", ["mean", "either sign"])
def test_gradient_of_the_scale(backend: str, dtype: torch.dtype, upstream: str) -> None:
    """Against the size of its terms: it is one number, Σ G_ij·⟨image_i, text_j⟩, in which nearly everything may cancel."""
    image, text = features(67, dtype=dtype)
    if reason := _reason(backend, image, text):
        pytest.skip(reason)
    weights = (
        torch.full((2, 67), 1 / 134) if upstream == "mean" else torch.randn(2, 67, generator=torch.Generator().manual_seed(3))
    )
    scale = tensor(20.0).requires_grad_()
    with dispatch.use(backend):
        row, col = kernels.contrastive(image, text, scale)
        (got,) = torch.autograd.grad(weights[0] @ row + weights[1] @ col, scale)
    dots = image.double() @ text.double().T
    terms = [
        w[:, None].double() * ((20 * d).softmax(1) - torch.eye(67)) * d for w, d in zip(weights, (dots, dots.T), strict=True)
    ]
    unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}[dtype]
    assert (got.double() - sum(t.sum() for t in terms)).abs() < unit * sum(t.abs().sum() for t in terms)


def _reason(backend: str, image: Tensor, text: Tensor) -> str | None:
    found = kernels.OPS["contrastive"].backend(backend)
    return found if isinstance(found, str) else found.supports(image, text)


def test_never_a_matrix_of_logits_in_memory() -> None:
    """Forward and backward at N = 16,384: N² would take 1 GiB; one block of rows and a few copies of the features suffice."""
    N, D = 16384, 64
    given = (*features(N, D), tensor(14.3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradients(clip_loss, *given, labels=torch.arange(N) // 2)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    block = spec.BLOCK * N * 4
    assert max(sizes) == block  # the block was seen, so the record is not empty
    assert peak < block + 16 * N * D * 4 < N * N * 4 / 7


@pytest.mark.parametrize("N", [64, 1100])
def test_statistics_against_float64(N: int) -> None:
    image, text = features(N)
    row_max, row_sum, col_max, col_sum, diagonal = torch.ops.clipfast.contrastive(image, text, tensor(100.0), 0)
    s = 100 * image.double() @ text.double().T
    got = row_max + row_sum.log(), col_max + col_sum.log(), diagonal
    for mine, truth in zip(got, (s.logsumexp(1), s.logsumexp(0), s.diagonal()), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=0)


def test_small_losses_keep_their_digits() -> None:
    """Where a log-sum-exp of 100 in fp32 is rounded to 4e-6, a loss of 1e-5 is right to 3e-7."""
    N, D = 48, 64
    image = F.normalize(torch.eye(N, D) + 0.055 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)
    text = F.normalize(image + 0.4 * image.roll(1, 0) + 0.35 * image.roll(2, 0), dim=1)
    row, col = kernels.contrastive(image, text, 25.0)
    s = 25 * image.double() @ text.double().T
    others = (s - s.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1), (s - s.diagonal()).exp().fill_diagonal_(0).sum(0)
    for got, other in zip((row, col), others, strict=True):
        assert 1e-8 < other.min() < 1e-5
        torch.testing.assert_close(got.double(), other.log1p(), rtol=5e-6, atol=3e-7)


@pytest.mark.parametrize("N", [6, 1030])
def test_rows_and_columns_far_apart(N: int) -> None:
    """Columns whose every logit is 200 below the rows' maxima: what one exponential for both would lose to underflow."""
    image, text = features(N, 16)
    axis = F.one_hot(torch.tensor(0), 16).float()
    image, text = F.normalize(axis + 0.05 * image, dim=1), F.normalize(axis + 0.05 * text, dim=1)
    text[::2] *= -1
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).double() / N

    def loss(contrastive, *leaves: Tensor) -> Tensor:
        row, col = contrastive(*leaves)
        return weights[0] @ row.double() + weights[1] @ col.double()

    for a, b in ((image, text), (text, image)):
        got, grads = gradients(lambda *leaves: loss(kernels.contrastive, *leaves), a, b, tensor(100.0))
        truth, true_grads = gradients(
            lambda *leaves: loss(spec.reference, *leaves), a.double(), b.double(), tensor(100.0).double()
        )
        assert (got - truth).abs() < 1e-5 * truth.abs().clamp_min(1)
        for mine, true in zip(grads[:2], true_grads[:2], strict=True):
            assert (mine - true).norm() < 1e-4 * true.norm()


def test_lower_error_than_autocast_in_bfloat16() -> None:
    given = (*features(200, dtype=torch.bfloat16), tensor(100.0, torch.bfloat16))
    truth, true_grads = gradients(dense, *(x.double() for x in given))
    ours, grads = gradients(clip_loss, *given)
    theirs, their_grads = gradients(OpenClipLoss(), *given)
    assert (ours - truth).abs() < (theirs - truth).abs() / 10
    for mine, other, true in zip(grads[:2], their_grads, true_grads, strict=False):
        assert (mine - true).norm() < (other - true).norm()


def test_one_nan_row_makes_the_loss_nan() -> None:
    image, text = features(9)
    image[4] = torch.nan
    loss, grads = gradients(clip_loss, image, text, tensor(14.0))
    assert loss.isnan() and all(g.isnan().any() for g in grads)


def test_scale_zero_and_one_pair() -> None:
    image, text = features(9)
    assert clip_loss(image, text, tensor(0.0)).item() == pytest.approx(math.log(9), rel=1e-6)
    loss, grads = gradients(clip_loss, image[:1], text[:1], tensor(100.0))
    assert loss == 0 and not any(g.any() for g in grads)


def _bad() -> dict[str, tuple[type[Exception], str, dict]]:
    image, text = features(4)
    scale = tensor(1.0)
    arguments = dict(image_features=image, text_features=text, logit_scale=scale)
    bad = {
        "rows": (ValueError, r"as many texts as images.*\(4, 64\) and \(3, 64\)", dict(text_features=text[:3])),
        "no rows": (ValueError, "at least one", dict(image_features=image[:0], text_features=text[:0])),
        "widths": (ValueError, r"one width D, got \(4, 64\) and \(4, 60\)", dict(text_features=text[:, :60])),
        "3-D": (ValueError, r"expected features \[n, D\]", dict(image_features=image[None], text_features=text[None])),
        "integers": (TypeError, "floating features, got torch.int32", dict(image_features=image.int(), text_features=text.int())),  # noqa: E501
        "mixed": (TypeError, "one dtype, got torch.float32 and torch.float64.*to", dict(text_features=text.double())),
        "scale vector": (ValueError, r"scalar scale of shape \(\), got \(4,\)", dict(logit_scale=torch.ones(4))),
        "scale integer": (TypeError, "floating tensor as scale, got torch.int64", dict(logit_scale=torch.tensor(3))),
        "scale text": (TypeError, "floating tensor as scale, got str", dict(logit_scale="3")),
        "devices": (ValueError, "one device, got cpu, meta", dict(text_features=text.to("meta"))),
        "labels length": (ValueError, r"one label per row, \(4,\), got \(3,\)", dict(labels=torch.arange(3))),
        "labels dtype": (TypeError, "integer labels, got torch.float32", dict(labels=torch.ones(4))),
        "labels device": (ValueError, "labels on cpu, got meta", dict(labels=torch.arange(4, device="meta"))),
    }  # fmt: skip
    return {name: (error, message, arguments | change) for name, (error, message, change) in bad.items()}


@pytest.mark.parametrize("name", _bad())
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message, arguments = _bad()[name]
    monkeypatch.setattr(spec, "forward", lambda *args: pytest.fail("a kernel started"))
    with dispatch.use("torch"), pytest.raises(error, match=message):
        clip_loss(**arguments)

"""The contrastive losses: open_clip and dense float64 as oracles, labels, memory, the edges of the numbers, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import peak_memory
from bench.rivals import imported
from clipfast import kernels
from clipfast.kernels import dispatch
from clipfast.kernels.contrastive import spec
from clipfast.kernels.pairwise_sigmoid import spec as sigmoid_spec
from clipfast.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss

open_clip: Any = imported("open_clip.loss")
needs_open_clip = pytest.mark.skipif(isinstance(open_clip, str), reason=str(open_clip))
GPU = torch.cuda.is_available()

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


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None = None) -> Tensor:
    s = scale * image @ text.T + bias
    labels = torch.arange(len(s)) if labels is None else labels
    return -F.logsigmoid(torch.where(labels[:, None] == labels, s, -s)).sum() / len(s)


def tensor(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


# Ours, its definition, our module, open_clip's, and the scalars behind the scale.
LOSSES = {
    "clip": (clip_loss, dense, ClipLoss, getattr(open_clip, "ClipLoss", None), ()),
    "siglip": (siglip_loss, dense_sigmoid, SigLipLoss, getattr(open_clip, "SigLipLoss", None), (-3.0,)),
}
both = pytest.mark.parametrize("name", LOSSES)


def arguments(name: str, N: int, scale: float, dtype: torch.dtype = torch.float32, D: int = 64) -> tuple[Tensor, ...]:
    """Features, scale and, for SigLIP, bias."""
    return (*features(N, D, dtype), *(tensor(x, dtype) for x in (scale, *LOSSES[name][-1])))


@both
@pytest.mark.parametrize("N", [1, 2, 61, 257])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scale", [0.0, 14.3, 100.0])
@needs_open_clip
def test_equals_open_clip(name: str, N: int, dtype: torch.dtype, tolerance: float, scale: float) -> None:
    given, modules = arguments(name, N, scale, dtype), LOSSES[name][2:4]
    (loss, grads), (expected, expected_grads) = (gradients(module(), *given) for module in modules)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * max(scale, 1) / N)


def test_modules_take_what_open_clip_takes() -> None:
    (image, text), scale, bias = features(5), tensor(10.0), tensor(-3.0)
    module = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    plain = clip_loss(image, text, scale)
    assert module(image, text, scale.reshape(1), logit_bias=bias, output_dict=True) == {"contrastive_loss": plain}
    sigmoid = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather")
    plain = siglip_loss(image, text, scale, bias)
    assert sigmoid(image, text, scale, logit_bias=bias.reshape(1), output_dict=True) == {"contrastive_loss": plain}
    assert sigmoid(image, text, scale) == siglip_loss(image, text, scale, 0.0)
    with pytest.raises(ValueError, match="expected torch.distributed initialised for world_size 4"):
        ClipLoss(rank=1, world_size=4)(image, text, scale)
    with pytest.raises(ValueError, match="expected use_horovod False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="expected dist_impl bidir, .* got 'ring'"):
        SigLipLoss(dist_impl="ring")


class Margin:
    """A method that people override: the pair's own logit is lowered."""

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        per_image, per_text = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        return per_image - 2 * torch.eye(*per_image.shape), per_text - 2 * torch.eye(*per_text.shape)


class Smoothed:
    def get_ground_truth(self, device, num_logits):
        return F.one_hot(super().get_ground_truth(device, num_logits)) * 0.9 + 0.1 / num_logits


class Distilled:
    """A forward of its own, which calls both methods."""

    def forward(self, image, text, scale, output_dict=False):
        logits, teacher = self.get_logits(image, text, scale), self.get_logits(image.detach().flip(1), text.detach(), 3.0)
        labels, both = self.get_ground_truth(image.device, len(image)), zip(logits, teacher, strict=True)
        return sum(F.cross_entropy(s, labels) - (t.softmax(1) * s.log_softmax(1)).sum() for s, t in both)


class Weighted:
    """A forward around the class's: no matrix."""

    def forward(self, *args, **options):
        return 3 * super().forward(*args, **options)


class Shifted:
    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        return super().get_logits(image_features, text_features, logit_scale, logit_bias) + 0.5


class OnlyNegatives:
    def get_ground_truth(self, device, dtype, num_logits, negative_only=False):
        return super().get_ground_truth(device, dtype, num_logits, negative_only=True)


class Halved:
    def _loss(self, *args, **options):
        return super()._loss(*args, **options) / 2


def subclass(mixin: type, base: type, **options: Any) -> Any:
    return type(mixin.__name__, (mixin, base), {})(**options)


@pytest.mark.parametrize(
    ("name", "mixin"),
    [("clip", m) for m in (Margin, Smoothed, Distilled, Weighted)]
    + [("siglip", m) for m in (Shifted, OnlyNegatives, Halved, Weighted)],
)
@needs_open_clip
def test_subclasses_are_open_clips(name: str, mixin: type, recwarn: pytest.WarningsRecorder) -> None:
    """Told once, and only where the matrix is made."""
    given, (ours, theirs) = arguments(name, 7, 10.0), (subclass(mixin, base) for base in LOSSES[name][2:4])
    for _ in range(2):
        loss, grads = gradients(ours, *given)
    expected, expected_grads = gradients(theirs, *given)
    exactly = dict(rtol=1e-5, atol=1e-6) if mixin is Weighted else dict(rtol=0, atol=0)
    for got, wanted in zip((loss, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(got, wanted, **exactly)
    told = [w for w in recwarn if "makes the matrix of all logits" in str(w.message)]
    assert len(told) == (mixin is not Weighted)
    assert all(mixin.__name__ in str(w.message) and "Loss itself makes none" in str(w.message) for w in told)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_of_a_subclass_sum_to_the_whole(chunk: int) -> None:
    given = arguments("siglip", 7, 10.0)
    with pytest.warns(UserWarning, match="Shifted makes the matrix"):
        found = [gradients(subclass(Shifted, SigLipLoss, chunk_size=size), *given) for size in (0, chunk)]
    for whole, parts in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(SigLipLoss(chunk_size=chunk)(*given), siglip_loss(*given), rtol=0, atol=0)


@needs_open_clip
def test_modules_keep_open_clips_attributes() -> None:
    for name, options in (
        ("clip", dict(local_loss=True, gather_with_grad=True, cache_labels=True)),
        ("siglip", dict(cache_labels=True, dist_impl="shift")),
        ("siglip", {}),
    ):
        ours, theirs = (vars(base(**options)) for base in LOSSES[name][2:4])
        assert theirs.items() <= ours.items()
    module, device = ClipLoss(cache_labels=True), torch.device("cpu")
    labels = module.get_ground_truth(device, 5)
    assert module.get_ground_truth(device, 5) is labels is module.labels[device] and module.prev_num_logits == 5
    assert module.get_ground_truth(device, 4).tolist() == [0, 1, 2, 3]
    module.get_logits = lambda *args, **options: (torch.zeros(3, 3), torch.zeros(3, 3))  # on the module itself, too
    with pytest.warns(UserWarning, match="ClipLoss makes the matrix"):
        assert module(*arguments("clip", 3, 5.0)).item() == pytest.approx(math.log(3))


def test_a_bias_has_a_gradient_of_zero_and_must_be_one_number() -> None:
    """Of a vector, which does not cancel, nothing would be left; and DDP waits for every parameter's gradient."""
    bias = torch.tensor([-3.0], requires_grad=True)
    given = arguments("clip", 5, 10.0)
    loss = ClipLoss()(*given, bias)
    loss.backward()
    assert bias.grad.tolist() == [0.0] and torch.equal(loss, clip_loss(*given))
    with pytest.raises(ValueError, match=r"ClipLoss: expected a scalar logit_bias of shape \(\), got \(5,\)"):
        ClipLoss()(*given, torch.ones(5))
    with pytest.raises(ValueError, match="expected chunk_size of 0 .*, got -1"):
        SigLipLoss(chunk_size=-1)


@both
def test_normalize(name: str) -> None:
    image, text, *scalars = arguments(name, 7, 10.0)
    loss = LOSSES[name][0](3 * image, text * torch.arange(1, 8)[:, None], *scalars, normalize=True)
    torch.testing.assert_close(loss, LOSSES[name][0](image, text, *scalars), rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_labels_equal_the_dense_definition(name: str, labels: list[int]) -> None:
    (ours, definition, *_), given = LOSSES[name], arguments(name, 11, 20.0, torch.float64)
    loss, grads = gradients(ours, *given, labels=torch.tensor(labels))
    expected, expected_grads = gradients(definition, *given, labels=torch.tensor(labels))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    assert (loss - definition(*given)).abs() > 1e-3  # the labels did count


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distinct_labels_change_no_bit(name: str, dtype: torch.dtype) -> None:
    given = arguments(name, 101, 30.0, dtype)
    labels = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:101].int()
    loss, grads = gradients(LOSSES[name][0], *given, labels=labels)
    expected, expected_grads = gradients(LOSSES[name][0], *given)
    assert torch.equal(loss, expected) and all(map(torch.equal, grads, expected_grads))


@both
def test_gradcheck(name: str) -> None:
    given = [x.requires_grad_() for x in arguments(name, 5, 7.0, torch.float64, D=3)]
    labels = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(LOSSES[name][0], given)
    assert torch.autograd.gradcheck(lambda *leaves: LOSSES[name][0](*leaves, labels=labels), given)
    op = kernels.contrastive if name == "clip" else kernels.pairwise_sigmoid
    rows = given[0][1:3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: op(*leaves, 2), (rows, *given[1:]))


@both
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1, 4, 5])])
def test_compiles_whole(name: str, labels: Tensor | None) -> None:
    ours, given = LOSSES[name][0], arguments(name, 7, 14.0)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    loss, grads = gradients(compiled, *given, labels=labels, normalize=True)
    expected, expected_grads = gradients(ours, *given, labels=labels, normalize=True)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted)


@both
def test_only_the_gradients_asked_for_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    home, part = (spec, "backward") if name == "clip" else (sigmoid_spec, "forward")
    real = getattr(home, part)
    monkeypatch.setattr(home, part, lambda *args: asked.append(args[-2:]) or real(*args))
    ours, given = LOSSES[name][0], arguments(name, 6, 5.0)
    with dispatch.use("torch"):
        every = gradients(ours, *given)[1]
        for only, wanted in enumerate([(True, False), (False, True), (True, False), (False, False)][: len(given)]):
            leaves = [x.clone().requires_grad_(k == only) for k, x in enumerate(given)]
            ours(*leaves).backward()
            torch.testing.assert_close(leaves[only].grad, every[only])
            assert asked[-1] == wanted and all((x.grad is None) == (k != only) for k, x in enumerate(leaves))
        asked.clear()
        with torch.no_grad():
            assert not ours(*(x.requires_grad_() for x in given)).requires_grad
    assert asked == ([] if name == "clip" else [(False, False)])


@both
def test_autocast_changes_no_bit(name: str) -> None:
    """Eager would round fp32 features to 16 bit."""
    given = arguments(name, 40, 100.0)
    loss, grads = gradients(LOSSES[name][0], *given)
    with torch.autocast("cpu", torch.bfloat16):
        again, again_grads = gradients(LOSSES[name][0], *given)
    assert torch.equal(loss, again) and all(map(torch.equal, grads, again_grads))


@pytest.fixture(params=["torch", "triton", "cpu", *(["cuda"] if GPU else [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend, forced; ``there`` brings its tensors to where it runs."""
    for op in ("contrastive", "pairwise_sigmoid"):
        if isinstance(found := kernels.OPS[op].backend(request.param), str):
            pytest.skip(found)
    with dispatch.use(request.param):
        yield request.param


def there(backend: str, *given: Any) -> list[Any]:
    """Tensors on the GPU, if this is where the backend runs."""
    return [x.cuda() if GPU and backend in ("cuda", "triton") and isinstance(x, Tensor) else x for x in given]


def skip_unless_supported(op: str, backend: str, *args: Any) -> None:
    if reason := kernels.OPS[op].backend(backend).supports(*there(backend, *args)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("upstream", ["mean", "either sign"])
def test_gradient_of_the_scale(backend: str, dtype: torch.dtype, upstream: str) -> None:
    """Against the size of its terms: it is one number, Σ G_ij·⟨image_i, text_j⟩, in which nearly everything may cancel."""
    image, text = features(67, dtype=dtype)
    weights = (
        torch.full((2, 67), 1 / 134) if upstream == "mean" else torch.randn(2, 67, generator=torch.Generator().manual_seed(3))
    )
    scale = tensor(20.0).requires_grad_()
    skip_unless_supported("contrastive", backend, image, text, scale, 0)
    row, col = (x.cpu() for x in kernels.contrastive(*there(backend, image, text, scale)))
    (got,) = torch.autograd.grad(weights[0] @ row + weights[1] @ col, scale)
    dots = image.double() @ text.double().T
    terms = [
        w[:, None].double() * ((20 * d).softmax(1) - torch.eye(67)) * d for w, d in zip(weights, (dots, dots.T), strict=True)
    ]
    unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}[dtype]
    assert (got.double() - sum(t.sum() for t in terms)).abs() < unit * sum(t.abs().sum() for t in terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_scale_and_bias(backend: str, dtype: torch.dtype) -> None:
    """The same for the sigmoid loss, whose bias has a gradient as well: Σ g_ij."""
    image, text = features(67, dtype=dtype)
    scale, bias = tensor(20.0).requires_grad_(), tensor(-4.0).requires_grad_()
    skip_unless_supported("pairwise_sigmoid", backend, image, text, scale, bias, 0, True, True)
    got = torch.autograd.grad(kernels.pairwise_sigmoid(*there(backend, image, text, scale, bias)), (scale, bias))
    dots = image.double() @ text.double().T
    g = (20 * dots - 4).sigmoid() - torch.eye(67)
    unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}[dtype]
    for mine, terms in zip(got, (g * dots, g), strict=True):
        assert (mine.double() - terms.sum()).abs() < unit * terms.abs().sum()


@both
def test_never_a_matrix_of_logits_in_memory(name: str) -> None:
    """Forward and backward at N = 16,384: N² would take 1 GiB; one block of rows and a few copies of the features suffice."""
    N, D = 16384, 64
    given = arguments(name, N, 14.3, D=D)
    with (
        dispatch.use("torch"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        gradients(LOSSES[name][0], *given, labels=torch.arange(N) // 2)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    block = spec.BLOCK * N * 4
    assert max(sizes) == block  # the block was seen, so the record is not empty
    assert peak < block + 16 * N * D * 4 < N * N * 4 / 7


@both
def test_compiled_kernels_take_no_more_memory(name: str) -> None:
    """The automatic choice on this machine, by what the process holds at most: kernels may allocate beside torch."""
    N, D = 16384, 64
    given = arguments(name, N, 14.3, D=D)
    peak = None if GPU else peak_memory(lambda: gradients(LOSSES[name][0], *given))
    if peak is None:
        pytest.skip("a GPU is here, whose allocator's peak would be read" if GPU else "this system does not tell the peak")
    assert 2 * N * D * 4 <= peak < spec.BLOCK * N * 4 + 16 * N * D * 4


@both
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_no_matrix_and_no_synchronisation(name: str) -> None:
    """At N = 262,144 one byte a logit would be 64 GiB; and the whole can be captured as a graph, which replays equal bits."""
    N, D = 262_144, 64
    given = [x.cuda() for x in arguments(name, N, 14.3, torch.bfloat16, D=D)]
    gradients(LOSSES[name][0], *given)
    assert peak_memory(lambda: gradients(LOSSES[name][0], *given)) < 1 << 30
    leaves = [x[:4096].detach().clone().requires_grad_() if x.ndim else x.detach().requires_grad_() for x in given]
    labels = torch.arange(4096, device="cuda") // 2

    def run() -> list[Tensor]:
        loss = LOSSES[name][0](*leaves, labels=labels, normalize=True)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # else a synchronisation would break the capture, and with it the process
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # a synchronisation inside is an error
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("N", [64, 1100])
def test_statistics_against_float64(backend: str, N: int) -> None:
    image, text = features(N)
    skip_unless_supported("contrastive", backend, image, text, tensor(100.0), 0)
    found = torch.ops.clipfast.contrastive(*there(backend, image, text, tensor(100.0)), 0)
    row_max, row_sum, col_max, col_sum, diagonal = (x.cpu() for x in found)
    s = 100 * image.double() @ text.double().T
    got = row_max + row_sum.log(), col_max + col_sum.log(), diagonal
    for mine, truth in zip(got, (s.logsumexp(1), s.logsumexp(0), s.diagonal()), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=0)


def test_small_losses_keep_their_digits(backend: str) -> None:
    """Where a log-sum-exp of 100 in fp32 is rounded to 4e-6, a loss of 1e-5 is right to 3e-7."""
    N, D = 48, 64
    image = F.normalize(torch.eye(N, D) + 0.055 * torch.randn(N, D, generator=torch.Generator().manual_seed(0)), dim=1)
    text = F.normalize(image + 0.4 * image.roll(1, 0) + 0.35 * image.roll(2, 0), dim=1)
    skip_unless_supported("contrastive", backend, image, text, tensor(25.0), 0)
    row, col = (x.cpu() for x in kernels.contrastive(*there(backend, image, text), 25.0))
    s = 25 * image.double() @ text.double().T
    others = (s - s.diagonal()[:, None]).exp().fill_diagonal_(0).sum(1), (s - s.diagonal()).exp().fill_diagonal_(0).sum(0)
    for got, other in zip((row, col), others, strict=True):
        assert 1e-8 < other.min() < 1e-5
        torch.testing.assert_close(got.double(), other.log1p(), rtol=5e-6, atol=3e-7)


@pytest.mark.parametrize("N", [6, 1030])
def test_rows_and_columns_far_apart(backend: str, N: int) -> None:
    """Columns whose every logit is 200 below the rows' maxima: what one exponential for both would lose to underflow."""
    image, text = features(N, 16)
    skip_unless_supported("contrastive", backend, image, text, tensor(100.0), 0)
    axis = F.one_hot(torch.tensor(0), 16).float()
    image, text = F.normalize(axis + 0.05 * image, dim=1), F.normalize(axis + 0.05 * text, dim=1)
    text[::2] *= -1
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1)).double() / N

    def loss(contrastive, *leaves: Tensor) -> Tensor:
        row, col = (x.cpu() for x in contrastive(*leaves))
        return weights[0] @ row.double() + weights[1] @ col.double()

    def ours(*leaves: Tensor) -> Any:
        return kernels.contrastive(*there(backend, *leaves))

    for a, b in ((image, text), (text, image)):
        got, grads = gradients(lambda *leaves: loss(ours, *leaves), a, b, tensor(100.0))
        truth, true_grads = gradients(
            lambda *leaves: loss(spec.reference, *leaves), a.double(), b.double(), tensor(100.0).double()
        )
        assert (got - truth).abs() < 1e-5 * truth.abs().clamp_min(1)
        for mine, true in zip(grads[:2], true_grads[:2], strict=True):
            assert (mine - true).norm() < 1e-4 * true.norm()


@both
@needs_open_clip
def test_lower_error_than_autocast_in_bfloat16(name: str) -> None:
    """Than that of features in bf16 and, of the gradients, than that of features in fp32 which autocast lowers."""
    ours, definition, _, rival, _ = LOSSES[name]
    given = arguments(name, 200, 100.0, torch.bfloat16)
    truth, true_grads = gradients(definition, *(x.double() for x in given))
    loss, grads = gradients(ours, *given)
    theirs, their_grads = gradients(rival(), *given)
    assert (loss - truth).abs() < (theirs - truth).abs() / 10
    with torch.autocast("cpu", torch.bfloat16):
        _, lowered_grads = gradients(rival(), *(x.float() for x in given))
    for mine, *others, true in zip(grads[:2], their_grads, lowered_grads, true_grads, strict=False):
        assert all((mine - true).norm() < (other - true).norm() for other in others)
    assert all(map(torch.equal, grads, gradients(ours, *given)[1]))


def test_orthogonal_pairs_at_scale_100(backend: str) -> None:
    """Every p is 1 or e^-100, which fp32 cannot hold: nothing is left to learn, and nothing but rounding below it may be."""
    image = torch.eye(33, 64)
    skip_unless_supported("contrastive", backend, image, image, tensor(100.0), 0)
    loss, grads = gradients(clip_loss, *there(backend, image, image, tensor(100.0)))
    assert 0 <= loss < 1e-30 and all(g.abs().max() < 1e-30 for g in grads)


@both
def test_one_nan_row_makes_the_loss_nan(name: str, backend: str) -> None:
    image, *rest = arguments(name, 9, 14.0)
    image[4] = torch.nan
    skip_unless_supported(*(("contrastive", backend, image, *rest, 0) if name == "clip" else
                            ("pairwise_sigmoid", backend, image, *rest, 0, True, True)))  # fmt: skip
    loss, grads = gradients(LOSSES[name][0], *there(backend, image, *rest))
    assert loss.isnan() and all(g.isnan().any() for g in grads)


def test_scale_zero_and_one_pair() -> None:
    image, text = features(9)
    assert clip_loss(image, text, tensor(0.0)).item() == pytest.approx(math.log(9), rel=1e-6)
    loss, grads = gradients(clip_loss, image[:1], text[:1], tensor(100.0))
    assert loss == 0 and not any(g.any() for g in grads)
    one = siglip_loss(image, text, tensor(0.0), tensor(0.0)).item()
    assert one == pytest.approx(9 * math.log(2), rel=1e-6)
    far = siglip_loss(image[:1], image[:1], tensor(100.0), tensor(-80.0)).item()  # softplus(-20): its digits are kept
    assert far == pytest.approx(math.log1p(math.exp(-20)), rel=2e-5)


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
        "no tensor": (TypeError, "tensors as features, got list and Tensor", dict(image_features=[[1.0]])),
        "mixed": (TypeError, "one dtype, got torch.float32 and torch.float64.*to", dict(text_features=text.double())),
        "scale vector": (ValueError, r"scalar logit_scale of shape \(\), got \(4,\)", dict(logit_scale=torch.ones(4))),
        "scale integer": (TypeError, "floating tensor as logit_scale, got torch.int64", dict(logit_scale=torch.tensor(3))),
        "scale text": (TypeError, "floating tensor as logit_scale, got str", dict(logit_scale="3")),
        "devices": (ValueError, "one device, got cpu and meta", dict(text_features=text.to("meta"))),
        "labels length": (ValueError, r"one label per row, \(4,\), got \(3,\)", dict(labels=torch.arange(3))),
        "labels dtype": (TypeError, "integer labels, got torch.float32", dict(labels=torch.ones(4))),
        "labels list": (TypeError, "labels as a tensor, got list", dict(labels=[0, 1, 2, 3])),
        "labels unsigned": (TypeError, "integer labels, got torch.uint64", dict(labels=torch.arange(4).to(torch.uint64))),
        "no columns": (TypeError, r"at least one wide, got \(4, 0\)", dict(image_features=image[:, :0], text_features=text[:, :0])),  # noqa: E501
        "sparse": (TypeError, "dense features .*, torch.sparse_coo and torch.strided", dict(image_features=image.to_sparse())),
        "8 bits": (TypeError, "dense features of float16, .* got .*float8_e5m2", dict.fromkeys(("image_features", "text_features"), image.to(torch.float8_e5m2))),  # noqa: E501
        "bias text": (TypeError, "floating tensor as logit_bias, got str", dict(logit_bias="3")),
        "bias vector": (ValueError, r"scalar logit_bias of shape \(\), got \(4,\)", dict(logit_bias=torch.ones(4))),
        "labels device": (ValueError, "labels on cpu, got meta", dict(labels=torch.arange(4, device="meta"))),
    }  # fmt: skip
    return {name: (error, message, arguments | change) for name, (error, message, change) in bad.items()}


@pytest.mark.parametrize("name", _bad())
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message, arguments = _bad()[name]
    for home in (spec, sigmoid_spec):
        monkeypatch.setattr(home, "forward", lambda *args: pytest.fail("a kernel started"))
    with dispatch.use("torch"), pytest.raises(error, match=message):
        siglip_loss(**({"logit_bias": -1.0} | arguments))
    if "logit_bias" not in arguments:
        with dispatch.use("torch"), pytest.raises(error, match=message):
            clip_loss(**arguments)

"""The towers under what trainers and servers do to a module: compilation, checkpointing, precision, wrapping, CUDA graphs."""

from __future__ import annotations

import copy
import socket
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

import bench.rivals  # noqa: F401 - first: a spawned process imports this file alone
import clipfast
from clipfast import kernels
from clipfast.kernels import dispatch
from clipfast.model import CLIP, Packed, graphs
from clipfast.model.frozen import PackedLinear
from clipfast.train.job import Job, spread
from tests.model.test_model import SMALL, TEXT, captions, relative, shake, small_batch

FAMILIES = list(SMALL)


def small(family: str = "vit", **changes: object) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**(SMALL[family] | TEXT | changes))
    shake(model)
    return model


def gradients(model: nn.Module, *features: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model.zero_grad()
    sum((f * torch.randn(f.shape, generator=generator)).sum() for f in features).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Of a parameter whose gradient is exactly or nearly zero (a bias of keys) the size counts, not the share."""
    assert got.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    for name in expected:
        assert (got[name] - expected[name]).norm() <= bound * expected[name].norm() + 1e-7 * scale, name


# transformers


def test_gradients_equal_transformers() -> None:
    """Features and the gradient of every parameter of a ViT, against transformers' CLIPModel on the same weights."""
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, hidden_act="quick_gelu")
    config = CLIPConfig(
        text_config=tower | dict(vocab_size=99, max_position_embeddings=12, eos_token_id=98, bos_token_id=97),
        vision_config=tower | dict(image_size=32, patch_size=8),
        projection_dim=32,
    )
    torch.manual_seed(0)
    theirs = CLIPModel(config).double().eval()
    shake(theirs)
    ours = clipfast.convert(theirs)
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    text = torch.tensor([[97, 5, 8, 98, 0, 0], [97, 98, 0, 0, 0, 0], [97, 3, 3, 4, 60, 98]])
    expected = theirs(input_ids=text, pixel_values=image)
    got = ours.encode_image(image, normalize=True), ours.encode_text(text, normalize=True)
    assert relative(got[0], expected.image_embeds) < 1e-12 and relative(got[1], expected.text_embeds) < 1e-12
    reached = gradients(theirs, expected.image_embeds, expected.text_embeds)
    own = gradients(ours, *got)
    holder = copy.deepcopy(theirs)  # their gradients under our names, by the mapping of the weights
    for name, p in holder.named_parameters():
        p.data = reached.get(name, torch.zeros_like(p))
    back = clipfast.convert(holder)
    for name, p in back.named_parameters():
        if name != "logit_scale":
            assert (own[name] - p).norm() <= 1e-10 * p.norm() + 1e-12, name


# torch.compile


@pytest.mark.parametrize("family", FAMILIES)
def test_both_towers_compile_to_one_graph(family: str) -> None:
    """In training mode, forward and backward; a second batch of other lengths compiles once more at most, a third not."""
    torch._dynamo.reset()
    model = small(family)
    model.visual.eval()  # running averages are moved by a pass: the two would see different ones
    counter = CompileCounterWithBackend("aot_eager")
    image, text = small_batch(family)
    encode = torch.compile(model.encode_image, fullgraph=True, backend=counter)
    same(gradients(model, encode(image)), gradients(model, model.encode_image(image)))
    assert counter.frame_count == 1
    counter.clear()
    encode = torch.compile(model.encode_text, fullgraph=True, backend=counter)
    for lengths in ([3, 2, 20, 7, 7, 11], [4, 4, 9, 2, 8, 5], [13, 2, 3, 3, 3, 19], [2, 2, 2, 2, 2, 3]):
        packed = model.pack(captions(lengths, 20))
        same(gradients(model, encode(packed)), gradients(model, model.encode_text(packed)))
    assert counter.frame_count <= 2


def test_text_of_any_lengths_compiles_with_a_break() -> None:
    torch._dynamo.reset()
    model = small().eval()
    _, text = small_batch("vit")
    with torch.no_grad():
        expected = model.encode_text(text)
        assert relative(torch.compile(model.encode_text, backend="aot_eager")(text), expected) < 1e-6
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="encode_text.model.pack"):
            torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")(text)


# checkpointing and folding


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_memory_alone(family: str) -> None:
    model = small(family)
    model.visual.eval()
    image, text = small_batch(family)

    def kept() -> tuple[dict[str, Tensor], int]:
        """Gradients, and the bytes that the forward passes keep for them."""
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = model.encode_image(image), model.encode_text(text)
        return gradients(model, *features), sum(held.values())

    plain, before = kept()
    model.set_grad_checkpointing()
    again, after = kept()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert after < (0.7 if family == "vit" else 0.9) * before
    model.set_grad_checkpointing(False)
    assert kept()[1] == before


def test_folded_batch_norm_gives_the_same_features() -> None:
    model = small("resnet").eval()
    image, text = small_batch("resnet")
    fused = model.for_inference()
    with torch.no_grad():
        expected = model.encode_image(image)
        assert relative(fused.encode_image(image), expected) < 1e-6
        assert torch.equal(fused.encode_text(text), model.encode_text(text))
        assert torch.equal(model.encode_image(image), expected)  # the model itself is as it was
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters()) and all(p.requires_grad for p in model.parameters())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not small("vit").for_inference().training


def test_a_convolution_that_a_user_put_in_its_place_runs_itself() -> None:
    class Twice(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, (image, _) = small("resnet").eval(), small_batch("resnet")
    places = [(module, f"conv{i}") for module in model.visual.modules() if hasattr(module, "bn3") for i in (1, 2, 3)]
    with torch.no_grad():
        for home, name in places:
            plain = model.encode_image(image)
            old = getattr(home, name)
            put = Twice(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
            put.weight = nn.Parameter(old.weight / 2)
            setattr(home, name, put)
            assert relative(model.encode_image(image), plain) < 1e-6
            put.weight.mul_(2)
            assert relative(model.encode_image(image), plain) > 1e-4
            put.weight.div_(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_give_the_same_features(family: str) -> None:
    model, (image, text) = small(family).eval(), small_batch(family)
    packed = model.for_inference(packed=True)
    towers = packed._transformers()
    assert towers and all(type(b.mlp.c_fc) is PackedLinear for t in towers for b in t.resblocks)
    assert {p.data_ptr() for p in packed.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    for B in (6, 1, 0):
        assert packed.encode_image(image[:B]).shape == (B, 32)
        for ours, plain in zip(packed(image[:B], text), model(image[:B], text), strict=True):
            assert B == 0 or relative(ours, plain.detach()) < 1e-5
    got, expected = packed.forward_intermediates(image, text), model.forward_intermediates(image, text)
    assert relative(got["text_intermediates"][-1], expected["text_intermediates"][-1].detach()) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing in the blocks
        assert relative(packed.encode_text(text), model.encode_text(text).detach()) < 0.05
    assert relative(copy.deepcopy(packed).encode_text(text), model.encode_text(text).detach()) < 1e-5


def test_packed_weights_that_somebody_looks_at() -> None:
    """A hook inside a block, a module that is replaced: it runs as itself, and the others as they were."""
    model, (image, text) = small("vit").eval(), small_batch("vit")
    packed, seen = model.for_inference(packed=True), []
    for tower, encode, given in ((packed.visual, "encode_image", image), (packed, "encode_text", text)):
        expected = getattr(model, encode)(given).detach()
        hook = tower.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
        assert relative(getattr(packed, encode)(given), expected) < 1e-5
        hook.remove()
        tower.transformer.resblocks[1].mlp.gelu = nn.ReLU()
        assert relative(getattr(packed, encode)(given), expected) > 1e-4
    assert len(seen) == 2


def test_weights_that_are_not_packed() -> None:
    model, (_, text) = small("vit").eval(), small_batch("vit")
    with pytest.warns(UserWarning, match="not packed: expected float32 on the CPU, got torch.bfloat16 on cpu"):
        assert type(copy.deepcopy(model).bfloat16().for_inference(packed=True).transformer.resblocks[0].mlp.c_fc) is nn.Linear
    with dispatch.use("torch"), pytest.warns(UserWarning, match="not packed: torch is forced"):
        assert torch.equal(model.for_inference(packed=True).encode_text(text), model.encode_text(text))
    packed = model.for_inference(packed=True)
    with pytest.warns(UserWarning, match="not packed: expected float32 on the CPU, got packed on cpu"):
        again = packed.for_inference(packed=True)
    assert torch.equal(again.encode_text(text), packed.encode_text(text))
    with pytest.raises(ValueError, match="expected a float32 model on the CPU, got packed on cpu"):
        packed.for_inference(int8=True)
    with dispatch.use("torch"):  # its weights are read all the same
        assert relative(packed.encode_text(text), model.encode_text(text).detach()) < 1e-5


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_trains(family: str, dtype: torch.dtype) -> None:
    """Autocast over fp32 weights, and a model cast as a whole: features, and finite gradients of every parameter."""
    model = small(family)
    model.visual.eval()
    image, text = small_batch(family)
    with torch.no_grad():
        expected = model.encode_image(image), model.encode_text(text)
    with torch.autocast("cpu", dtype):
        features = model.encode_image(image), model.encode_text(text)
    low = copy.deepcopy(model).to(dtype)
    cast = low.encode_image(image), low.encode_text(text)
    assert {f.dtype for f in cast} == {dtype}
    for got in (features, cast):
        assert all(relative(g, e) < 0.06 for g, e in zip(got, expected, strict=True))
    for trained, got in ((model, features), (low, cast)):
        found = gradients(trained, *(f.float() for f in got))
        assert set(found) == {name for name, _ in trained.named_parameters()} - {"logit_scale"}
        assert all(g.isfinite().all() for g in found.values())


def test_linear_follows_autocast_and_frozen_weights() -> None:
    """Large enough for oneDNN to take it where that is the choice."""
    x = torch.randn(256, 256, requires_grad=True)
    weight, bias = torch.randn(256, 256), torch.randn(256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, weight, bias).dtype == torch.bfloat16
    got, expected = kernels.linear(x, weight, bias), F.linear(x, weight, bias)
    assert relative(got, expected) < 1e-6
    for a, b in zip(torch.autograd.grad(got.sum(), (x, bias)), torch.autograd.grad(expected.sum(), (x, bias)), strict=True):
        assert relative(a, b) < 1e-6
    with torch.no_grad():  # nothing is kept of weights that change in place
        weight.mul_(2)
        assert relative(kernels.linear(x, weight), F.linear(x, weight)) < 1e-6


# wrapping


def _features(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    per_image, _ = model(image, text)
    return per_image.diagonal().sum() + per_image.square().mean()


def _wrapped(rank: int, port: int, kind: str, out: Path) -> None:
    """Two ranks, half the batch each: the mean gradient of every parameter, gathered, for a ViT and a ResNet."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for family in ("vit", "resnet"):
        model = small(family)
        model.visual.eval()
        image, text = (half[3 * rank : 3 * rank + 3] for half in small_batch(family))
        scalar, blocks = model.logit_scale, [*model.transformer.resblocks]  # a scalar cannot be split into two
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif family == "vit":
            mesh = init_device_mesh("cpu", (2,))
            for block in (*model.visual.transformer.resblocks, *blocks):
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(model, mesh=mesh, ignored_params={scalar})
        else:  # as the training does it: FSDP takes no weights that are channels-last
            wrapped = spread(model, blocks, [scalar], "fsdp", Job(rank, 2, scalar.device, dist.group.WORLD))
        _features(wrapped, image, text).backward()
        grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
        if kind == "fsdp":
            dist.all_reduce(grads["logit_scale"], dist.ReduceOp.SUM)
            grads["logit_scale"] /= 2
        if rank == 0:
            torch.save(grads, out / f"{family}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_over_two_ranks(kind: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_wrapped, (port, kind, tmp_path), nprocs=2)
    for family in ("vit", "resnet"):
        got = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        model = small(family)
        model.visual.eval()
        image, text = small_batch(family)
        (_features(model, image[:3], text[:3]) / 2 + _features(model, image[3:], text[3:]) / 2).backward()
        same(got, {name: p.grad for name, p in model.named_parameters()})


# input


def test_wrong_texts_are_named() -> None:
    model = small()
    good = captions([3, 5], 20)

    def changed(row: int, column: int, value: int) -> Tensor:
        text = good.clone()
        text[row, column] = value
        return text

    with pytest.raises(ValueError, match="ids of 0 to 49407, got 0 to 49408 in row 0"):
        model.encode_text(changed(0, 1, 49408))
    with pytest.raises(ValueError, match="ids of 0 to 49407, got -1 to 49407 in row 1"):
        model.encode_text(changed(1, 1, -1), lengths=[3, 5])
    with pytest.raises(ValueError, match="lengths of 1 to 20 tokens, got 0 in row 1"):
        model.encode_text(good, lengths=[3, 0])
    with pytest.raises(ValueError, match="lengths of 1 to 20 tokens, got 21 in row 0"):
        model.encode_text(good, lengths=[21, 5])
    with torch.no_grad():  # texts that end otherwise, with their lengths
        assert model.encode_text(changed(1, 4, 7), lengths=[3, 5]).isfinite().all()
    for wrong in (torch.zeros(1, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 31)):
        with pytest.raises(ValueError, match=r"expected images \[B, 3, 32, 32\]"):
            model.encode_image(wrong)


def test_a_forced_backend_names_the_head_width() -> None:
    qkv = torch.randn(5, 3 * 24)
    with dispatch.use("cpu"), pytest.raises(RuntimeError, match="heads of a multiple of 16 columns, got 24"):
        kernels.attention(qkv, 1)


# CUDA graphs


def test_graphed_says_why_it_records_nothing() -> None:
    model = small().eval()
    image, text = small_batch("vit")
    with pytest.warns(UserWarning, match="expected a model on a CUDA device, got cpu; the model runs without graphs"):
        fast = clipfast.graphed(model)
    assert fast.reason and not fast.recorded
    with torch.no_grad():
        assert torch.equal(fast.encode_image(image, normalize=True), model.encode_image(image, normalize=True))
        assert torch.equal(fast.encode_text(text), model.encode_text(text))
    with pytest.raises(ValueError, match="eval mode"):
        clipfast.graphed(small())
    with pytest.raises(ValueError, match="positive batch_sizes"):
        clipfast.graphed(model, batch_sizes=[0])
    with pytest.raises(ValueError, match="at most 20"):
        clipfast.graphed(model, text_lengths=[21])


def test_graphed_fills_up_to_the_next_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder that runs the function on the held inputs, as a graph would: which sizes it sees, and the features."""
    seen: list[tuple[tuple[int, ...], ...]] = []

    def record(run, given):
        inputs = tuple(t.clone() for t in given)
        seen.append(tuple(tuple(t.shape) for t in inputs))
        output = run(*inputs)
        return inputs, lambda: output.copy_(run(*inputs))

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "_lacks", lambda model: None)
    model = small().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = clipfast.graphed(model, batch_sizes=[4, 2], text_lengths=[4, 20])
    generator = torch.Generator().manual_seed(3)
    images = {B: torch.randn(B, 3, 32, 32, generator=generator) for B in (1, 2, 3, 4, 5)}
    lengths = {1: [2], 2: [3, 5], 3: [20, 19, 20], 4: [20] * 4, 5: [2] * 5}
    with torch.no_grad():
        first = fast.encode_image(images[1])
        for B in images:
            assert (
                relative(fast.encode_image(images[B], normalize=B == 3), model.encode_image(images[B], normalize=B == 3)) < 1e-6
            )
            text = captions(lengths[B], 20, seed=B)
            for normalize in (False, True):
                assert relative(fast.encode_text(text, normalize), model.encode_text(text, normalize)) < 1e-6
        assert relative(first, model.encode_image(images[1])) < 1e-6  # not overwritten by later replays
        assert fast.encode_image(images[1][:0]).shape == (0, 32)
    assert set(fast.recorded) == {(2,), (4,), (2, 4), (4, 20)}
    assert ((2, 3, 32, 32),) in seen and ((4, 3, 32, 32),) in seen
    assert ((8,), (8,), (2 + 1 + 1,)) in seen and ((80,), (80,), (4 + 4 + 1,)) in seen


def test_filled_texts_have_the_lengths_that_a_kernel_may_take() -> None:
    model = small()
    for lengths, B, T in (([2], 1, 4), ([20, 20], 2, 40), ([3, 4, 5], 8, 160), ([20] * 3, 4, 61)):
        packed = model.pack(captions(lengths, 20))
        filled = graphs.fill(packed, B, T, 20)
        found = filled.cu_seqlens.diff()
        assert isinstance(filled, Packed) and len(filled.ids) == len(filled.position) == T
        assert found[: len(lengths)].tolist() == lengths and 0 <= int(found.min()) <= int(found.max()) <= 20
        assert int(filled.cu_seqlens[-1]) == T and len(found) == B + -(-T // 20)
        assert int(filled.position.max()) < 20


# libraries


class Recorder:
    """Stands for a package's function; gives what it is asked to, and keeps how it was called."""

    def __init__(self, give) -> None:
        self.give, self.calls = give, []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.give(*args, **kwargs)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Puts a module in place of a package, and lets the attention op look for its backends anew."""

    def install(**modules: types.ModuleType) -> None:
        for name in modules:
            monkeypatch.setitem(sys.modules, name.replace("__", "."), modules[name])
        for name in ("flash_attn", "xformers"):
            monkeypatch.delitem(sys.modules, f"clipfast.kernels.attention.{name}", raising=False)

    monkeypatch.setattr(kernels.OPS["attention"], "backend", type(kernels.OPS["attention"]).backend.__wrapped__.__get__(
        kernels.OPS["attention"]))  # fmt: skip
    yield install
    for name in ("flash_attn", "xformers"):
        sys.modules.pop(f"clipfast.kernels.attention.{name}", None)


def _truth(qkv: Tensor, ends: Tensor, heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        spec = kernels.OPS["attention"].spec
        return spec.forward(qkv, ends, heads, causal, int(ends.diff().max()))


@pytest.mark.parametrize("packed", [True, False])
def test_flash_attn_is_called_with_packed_views(installed, packed: bool) -> None:
    heads, ends = 2, torch.tensor([0, 4, 8], dtype=torch.int32)
    qkv = torch.randn(8, 3 * 128, dtype=torch.bfloat16)
    given = qkv if packed else qkv.view(2, 4, -1)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal):
        assert torch.equal(cu_q, ends) and torch.equal(cu_k, ends) and max_q == max_k == 4 and dropout_p == 0
        assert softmax_scale == 64**-0.5 and causal is True and q.data_ptr() == qkv.data_ptr()  # a view, no copy
        out, lse = _truth(torch.stack([q, k, v], 1).flatten(1), ends, heads, causal)
        return out.view(q.shape), lse, None, None

    def backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, **options):
        assert options["deterministic"] is True and options["causal"] is True and lse.shape == (heads, 8)
        for i, d in enumerate((dq, dk, dv)):
            d.fill_(i + 1)

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = Recorder(forward), Recorder(backward)
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    installed(flash_attn=package, flash_attn__flash_attn_interface=interface)
    backend = kernels.OPS["attention"].backend("flash_attn")
    cu_seqlens = ends if packed else None
    out, lse = backend.forward(given, cu_seqlens, heads, True, 4 if packed else 0)
    assert torch.equal(out.view(8, -1), _truth(qkv, ends, heads, True)[0])
    dqkv = backend.backward(torch.ones_like(out), out, lse, given, cu_seqlens, heads, True, 4 if packed else 0)
    assert dqkv.shape == given.shape and dqkv.view(8, 3, 128)[3].mean(1).tolist() == [1, 2, 3]
    assert backend.forward(given[:0], None if not packed else ends[:1], heads, True, 0)[0].numel() == 0
    assert len(interface._flash_attn_varlen_forward.calls) == len(interface._flash_attn_varlen_backward.calls) == 1
    assert "expected CUDA tensors, got cpu" in backend.supports(given, cu_seqlens, heads, True, 4)


def test_xformers_is_called_with_a_block_diagonal_mask(installed) -> None:
    heads, ends = 2, torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    qkv = torch.randn(8, 3 * 128, dtype=torch.bfloat16)

    class Mask:
        def __init__(self, lengths, causal=False) -> None:
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, lengths, device):
            return cls(lengths)

        def make_causal(self):
            return Mask(self.lengths, True)

    def forward(q, k, v, mask, op):
        assert q.shape == (1, 8, heads, 64) and mask.lengths == [3, 0, 5] and mask.causal and op == "forward"
        out, lse = _truth(torch.stack([q, k, v], 2)[0].flatten(1), ends, heads, True)
        return out.view(q.shape), lse[None]

    def backward(grad, out, lse, q, k, v, mask, op):
        assert lse.shape == (1, heads, 8) and mask.lengths == [3, 0, 5] and mask.causal and op == "backward"
        return tuple(torch.full_like(q, i + 1.0) for i in range(3))

    fmha = types.SimpleNamespace(
        attn_bias=types.SimpleNamespace(BlockDiagonalMask=Mask),
        flash=types.SimpleNamespace(FwOp="forward", BwOp="backward"),
        memory_efficient_attention_forward_requires_grad=Recorder(forward),
        memory_efficient_attention_backward=Recorder(backward),
    )
    ops, package = types.ModuleType("xformers.ops"), types.ModuleType("xformers")
    ops.fmha, package.ops = fmha, ops
    installed(xformers=package, xformers__ops=ops)
    backend = kernels.OPS["attention"].backend("xformers")
    out, lse = backend.forward(qkv, ends, heads, True, 5)
    assert torch.equal(out, _truth(qkv, ends, heads, True)[0])
    dqkv = backend.backward(torch.ones_like(out), out, lse, qkv, ends, heads, True, 5)
    assert dqkv.view(8, 3, 128)[3].mean(1).tolist() == [1, 2, 3]
    assert "expected CUDA tensors, got cpu" in backend.supports(qkv, ends, heads, True, 5)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_a_library_that_is_not_there_is_named(name: str) -> None:
    if isinstance(kernels.OPS["attention"].backend(name), str):
        with dispatch.use(name), pytest.raises(RuntimeError, match=f"no module {name}"):
            kernels.attention(torch.randn(5, 192), 1)


class Images(nn.Module):
    """The image tower alone, as a module whose forward pass it is."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_with_any_batch(family: str) -> None:
    tower, (image, _) = Images(small(family).eval().requires_grad_(False)), small_batch(family)
    batch = torch.export.Dim("batch", min=1, max=4096)
    exported = torch.export.export(tower, (image,), dynamic_shapes=({0: batch},)).module()
    for pixels in (image, image[:1], image.repeat(20, 1, 1, 1)):
        assert relative(exported(pixels), tower(pixels)) < 1e-5


def test_gradients_of_single_samples() -> None:
    """torch.func's per-sample gradients add up to the batch's."""
    tower, (image, _) = Images(small("vit")), small_batch("vit")
    weights = {name: p.detach() for name, p in tower.named_parameters() if name.startswith("model.visual")}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(tower, weights, (image[None],)).square().sum()

    of_each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, image)
    tower(image).square().sum().backward()
    for name, p in tower.named_parameters():
        assert p.grad is None or relative(of_each[name].sum(0), p.grad) < 1e-4, name

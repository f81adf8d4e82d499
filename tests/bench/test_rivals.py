"""Other people's kernels are called as their packages have it: stand-ins with those signatures, which torch computes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench import rivals, test_kernels, test_losses, test_towers
from bench.rivals import open_clip
from clipfast import kernels


def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None, fuse_grad_accum=False, tuned=True, recompute=False):  # noqa: PLR0913
    """quack.mlp, 0.6.5."""
    h = F.linear(x, weight1, bias1)
    return F.linear({"quick_gelu": h * torch.sigmoid(1.702 * h), "gelu_erf": F.gelu(h)}[activation], weight2, bias2)


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    """quack.rmsnorm, 0.6.5: rows, and gains in fp32."""
    assert x.ndim == 2 and weight.dtype == bias.dtype == torch.float32 and return_rstd and return_mean
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return y, rstd, mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    nothing = torch.zeros_like(weight)
    return torch.ops.aten.native_layer_norm_backward(dout, x, weight.shape, mean, rstd, weight, nothing, [True] * 3)


def flash_attn_func(q, k, v, *, causal=False):
    """flash_attn.cute, 4.0.0b36: (out, None)."""
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    return out.transpose(1, 2), None


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    ends = cu_seqlens_q.tolist()
    assert ends == cu_seqlens_k.tolist() and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    parts = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
    return torch.cat([flash_attn_func(q[p][None], k[p][None], v[p][None], causal=causal)[0][0] for p in parts]), None


@pytest.mark.parametrize(
    ("op", "rival", "case", "package"),
    [
        ("mlp", "QuACK", dict(rows=5, C=16), dict(mlp_func=mlp_func)),
        ("fused_mlp", "QuACK", dict(rows=5, C=16, quick_gelu=False), dict(mlp_func=mlp_func)),
        (
            "layer_norm",
            "QuACK",
            dict(shape=(2, 3, 16), residual=True),
            dict(layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd),
        ),
        ("attention", "flash-attn 4", dict(lengths=(5, 5), heads=2), dict(flash_attn_func=flash_attn_func)),
        (
            "attention",
            "flash-attn 4",
            dict(lengths=(3, 5, 1), heads=2, causal=True, packed=True),
            dict(flash_attn_varlen_func=flash_attn_varlen_func),
        ),
    ],
)  # fmt: skip
def test_a_kernel_of_others_is_called_as_it_is(monkeypatch, op: str, rival: str, case: dict[str, Any], package: dict) -> None:
    """It computes what ours does, with its gradients; one that computes something else says so."""
    given, leaves = test_kernels.arguments(op, case)
    with torch.no_grad():
        outputs = getattr(kernels, op)(**given)
    expected = outputs if isinstance(outputs, Tensor) else outputs[0]

    def tried(package: dict) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(rivals, "imported", lambda module: SimpleNamespace(**package))
            patched.setattr(torch.cuda, "is_available", lambda: True)
            found = rivals.of_op(op)[rival]
        return test_kernels.tried(found, given, leaves, expected)

    def twice(function: Callable) -> Callable:
        return lambda *args, **options: tree_map_only(Tensor, lambda t: 2 * t, function(*args, **options))

    assert callable(tried(package))
    assert tried({name: twice(function) for name, function in package.items()}) == "it computes something else"
    assert "has no attribute" in tried({})


def siglip(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    return test_losses.chunked_siglip(image, text, log_scale.exp(), bias)


def test_siglip_kernel_with_its_own_chunks_and_with_others(monkeypatch) -> None:
    asked: list[int] = []

    def chunked(image, text, log_temperature, bias, chunk_size=0, use_fp8=False, diag_offset=0):
        asked.append(chunk_size)
        return siglip(image, text, log_temperature, bias)

    package = SimpleNamespace(fused_siglip_loss=siglip, fused_chunked_bf16_siglip_loss=chunked)
    monkeypatch.setattr(test_losses, "imported", lambda module: package)
    monkeypatch.setattr(test_losses, "GPU", False)
    assert test_losses.siglip_kernel(1024) == "siglip-kernel runs on CUDA only"
    monkeypatch.setattr(test_losses, "GPU", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    given = test_losses.features(8)
    found = test_losses.contenders("siglip", 8, compiled=False)
    ours = test_losses.forward_backward(found["ours"], given)()  # type: ignore[arg-type]
    for name in ("siglip-kernel", "siglip-kernel 1,024", "siglip-kernel 16,384"):
        rival: Any = found[name]
        assert callable(test_losses.agreeing(test_losses.forward_backward(rival, given), ours))
    assert asked == [1024, 16384]


@pytest.mark.skipif(isinstance(open_clip, str), reason="needs open_clip's loss")
def test_open_clips_task_is_compiled_as_it_compiles_itself(monkeypatch) -> None:
    image, text, compiled = torch.randn(4, 3), torch.randn(4, 3), []

    class Model(torch.nn.Module):
        output_dict = False

        def forward(self, image: Tensor, text: Tensor) -> Any:
            found = dict(image_features=image, text_features=text, logit_scale=torch.tensor(2.0))
            return found if self.output_dict else tuple(found.values())

    class CLIPTask(torch.nn.Module):
        """open_clip main, 4.2.0.dev0."""

        def __init__(self, model, *, loss=None, device=None, dtype=None, verbose=True):
            super().__init__()
            self.model, self.loss = model, loss or open_clip.loss.ClipLoss()

        def compile(self, *, target="task", backend=None, mode=None):
            compiled.append(target)

        def forward(self, batch):
            return dict(loss=self.loss(**self.model(**batch)))

    def expected() -> Tensor:
        return open_clip.loss.ClipLoss()(image, text, torch.tensor(2.0))

    assert "No module named 'open_clip.task'" in str(rivals.open_clip_task(Model(), image, text)) or hasattr(open_clip, "task")
    monkeypatch.setattr(rivals, "imported", lambda module: SimpleNamespace(CLIPTask=CLIPTask))
    assert callable(test_towers.as_task(Model(), image, text, expected)) and compiled == ["task"]
    assert "something else" in str(test_towers.as_task(Model(), image, text, lambda: expected() + 1))
    assert test_towers.as_task("gone", image, text, expected) == "gone"

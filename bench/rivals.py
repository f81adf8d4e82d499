"""The rivals: open_clip on our sizes and weights, and other people's kernels as functions of our ops' arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfast.kernels import OPS

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # PyPI's build beside a CPU build of torch: two operators are missing, which CLIP never calls
    _TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# From the repository's root transformers would take our folder kernels/ for the PyPI package of that name.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def imported(module: str) -> ModuleType | str:
    """A rival's module, or the reason why it is not here: that of its rows."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def __getattr__(name: str) -> Any:
    if name == "open_clip":  # imported where it is asked for: with transformers behind it it takes seconds
        return imported(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_clip_model(sizes: dict[str, Any], state: dict[str, Tensor]) -> nn.Module | str:
    """open_clip's CLIP of these sizes (clipfast.CLIP's arguments) with these weights, or the reason why it is not here."""
    open_clip: Any = imported("open_clip")
    if isinstance(open_clip, str):
        return open_clip
    vision = dict(
        image_size=sizes["image_resolution"], layers=sizes["vision_layers"], width=sizes["vision_width"],
        patch_size=sizes["vision_patch_size"],
    )  # fmt: skip
    text = dict(
        context_length=sizes["context_length"], vocab_size=sizes["vocab_size"], width=sizes["transformer_width"],
        heads=sizes["transformer_heads"], layers=sizes["transformer_layers"],
    )  # fmt: skip
    model = open_clip.model.CLIP(sizes["embed_dim"], vision, text, quick_gelu=sizes.get("quick_gelu", True))
    model.load_state_dict(state, strict=False)
    missing = set(state) ^ {k for k in model.state_dict() if k != "attn_mask"}
    if missing:
        raise ValueError(f"open_clip's model of these sizes has other keys: {sorted(missing)}")
    return model


def open_clip_task(model: Any, image: Tensor, text: Tensor) -> Callable[[], Tensor] | str:
    """The loss by open_clip's CLIPTask, compiled as ``--torchcompile-strategy task`` does it, or the reason why it is not here:
    PyPI's 3.3.0 has no tasks."""
    tasks: Any = imported("open_clip.task")
    if isinstance(tasks, str):
        return tasks
    model.output_dict = True  # what a task asks of its model; encode_image and encode_text do not know it
    task = tasks.CLIPTask(model, verbose=False).train()
    task.compile(target="task")
    return lambda: task({"image": image, "text": text})["loss"]


def of_op(op: str) -> dict[str, Callable | str]:
    """Who else computes an op: a function of the same arguments, or the reason why it is not here."""
    found: dict[str, Callable | str] = {}
    for name, (module, make) in RIVALS.get(op, {}).items():
        if not torch.cuda.is_available():
            found[name] = "measured on CUDA only"
            continue
        package = imported(module)
        try:
            found[name] = package if isinstance(package, str) else make(package)
        except AttributeError as error:  # another version of the package
            found[name] = f"{module}: {error}"
    return found


def _sdpa(backend: SDPBackend) -> Callable[[Any], Callable]:
    """PyTorch's attention by one of its kernels, as eager calls it."""

    def make(_: Any) -> Callable:
        def attention(**given: Any) -> Tensor:
            with sdpa_kernel([backend]):
                return OPS["attention"].spec.eager(**given)

        return attention

    return make


def _xformers(ops: Any) -> Callable:
    def attention(qkv: Tensor, heads: int, causal: bool = False, cu_seqlens: Tensor | None = None, max_length=None) -> Tensor:
        bias, masks = None, ops.fmha.attn_bias
        if cu_seqlens is not None:
            bias = _lengths(masks, cu_seqlens)
            bias = bias.make_causal() if causal else bias
        elif causal:
            bias = masks.LowerTriangularMask()
        x = qkv[None] if qkv.ndim == 2 else qkv
        q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias).flatten(2).view(*qkv.shape[:-1], -1)

    return attention


_MASKS: dict[int, Any] = {}


def _lengths(masks: Any, cu_seqlens: Tensor) -> Any:
    """xformers' mask of these lengths, made once: it wants them on the host."""
    if id(cu_seqlens) not in _MASKS:
        _MASKS[id(cu_seqlens)] = masks.BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist()), cu_seqlens
    return _MASKS[id(cu_seqlens)][0]


def _flash_attn(package: Any) -> Callable:
    """flash-attn 2, which takes the packed projection."""

    def attention(qkv: Tensor, heads: int, causal: bool = False, cu_seqlens: Tensor | None = None, max_length=None) -> Tensor:
        x = qkv.unflatten(-1, (3, heads, -1))
        if cu_seqlens is not None:
            out = package.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, max_length, causal=causal)
        else:
            out = package.flash_attn_qkvpacked_func(x if x.ndim == 5 else x[None], causal=causal)
        return out.reshape(*qkv.shape[:-1], -1)

    return attention


def _flash_attn_4(package: Any) -> Callable:
    def attention(qkv: Tensor, heads: int, causal: bool = False, cu_seqlens: Tensor | None = None, max_length=None) -> Tensor:
        x = qkv.unflatten(-1, (3, heads, -1))
        if cu_seqlens is not None:
            lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_length, max_seqlen_k=max_length)
            out = package.flash_attn_varlen_func(*x.unbind(-3), causal=causal, **lengths)
        else:
            out = package.flash_attn_func(*(x if x.ndim == 5 else x[None]).unbind(2), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).reshape(*qkv.shape[:-1], -1)

    return attention


def _added(norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable:
    """A layer norm without a residual, as a block calls it: the addition first."""

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5):
        s = x if residual is None else x + residual
        y = norm(s, weight, bias, eps)
        return y if residual is None else (y, s)

    return layer_norm


def _quack(module: Any) -> Callable:
    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            rows, gain = x.flatten(0, -2), weight.float()  # it wants gains in fp32
            y, rstd, mean = module.layernorm_fwd(rows, gain, bias.float(), eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(rows, gain, rstd, mean)
            ctx.dtype = weight.dtype
            return y.view_as(x)

        @staticmethod
        def backward(ctx, dy):
            rows, gain, rstd, mean = ctx.saved_tensors
            dx, dweight, dbias = module.layernorm_bwd(rows, gain, dy.contiguous().view_as(rows), rstd, mean)
            return dx.view_as(dy), dweight.to(ctx.dtype), dbias.to(ctx.dtype), None

    return _added(LayerNorm.apply)


def _quack_mlp(module: Any) -> Callable:
    """Without its search, which compiles every shape of tile: minutes."""

    def mlp(
        x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, quick_gelu: bool = True
    ) -> Tensor:
        act = "quick_gelu" if quick_gelu else "gelu_erf"
        return module.mlp_func(x, fc_weight, proj_weight, act, bias1=fc_bias, bias2=proj_bias, tuned=False)

    return mlp


_MLP = {"QuACK": ("quack.mlp", _quack_mlp)}
RIVALS: dict[str, dict[str, tuple[str, Callable[[Any], Callable]]]] = {
    "attention": {
        "SDPA flash": ("torch", _sdpa(SDPBackend.FLASH_ATTENTION)),
        "SDPA efficient": ("torch", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
        "SDPA cuDNN": ("torch", _sdpa(SDPBackend.CUDNN_ATTENTION)),
        "xformers": ("xformers.ops", _xformers),
        "flash-attn": ("flash_attn", _flash_attn),
        "flash-attn 4": ("flash_attn.cute", _flash_attn_4),
    },
    "fused_mlp": _MLP,
    "mlp": _MLP,
    "layer_norm": {
        "apex": (
            "apex.normalization.fused_layer_norm",
            lambda apex: _added(lambda x, w, b, eps: apex.fused_layer_norm_affine(x, w, b, x.shape[-1:], eps)),
        ),
        "Liger": ("liger_kernel.ops.layer_norm", lambda liger: _added(liger.LigerLayerNormFunction.apply)),
        "QuACK": ("quack.rmsnorm", _quack),
        "compiled": ("torch", lambda _: torch.compile(_added(lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, b, eps)))),
    },
}

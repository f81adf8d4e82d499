"""The image tower as a ResNet: three-convolution stem, antialiased strides, attention pooling (paper, section 2.4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.inputs.image import Preprocess
from clipfast.kernels import batch_norm, convolution, linear, pooling
from clipfast.model import scripted
from clipfast.model.pixels import Pixels
from clipfast.model.rule import untouched


def _unit(conv: Any, bn: Any, relu: Any, x: Tensor, shortcut: Callable[[], Tensor] | None = None) -> Tensor:
    """relu(bn(conv(x)) + shortcut()), where relu may be None: fused where nobody looks, else module by module as OpenAI's."""
    if not (untouched(conv, bn) and _known(bn)) or (relu is not None and not (type(relu) is nn.ReLU and untouched(relu))):
        y = bn(conv(x))
        if shortcut is not None:
            y += shortcut()
        return y if relu is None else relu(y)
    y, residual = _convolve(conv, x), None if shortcut is None else shortcut()
    if type(bn) is nn.Identity:  # folded into the convolution, whose gradient needs no output: in place
        y = y if residual is None else y.add_(residual)
        return y if relu is None else F.relu_(y)
    if not bn.training or bn.momentum is None or bn.num_batches_tracked is None:
        y = bn(y) if residual is None else bn(y) + residual
        return y if relu is None else F.relu(y)
    bn.num_batches_tracked.add_(1)
    return batch_norm(y, bn.weight, bn.bias, residual, relu is not None, bn.eps, bn.running_mean, bn.running_var, bn.momentum)


def _known(bn: Any) -> bool:
    """Whether it is folded, or a batch norm with gains and biases."""
    return type(bn) is nn.Identity or (type(bn) is nn.BatchNorm2d and bn.weight is not None and bn.bias is not None)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if conv.kernel_size == x.shape[-2:] == (1, 1):
        # The product of matrices that it is, on a CPU 2.4 × as fast (measured: an image of one place looks to oneDNN as if its
        # channels were planes, which it packs into blocks).
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # so that its gradient has the strides that DDP expects
        return linear(x.flatten(1), weight, conv.bias)[..., None, None]
    return convolution(x, conv.weight, conv.stride[0]) if conv.bias is None and _square(conv) else conv(x)


def _square(conv: nn.Conv2d) -> bool:
    """Whether it is what `convolution` computes: one stride, half of the kernel as padding, nothing dilated or grouped."""
    k = conv.kernel_size[0]
    return (
        k in (1, 3) and conv.kernel_size == (k, k) and conv.stride[0] == conv.stride[1] and conv.padding == (k // 2, k // 2)
        and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    )  # fmt: skip


def _fold(home: nn.Module, conv: str, bn: str) -> None:
    """Scale the convolution and give it a bias so that it does what the batch norm in eval mode does, which goes."""
    old, norm = getattr(home, conv), getattr(home, bn)
    if isinstance(norm, nn.Identity):
        return
    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        old.bias = nn.Parameter((norm.bias.double() - norm.running_mean.double() * scale).to(old.weight.dtype))
        weight = (old.weight.double() * scale[:, None, None, None]).to(old.weight.dtype)
        old.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
    old.requires_grad_(False)
    setattr(home, bn, nn.Identity())


class Bottleneck(nn.Module):
    """A ResNet-D bottleneck with average pooling before what would be a strided convolution (paper, section 2.4)."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        self.stride = stride
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(
                OrderedDict({"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(inplanes, 4 * planes, 1, bias=False),
                             "1": nn.BatchNorm2d(4 * planes)})
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = _unit(self.conv1, self.bn1, self.relu1, x)
        y = _unit(self.conv2, self.bn2, self.relu2, y)
        return _unit(self.conv3, self.bn3, self.relu3, self.avgpool(y), lambda: self._shortcut(x))

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.Bottleneck(self)

    def _shortcut(self, x: Tensor) -> Tensor:
        down = self.downsample
        if down is None:
            return x
        if not untouched(down) or type(down) is not nn.Sequential or len(down) != 3 or not untouched(*down):
            return down(x)
        pool, conv, bn = down
        return _unit(conv, bn, None, pool(x))


def map_tokens(pool: Any, x: Tensor) -> Tensor:
    """See ``AttentionPool2d.tokens``; pool: ours, or another library's with the same attributes."""
    x = x.flatten(2).transpose(1, 2)
    return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding.to(x.dtype)


def pooled_map(pool: Any, x: Tensor) -> Tensor:
    """x [B, C, h, w] -> [B, D], of a pool whose projections are untouched: one query, keys and values not formed."""
    x, (q, k, v, c) = map_tokens(pool, x), (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj)
    y = pooling(x, x[:, 0], q.weight, q.bias, k.weight, v.weight, v.bias, pool.num_heads)
    # The keys' bias cancels in the softmax; it still gets its gradient, zero, since DDP waits for every parameter's.
    return linear(y + 0 * k.bias, c.weight, c.bias)


class AttentionPool2d(nn.Module):
    """One layer of multi-head attention whose query is the mean of the feature map (paper, section 2.4)."""

    def __init__(self, spacial_dim: int, embed_dim: int, num_heads: int, output_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(spacial_dim**2 + 1, embed_dim) / embed_dim**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(3))
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.AttentionPool2d(self)

    def tokens(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, 1 + hw, C]: the mean and every place, with positions."""
        return map_tokens(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, D]."""
        q, k, v, c = self.q_proj, self.k_proj, self.v_proj, self.c_proj
        if untouched(q, k, v, c):
            return pooled_map(self, x)
        x = self.tokens(x).transpose(0, 1)  # as OpenAI's, which reads the projections' weights and calls none
        y, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], self.num_heads, None, torch.cat([q.bias, k.bias, v.bias]), None, None, False, 0.0,
            c.weight, c.bias, self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=q.weight, k_proj_weight=k.weight, v_proj_weight=v.weight,
        )  # fmt: skip
        return y.squeeze(0)


class ModifiedResNet(Pixels, nn.Module):
    """ResNet with a three-convolution stem, antialiased strides and attention pooling (paper, section 2.4)."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        output_dim: int,
        heads: int,
        input_resolution: int = 224,
        width: int = 64,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.preprocess = Preprocess(input_resolution)
        self.frozen_statistics = False  # whether batch norms stay in eval mode
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(channels, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes, strides = width * 2**i, [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = []
            for stride in strides:
                stage.append(Bottleneck(inplanes, planes, stride))
                inplanes = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool2d(input_resolution // 32, inplanes, heads, output_dim)
        # As the images, so that no call rearranges weights or their gradients: 3 % of a step of the demo.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fold_batch_norms(self) -> None:
        """Put every batch norm, as it is in eval mode, into the convolution before it: for inference, in place."""
        for module in [self, *(m for m in self.modules() if isinstance(m, Bottleneck))]:
            for i in (1, 2, 3):
                _fold(module, f"conv{i}", f"bn{i}")
            if isinstance(module, Bottleneck) and module.downsample is not None:
                _fold(module.downsample, "0", "1")

    def fits(self, channels: int, height: int, width: int) -> bool:
        """Whether images of that size have the channels and end in as many places as the attention pool has positions; parts
        that were replaced say so themselves."""
        halves: list[Any] = [
            getattr(next(stage.children(), None), "avgpool", None) for stage in (self.layer2, self.layer3, self.layer4)
        ]
        if (
            not untouched(self.conv1, *halves)
            or {*map(type, halves)} != {nn.AvgPool2d}
            or type(self.attnpool) is not AttentionPool2d
        ):
            return True
        places = [((side + 1) // 2) // 16 for side in (height, width)]
        return (
            channels == self.conv1.weight.shape[1] and places[0] * places[1] + 1 == self.attnpool.positional_embedding.shape[-2]
        )

    def stem(self, x: Tensor) -> Tensor:
        """x [B, 3, R, R] -> [B, width, R / 4, R / 4]."""
        x = x.type(self.conv1.weight.dtype)
        # Channels last: 1.5 × faster on a CPU, and what tensor cores want. (As a memory format, vmap does not know it.)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        x = _unit(self.conv1, self.bn1, self.relu1, x)
        x = _unit(self.conv2, self.bn2, self.relu2, x)
        return self.avgpool(_unit(self.conv3, self.bn3, self.relu3, x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.stem(x))
        x = self.layer4(self.layer3(self.layer2(x)))
        return self.attnpool(x)

    def __prepare_scriptable__(self) -> nn.Module:
        return scripted.ModifiedResNet(self)

    # ---- open_clip's calls

    @property
    def image_size(self) -> int:
        return self.input_resolution

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """No gradients; ``freeze_bn_stats``: batch norms stay in eval mode."""
        if unlocked_groups:
            raise ValueError(f"lock: expected unlocked_groups 0 for a ResNet, got {unlocked_groups}")
        self.requires_grad_(False)
        self.frozen_statistics = freeze_bn_stats
        self.train(self.training)

    def train(self, mode: bool = True) -> ModifiedResNet:
        super().train(mode)
        for module in self.modules() if self.frozen_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing: a second pass would move the batch statistics twice."""

    def no_weight_decay(self) -> set[str]:
        return set()

"""The image tower as a ResNet: three-convolution stem, antialiased strides, attention pooling (paper, section 2.4)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.kernels import batch_norm, convolution, linear, pooling


def _batch_norm(bn: Any, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """relu(bn(x) + residual), in one pass where the module is plain batch norm in training."""
    if isinstance(bn, nn.Identity):  # folded into the convolution, whose gradient needs no output: in place
        y = x if residual is None else x.add_(residual)
        return F.relu_(y) if relu else y
    if not bn.training or type(bn) is not nn.BatchNorm2d or bn.momentum is None or bn.num_batches_tracked is None:
        y = bn(x) if residual is None else bn(x) + residual
        return F.relu(y) if relu else y
    bn.num_batches_tracked.add_(1)
    return batch_norm(x, bn.weight, bn.bias, residual, relu, bn.eps, bn.running_mean, bn.running_var, bn.momentum)


def _convolve(conv: Any, x: Tensor) -> Tensor:
    """A convolution of this file; what a user put in its place runs itself."""
    if type(conv) is not nn.Conv2d:
        return conv(x)
    if conv.kernel_size == x.shape[-2:] == (1, 1):
        # The product of matrices that it is, on a CPU 2.4 × as fast (measured: an image of one place looks to oneDNN as if its
        # channels were planes, which it packs into blocks).
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # so that its gradient has the strides that DDP expects
        return linear(x.flatten(1), weight, conv.bias)[..., None, None]
    return convolution(x, conv.weight, conv.stride[0]) if conv.bias is None else conv(x)


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

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(
                OrderedDict({"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(inplanes, 4 * planes, 1, bias=False),
                             "1": nn.BatchNorm2d(4 * planes)})
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = _batch_norm(self.bn1, _convolve(self.conv1, x))
        y = _batch_norm(self.bn2, _convolve(self.conv2, y))
        if self.downsample is not None:
            pool, conv, bn = self.downsample
            x = _batch_norm(bn, _convolve(conv, pool(x)), relu=False)
        return _batch_norm(self.bn3, _convolve(self.conv3, self.avgpool(y)), x)


class AttentionPool(nn.Module):
    """One layer of multi-head attention whose query is the mean of the feature map (paper, section 2.4)."""

    def __init__(self, side: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, output_dim)

    def tokens(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, 1 + hw, C]: the mean and every place, with positions."""
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        y = pooling(x, x[:, 0], q.weight, q.bias, k.weight, v.weight, v.bias, self.heads)
        # The bias of the keys cancels in the softmax; it still gets its gradient, zero, since DDP waits for every parameter's.
        return linear(y + 0 * k.bias, self.c_proj.weight, self.c_proj.bias)


class ModifiedResNet(nn.Module):
    """ResNet with a three-convolution stem, antialiased strides and attention pooling (paper, section 2.4)."""

    def __init__(self, layers: tuple[int, ...], output_dim: int, heads: int, input_resolution: int, width: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inplanes = width
        for i, blocks in enumerate(layers):
            planes, strides = width * 2**i, [1 if i == 0 else 2] + [1] * (blocks - 1)
            stage = []
            for stride in strides:
                stage.append(Bottleneck(inplanes, planes, stride))
                inplanes = 4 * planes
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(input_resolution // 32, inplanes, heads, output_dim)
        # As the images, so that no call rearranges weights or their gradients: 3 % of a step of the demo.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fold_batch_norms(self) -> None:
        """Put every batch norm, as it is in eval mode, into the convolution before it: for inference, in place."""
        for module in [self, *(m for m in self.modules() if isinstance(m, Bottleneck))]:
            for i in (1, 2, 3):
                _fold(module, f"conv{i}", f"bn{i}")
            if isinstance(module, Bottleneck) and module.downsample is not None:
                _fold(module.downsample, "0", "1")

    def states(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, R, R] -> the feature map [B, C, h, w] after each of the four stages."""
        x = x.contiguous(memory_format=torch.channels_last)  # 1.5 × faster on a CPU, and what tensor cores want
        for i in (1, 2, 3):
            x = _batch_norm(getattr(self, f"bn{i}"), _convolve(getattr(self, f"conv{i}"), x))
        x = F.avg_pool2d(x, 2)
        states = []
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
            states.append(x)
        return states

    def forward(self, x: Tensor) -> Tensor:
        return self.attnpool(self.states(x)[-1])

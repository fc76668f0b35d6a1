"""ResNet-18 and ViT as the paper trains them, at any width. Nothing in them knows of muP but the attention's scale.

Their muP² groups come from mup2_fused.param_groups and a second model at the base width. `readout` is the class of the
last layer: nn.Linear, or mup.MuReadout for the `mup` package.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, c_in, h, w) -> (B, c_out, h / stride, w / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride > 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18: (B, channels, h, w) -> (B, classes).

    width: channels of the first stage; the later ones have 2, 4 and 8 times as many. 64 is width multiplier 1.
    small_images: the stem is one 3x3 convolution. Otherwise it is the original one, a 7x7 convolution and pooling, each
    of which halves the images, so that everything takes a sixteenth of the time.
    """

    def __init__(
        self,
        width: int = 64,
        classes: int = 10,
        channels: int = 3,
        readout: Callable[..., nn.Module] = nn.Linear,
        small_images: bool = True,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.stem = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        stages = (
            nn.Sequential(Block(c_in, c_out, stride), Block(c_out, c_out, 1))
            for (c_in, c_out), stride in zip(pairwise(sizes), (1, 2, 2, 2))
        )
        self.stages = nn.Sequential(*stages)
        self.head = readout(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.pool(F.relu(self.norm(self.stem(x)))))  # (B, 8 width, h / 8, w / 8) for small images
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention: (B, T, width) -> (B, T, width).

    base_head_dim: None scales the logits by 1 / sqrt(d), d = width / heads. muP scales them by 1 / d, because keys and
    queries become correlated in training: sqrt(base_head_dim) / d, which is the same at the base width.
    """

    def __init__(self, width: int, heads: int, base_head_dim: int | None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the {heads} heads")
        d = width // heads
        self.heads, self.scale = heads, d**-0.5 if base_head_dim is None else base_head_dim**0.5 / d
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (B, heads, T, d)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, each after a LayerNorm and beside a shortcut: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, base_head_dim: int | None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, base_head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer with a class token: (B, channels, *image) -> (B, classes).

    image, patch: (height, width) in pixels; a number stands for a square. ViT-S has width 384.
    base_head_dim: as in Attention; None is the standard scale.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        heads: int = 12,
        image: int | tuple[int, int] = 32,
        patch: int | tuple[int, int] = 4,
        classes: int = 100,
        channels: int = 3,
        base_head_dim: int | None = None,
        readout: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        (height, breadth), (p, q) = ((n, n) if isinstance(n, int) else n for n in (image, patch))
        if height % p or breadth % q:
            raise ValueError(f"an image of {height} x {breadth} pixels cannot be cut into patches of {p} x {q}")
        self.patches = nn.Conv2d(channels, width, (p, q), stride=(p, q))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (height // p) * (breadth // q) + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads, base_head_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = readout(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, T, width)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


@torch.no_grad()
def zero_queries_(model: nn.Module) -> None:
    """Start with uniform attention: its logits at initialization are then the same at every width."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.query.weight.zero_()
            module.query.bias.zero_()

"""What step_time.py measures: the shapes of well-known models' parameters, and implementations of SAM."""

import importlib
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from experiments.networks import ResNet18

Shapes = list[tuple[int, ...]]


def mlp(*sizes: int, bias: bool) -> Shapes:
    """Linear layers between these numbers of features."""
    return [shape for m, n in pairwise(sizes) for shape in ([(n, m), (n,)] if bias else [(n, m)])]


def resnet18(width: int = 1) -> Shapes:
    """For 1000 classes. width: factor on the channels of every layer."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in ResNet18(64 * width, 1000, small_images=False).parameters()]


def vit(d: int, patch: int = 16, blocks: int = 12) -> Shapes:
    """For images of 224 x 224 and 1000 classes."""

    def linear(n: int, m: int) -> Shapes:
        return [(n, m), (n,)]

    norm = [(d,), (d,)]
    block = norm + linear(3 * d, d) + linear(d, d) + norm + linear(4 * d, d) + linear(d, 4 * d)
    tokens = (224 // patch) ** 2 + 1
    return [(1, 1, d), (1, tokens, d), (d, 3, patch, patch), (d,), *blocks * block, *norm, *linear(1000, d)]


def count(shapes: Shapes) -> int:
    """Number of parameters."""
    return sum(map(prod, shapes))


MODELS = {
    "mlp-tiny": mlp(784, 64, 64, 10, bias=True),
    "mlp-4096": mlp(3072, 4096, 4096, 10, bias=False),  # the paper's, for CIFAR-10
    "resnet18": resnet18(),
    "resnet18-w4": resnet18(4),
    "vit-s16": vit(384),
    "vit-b16": vit(768),
}
assert [count(MODELS[m]) for m in ("resnet18", "vit-s16", "vit-b16")] == [11_689_512, 22_050_664, 86_567_656]
assert len(MODELS["resnet18"]) == 62


class Foreach:
    """Plain SAM in torch._foreach_* operations, around torch's fused optimizers.

    compiled: both calls are compiled by torch.compile, with the base optimizer's foreach implementation.
    """

    def __init__(self, params: list[Tensor], base: type, *, rho: float, compiled: bool = False, **kwargs) -> None:
        # On the CPU in bfloat16 torch's fused SGD leaves most weights as they are (pytorch issue 191763).
        fused = not compiled and (params[0].is_cuda or params[0].dtype == torch.float32)
        self.base = base(params, fused=fused, foreach=not fused, **kwargs)
        self.params, self.rho = params, rho
        self.backups = [torch.empty_like(p, requires_grad=False) for p in params]
        if compiled:
            self.first_step = torch.compile(self.first_step, dynamic=False)
            self.second_step = torch.compile(self.second_step, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        scale = self.rho / (norm + 1e-12)
        torch._foreach_copy_(self.backups, self.params)
        if scale.is_cuda or torch.compiler.is_compiling():  # item() would wait for the GPU, or split the compiled graph
            torch._foreach_add_(self.params, torch._foreach_mul(grads, scale))
        else:
            torch._foreach_add_(self.params, grads, alpha=scale.item())

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.backups)
        self.base.step()


def from_package(name: str, *args, **kwargs) -> torch.optim.Optimizer:
    """The package's SAM. It is imported here, because a package that is missing is only left out."""
    return importlib.import_module(name).SAM(*args, **kwargs)


OURS = "mup2_fused"
IMPLEMENTATIONS = {
    OURS: partial(from_package, OURS, backend="compiled"),
    "torch backend": partial(from_package, OURS, backend="torch"),
    "mup2_ref": partial(from_package, "mup2_ref"),
    "foreach": Foreach,
    "foreach-compiled": partial(Foreach, compiled=True),
    "pytorch_optimizer": partial(from_package, "pytorch_optimizer"),
}

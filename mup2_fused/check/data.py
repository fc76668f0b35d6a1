"""Random data for models that come without a loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mup2_fused.user_code import Loss

SEEN = 8192  # inputs of a sample, or different tokens, that the teacher sees at most: for all it may need gigabytes


def random_data(model: nn.Module, shape: tuple[int, ...] | None, vocabulary: int | None, batch: int, seed: int) -> Loss:
    """Cross entropy on random inputs. A random linear teacher makes the labels, so that there is something to learn.

    shape: of one sample; None: guessed from the first layer. vocabulary: inputs are token numbers below it.
    Raises ValueError if the shape cannot be guessed; the loss does so for models that are no classifiers.
    """
    guessed_shape, guessed_vocabulary = _guess(model)
    shape, vocabulary = shape or guessed_shape, vocabulary or guessed_vocabulary
    if shape is None:
        raise ValueError(
            "cannot guess what the inputs look like: pass --input, or let the factory return (model, loss)"
        )
    p = next(model.parameters())
    g = torch.Generator().manual_seed(seed)
    if vocabulary:
        x = torch.randint(vocabulary, (batch, *shape), generator=g)
        features = F.one_hot(x % SEEN, min(vocabulary, SEEN)).float()
    else:
        x = torch.randn(batch, *shape, generator=g)
        features = x.flatten(1)
        features = features[:, :: math.ceil(features.shape[1] / SEEN)]
    teacher = torch.randn(features.shape[-1], 4096, generator=g)
    x = x.to(p.device, None if vocabulary else p.dtype)

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        out = out.logits if hasattr(out, "logits") else out
        _require_classes(out, features.ndim)
        signal = features if out.ndim == features.ndim else features.mean(1)  # one label for a whole sequence
        labels = (signal @ teacher[:, : out.shape[-1]]).argmax(-1).to(out.device)
        return F.cross_entropy(out.flatten(0, -2).float(), labels.flatten())

    return loss


def _guess(model: nn.Module) -> tuple[tuple[int, ...] | None, int | None]:
    """(shape of a sample, vocabulary) as the model's first layer takes them."""
    for m in model.modules():
        if isinstance(m, nn.Embedding):
            return (16,), m.num_embeddings
        if isinstance(m, nn.modules.conv._ConvNd):
            return (m.in_channels, *[32] * len(m.kernel_size)), None
        if isinstance(m, nn.Linear):
            return (m.in_features,), None
    return None, None


def _require_classes(out: Any, dimensions: int) -> None:
    if not isinstance(out, Tensor) or out.ndim not in (2, dimensions) or out.shape[-1] < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            "random data are for classifiers, with an output (batch, classes) or, for tokens, (batch, length, "
            f"classes), not {got}: let the factory return (model, loss)"
        )

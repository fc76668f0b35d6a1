"""mup2_ref.train_epoch with the whole iteration, both passes and the update, captured as one CUDA graph."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import mup2_fused
import mup2_ref

Batch = tuple[Tensor, Tensor]


def training(
    model: nn.Module, optimizer: mup2_fused.SAM, example: Batch, *, scheduler: Any = None, **options: Any
) -> Callable[[Iterable[Batch]], Tensor]:
    """train_epoch(model, optimizer, batches, scheduler=scheduler, **options) as a function of batches alone.

    example: a batch on the GPU, for capturing alone; batches of its size are replayed, others train without the graph.
    The host never waits for the device. scheduler: made before this, as learning rates become tensors. options: those
    of train_epoch, without a GradScaler. Raises what capture() raises.
    """

    def step(x: Tensor, y: Tensor) -> Tensor:
        return mup2_ref.train_epoch(model, optimizer, [(x, y)], **options)

    replay, size = mup2_fused.capture(step, model, optimizer, *example), len(example[1])

    def epoch(batches: Iterable[Batch]) -> Tensor:
        losses = []
        for x, y in batches:
            losses.append((replay if len(y) == size else step)(x, y).clone())  # the next replay overwrites it
            if scheduler is not None:
                scheduler.step()
        if not losses:
            raise ValueError("no batches: is the data set smaller than a batch, or the iterator used up?")
        return torch.stack(losses).mean()

    return epoch

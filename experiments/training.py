"""What all experiments share: the training loop, precision and devices."""

import functools
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mup2_fused as mup2
from experiments.commands import SettingsError

Batch = tuple[Tensor, Tensor]  # inputs, labels
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("auto", "compiled", "torch")  # of mup2.SAM


class Epoch(NamedTuple):
    """What one epoch gave. Losses and accuracy are over all processes."""

    train_loss: float  # mean over batches, at the weights w
    test_loss: float  # mean over test samples
    test_accuracy: float  # in %
    seconds: float  # of training, without the evaluation


class Training:
    """Trains a model for one epoch after another, and evaluates it after each of them.

    model: on its device, or wrapped in DistributedDataParallel. optimizer: SAM or any torch optimizer.
    scheduler: steps after every batch. autocast, scaler: as precision() makes them.
    example: a batch on the GPU. If it is given, whole iterations are captured as one CUDA graph: batches of its size
    replay the graph, others train without it, and the host never waits for the device. This takes mup2.SAM without a
    GradScaler, and a scheduler that was made before, as learning rates become tensors. Raises what mup2.capture raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Any = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        example: Batch | None = None,
        **options: Any,  # loss_function and scaler of mup2.train_epoch
    ) -> None:
        self.model, self.autocast, self.scheduler = model, autocast, scheduler
        self.train = functools.partial(mup2.train_epoch, model, optimizer, autocast=autocast, **options)
        self.replay, self.captured_size = None, 0
        if example is not None:
            self.replay = mup2.capture(lambda x, y: self.train([(x, y)]), model, optimizer, *example)
            self.captured_size = len(example[1])

    def train_epoch(self, batches: Iterable[Batch]) -> Tensor:
        """The mean loss of the batches, a scalar on the device. ValueError if there are none."""
        if self.replay is None:
            return self.train(batches, scheduler=self.scheduler)
        losses = []
        for x, y in batches:
            step = self.replay if len(y) == self.captured_size else lambda x, y: self.train([(x, y)])
            losses.append(step(x, y).clone())  # the next replay overwrites the loss
            if self.scheduler is not None:
                self.scheduler.step()
        if not losses:
            raise ValueError("no batches: is the data set smaller than a batch, or the iterator used up?")
        return torch.stack(losses).mean()

    def epoch(self, batches: Iterable[Batch], test: Iterable[Batch]) -> Epoch:
        """Train and evaluate. Every process of a group calls it, with its own part of the batches."""
        start = time.perf_counter()
        loss = summed(self.train_epoch(batches)).item() / processes()[1]
        seconds = time.perf_counter() - start
        return Epoch(loss, *self.evaluate(test), seconds)

    def evaluate(self, test: Iterable[Batch]) -> tuple[float, float]:
        """The loss and the accuracy in % of all processes' test samples. Every process of a group calls it."""
        model = getattr(self.model, "module", self.model)  # inside DistributedDataParallel
        if dist.is_initialized():
            for buffer in model.buffers():  # each process has seen other batches; the first one's statistics count
                dist.broadcast(buffer, 0)
        test_loss, correct, samples = summed(mup2.evaluate(model, test, self.autocast)).tolist()
        return test_loss / samples, 100 * correct / samples


def precision(device: str, amp: str) -> tuple[Callable[[], AbstractContextManager], torch.amp.GradScaler]:
    """autocast and scaler. amp: a key of AMP."""
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=amp == "fp16")
    # A weight is cast once per pass anyway, and torch asks for no cache where a CUDA graph is captured.
    autocast = functools.partial(torch.autocast, kind, AMP[amp], cache_enabled=False)
    return autocast if AMP[amp] else nullcontext, scaler


def processes() -> tuple[int, int]:
    """(rank, how many): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(x: Tensor) -> Tensor:
    """Over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def check_device(device: str) -> None:
    """Raises SettingsError if this machine does not have the device."""
    if is_cuda(device) and not torch.cuda.is_available():
        raise SettingsError(f"--device {device}: torch {torch.__version__} sees no GPU")


def has_kernels(device: str) -> bool:
    """Whether mup2.SAM is compiled for this device."""
    return mup2.built_with_cuda if is_cuda(device) else mup2.compiled


def device_name(device: str) -> str:
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"CPU {found[1] if found else 'unknown'}"

"""What all experiments share: the training loop, precision, devices, errors of commands, and files of runs.

Files are written as a whole or not at all. A folder can be locked for one process at a time.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mup2_fused as mup2

Batch = tuple[Tensor, Tensor]  # inputs, labels
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("auto", "compiled", "torch")  # of mup2.SAM


class SettingsError(Exception):
    """The command asks for something that cannot be done. The message says why."""


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
        model = getattr(self.model, "module", self.model)  # inside DistributedDataParallel
        if dist.is_initialized():
            for buffer in model.buffers():  # each process has seen other batches; the first one's statistics count
                dist.broadcast(buffer, 0)
        test_loss, correct, samples = summed(mup2.evaluate(model, test, self.autocast)).tolist()
        return Epoch(loss, test_loss / samples, 100 * correct / samples, seconds)


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


def at_least(low: float, kind: type) -> Callable[[str], Any]:
    """The type of a flag whose values are finite numbers from low on."""

    def number(text: str) -> Any:
        if not low <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    return number


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    """The file is there as a whole or as it was before, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time; the lock ends with the process. Raises SettingsError if another one has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another process is busy with {path.parent}") from None
        yield

"""Training loops, and what a model needs around the two passes of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mup2_ref

Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """The model's buffers are afterwards what they were before. Put it around the second pass, for batch norm.

    Running statistics and counters then come from the weights w alone, also those of custom or synchronized
    normalization, while batches are normalized as ever. Buffers keep their addresses. The context may be nested.
    """
    saved = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in saved:
                target, source = buffer, before
                if buffer.layout == torch.strided:
                    once = tuple(slice(None if stride else 1) for stride in buffer.stride())  # of an expanded buffer
                    target, source = buffer[once], before[once]
                target.copy_(source)
                module._buffers[name] = buffer  # some modules assign a new tensor instead of changing this one


def random_states(groups: list[dict[str, Any]]) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """(setter, state) of the random number generators of the CPU and of the parameters' GPUs."""
    gpus = {p.device for group in groups for p in group["params"] if p.is_cuda}
    states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
    return states + [(partial(torch.cuda.set_rng_state, device=d), torch.cuda.get_rng_state(d)) for d in gpus]


def accumulate(
    model: nn.Module,
    micro_batches: Batches,
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    synchronize: bool = True,
) -> Tensor:
    """Add the gradient of the mean loss over all samples of some micro-batches to .grad, and return that loss.

    loss_function: a mean over samples. This is one pass of SAM, for a batch that does not fit in memory:

        def closure():
            opt.zero_grad()
            return accumulate(model, micro_batches)

    DistributedDataParallel exchanges gradients once, in the last micro-batch. With synchronize=False it does not
    exchange them at all: in the first pass, each process then climbs by its own gradient (m-sharpness, Foret et al.
    2021). ValueError if there are no samples.
    """
    micro_batches = [(x, y) for x, y in micro_batches if len(y)]  # the mean over no samples is not a number
    if not micro_batches:
        raise ValueError(
            "no micro-batches, or only empty ones: give accumulate() at least one sample, and a list rather than an "
            "iterator, which the first pass uses up"
        )
    samples = sum(len(y) for _, y in micro_batches)
    total: Any = 0.0
    for i, (x, y) in enumerate(micro_batches, 1):
        exchanged = synchronize and i == len(micro_batches)
        with nullcontext() if exchanged else getattr(model, "no_sync", nullcontext)():
            loss = loss_function(model(x), y) * (len(y) / samples)  # forward inside: DDP prepares the exchange there
            loss.backward()
        total = total + loss.detach()
    return total


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    scheduler: Any = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
    ascent_samples: int | None = None,
) -> Tensor:
    """One epoch; returns the mean over batches of each step's first loss, a scalar on the device.

    optimizer: any torch optimizer whose step() needs no closure. This package's SAM and mup2_ref.SAM get the passes
    that they need for each batch. batches: (inputs, targets). scheduler: steps after every batch. autocast: context for
    the forward passes, such as partial(torch.autocast, "cuda", torch.bfloat16). scaler: a GradScaler, for float16; not
    with mup2_ref.SAM.
    ascent_samples: this package's SAM takes the first pass over so many samples of each batch. The model's buffers,
    such as batch norm statistics, then come from the second pass, which takes all of them.
    ValueError without batches, and where ascent_samples has no first pass.
    """
    sam: Any = optimizer if hasattr(optimizer, "climbs") else None
    if ascent_samples is not None and (ascent_samples < 1 or sam is None or sam.moments):
        raise ValueError("ascent_samples is 1 or more, and takes this package's SAM with ascent='gradient'")
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    losses = []
    model.train()
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)

        def backward(samples: int | None = None) -> Tensor:
            optimizer.zero_grad()
            with autocast():
                loss = loss_function(model(x[:samples]), y[:samples])
            scaler.scale(loss).backward()
            return loss.detach()

        def ascent() -> Tensor:
            with frozen_buffers(model) if ascent_samples else nullcontext():
                return backward(ascent_samples)

        if isinstance(optimizer, mup2_ref.SAM):
            losses.append(optimizer.step(backward))
        else:
            losses.append(backward() if sam is None else passes(sam, backward, ascent))
            scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
    if not losses:
        raise ValueError("no batches: is the data set smaller than a batch, or the iterator used up?")
    return torch.stack(losses).mean()


def passes(optimizer: Any, backward: Callable[[], Any], ascent: Callable[[], Any]) -> Any:
    """The passes of one step, without its update; returns the first loss. The weights are at w again if one fails.

    backward: a pass over the batch. ascent: the pass before SAM climbs.
    """
    random = random_states(optimizer.param_groups) if optimizer.same_randomness else []
    try:
        if optimizer.moments:
            optimizer.first_step()
            return backward()
        loss = ascent() if optimizer.climbs else backward()
        if optimizer.first_step():
            for set_state, state in random:
                set_state(state)
            backward()
        return loss
    except BaseException:
        optimizer.restore()
        raise


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, autocast: Callable[[], AbstractContextManager] = nullcontext
) -> Tensor:
    """(cross entropy, correct predictions, labels), each summed over all samples, as one tensor on the device.

    The model is in eval mode afterwards.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with autocast():
            f = model(x)
        loss = F.cross_entropy(mup2_ref.wide(f), y, reduction="sum")
        sums += torch.stack([loss.double(), (f.argmax(1) == y).sum().double(), loss.new_tensor(y.numel()).double()])
    return sums

"""A whole SAM iteration, two forward-backward passes and the update, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mup2_fused.compiled_passes import CompiledPasses, kernel_of
from mup2_fused.optimizer import SAM


def capture(
    step: Callable[..., Any], model: nn.Module, optimizer: SAM, *inputs: Tensor, warmup: int = 3
) -> Callable[..., Any]:
    """Record step(*inputs), one iteration with optimizer.step(closure) or both steps, as a CUDA graph.

    Returns a function that replays the graph. It takes tensors of the shapes and types of inputs, copies them to where
    the graph reads them, and returns what step returned: tensors that the next call overwrites. step must not look at
    values on the host (no .item(), no print) nor depend on anything else that changes. Learning rates become float32
    tensors on the GPU, which schedulers change in place; rho, momentum and the other settings are fixed from here on.
    Load checkpoints and make schedulers before.

    step runs warmup times and once more to be captured, twice if the optimizer has an interval: a graph for SAM steps,
    and one for steps without SAM. What these runs do to weights, buffers, state, skipped_steps and random numbers is
    undone, also if one fails. Nothing else is undone, such as the scale of a GradScaler.
    TypeError if the optimizer has no compiled passes. ValueError for a base other than SGD, Adam and AdamW, for
    amsgrad, hooks of the base, same_randomness, dampening before the first step, and inputs that are not on a GPU.
    RuntimeError between the passes.
    """
    check(optimizer, inputs, warmup)
    static = [x.clone() for x in inputs]
    device = static[0].device
    stream = torch.cuda.Stream(device)  # capturing needs a stream of its own, on which memory was allocated before
    graphs = []  # (graph, what step returned): of a SAM step, and of a step without SAM if there is an interval
    with undone(model, optimizer, device):
        for steps in range(min(optimizer.interval, 2)):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(warmup):
                    optimizer.phase.steps = steps
                    step(*static)
            torch.cuda.current_stream(device).wait_stream(stream)
            optimizer.zero_grad()  # so that gradients lie in the graph's own memory
            optimizer.phase.steps = steps
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                graphs.append((graph, step(*static)))

    lrs = [group["lr"] for group in optimizer.param_groups]
    passes: Any = optimizer.passes
    memory = (model, step, passes.memory(), [value for _, _, value in state_of(optimizer)])

    def replay(*inputs: Tensor) -> Any:
        _ = memory  # the graph uses it, and so it must live as long as this function
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in static]:
            expected = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in static)
            raise ValueError(f"the captured step takes {expected}: run the uncaptured one for other batches")
        groups = optimizer.param_groups
        if len(groups) != len(lrs) or any(group["lr"] is not lr for group, lr in zip(groups, lrs)):
            raise RuntimeError(
                "groups have been added, or learning rates replaced by load_state_dict() or by hand: capture again"
            )
        optimizer.require_restored("the captured step")
        for target, x in zip(static, inputs):
            target.copy_(x, non_blocking=True)
        graph, outputs = graphs[0 if optimizer.climbs else 1]
        graph.replay()
        optimizer.phase.steps += 1
        return outputs

    return replay


@contextmanager
def undone(model: nn.Module, optimizer: SAM, device: torch.device) -> Iterator[None]:
    """Learning rates are tensors on the device inside, and afterwards; numbers again if it fails.

    Weights, buffers, state, skipped_steps and random numbers are afterwards what they were before. Addresses stay.
    """
    lrs, skipped = [group["lr"] for group in optimizer.param_groups], optimizer.skipped_steps
    steps = optimizer.phase.steps
    before = [(t, t.detach().clone()) for t in chain(model.parameters(), model.buffers())]
    state = {(p, key): value.clone() for p, key, value in state_of(optimizer)}
    generator = torch.cuda.get_rng_state(device)
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
        yield
    except BaseException:
        optimizer.zero_grad()
        for group, lr in zip(optimizer.param_groups, lrs):
            group["lr"] = lr
        raise
    finally:
        optimizer.restore()
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
            for p, key, value in state_of(optimizer):
                value.copy_(state[p, key]) if (p, key) in state else value.zero_()
        optimizer.skipped_steps, optimizer.phase.steps = skipped, steps
        torch.cuda.set_rng_state(generator, device)


def check(optimizer: SAM, inputs: tuple[Tensor, ...], warmup: int) -> None:
    """The errors of capture()."""
    if not isinstance(optimizer, SAM) or not isinstance(optimizer.passes, CompiledPasses):
        raise TypeError(f"capture needs SAM(backend='compiled'), as others wait for the host, but got: {optimizer!r}")
    if optimizer.phase.backups:
        raise RuntimeError("weights are perturbed: call second_step() or restore() before capture()")
    groups = optimizer.param_groups
    if not kernel_of(optimizer.base_optimizer) or any(group.get("amsgrad") for group in groups):
        name = type(optimizer.base_optimizer).__name__
        raise ValueError(f"{name} waits for the host: only SGD, Adam and AdamW without amsgrad and hooks do not")
    if optimizer.same_randomness:
        raise ValueError("same_randomness reads the state of the random numbers on the host: it cannot be captured")
    new = [p for group in groups for p in group["params"] if p not in optimizer.state]
    if new and any(group.get("momentum") and group.get("dampening") for group in groups):
        raise ValueError("with dampening the first update differs from the others: take one step before capture()")
    if warmup < 1 or not inputs or not all(x.is_cuda for x in inputs):
        raise ValueError("capture needs at least one input, all of them on the GPU, and one run of step for warming up")


def state_of(optimizer: SAM) -> list[tuple[Tensor, str, Tensor]]:
    """(parameter, key, value) of all tensors in the optimizer's state."""
    return [(p, k, v) for p, own in optimizer.state.items() for k, v in own.items() if torch.is_tensor(v)]

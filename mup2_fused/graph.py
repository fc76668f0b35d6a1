"""A whole SAM iteration, two forward-backward passes and the update, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mup2_fused import SAM


def capture(
    step: Callable[..., Any], model: nn.Module, optimizer: SAM, *inputs: Tensor, warmup: int = 3
) -> Callable[..., Any]:
    """step(*inputs), one iteration with optimizer.step(closure) or both steps, as a function that replays it on a GPU.

    The function takes tensors of the shapes and types of inputs, copies them to where the graph reads them, and returns
    what step returned: tensors that the next call overwrites. step must not look at values on the host (no .item(), no
    print) nor depend on anything else that changes. Learning rates become float32 tensors on the GPU, which schedulers
    change in place; rho, momentum and the other settings are fixed from here on. Load checkpoints and make schedulers
    before.

    step runs warmup times and is captured, and what that did to weights, buffers, state, skipped_steps and random
    numbers is undone, also if it fails. What else step changes is not, such as the scale of a GradScaler.
    Raises TypeError if the optimizer is not of this package, ValueError if its base is not SGD, Adam or AdamW or inputs
    are not on a GPU, and RuntimeError between the passes.
    """
    _check(optimizer, inputs, warmup)
    lrs = [group["lr"] for group in optimizer.param_groups]
    skipped_steps = optimizer.skipped_steps
    before = [(t, t.detach().clone()) for t in chain(model.parameters(), model.buffers())]
    state = {(p, key): value.clone() for p, key, value in _state(optimizer)}
    static = [x.clone() for x in inputs]
    device = static[0].device
    generator = torch.cuda.get_rng_state(device)
    graph, captured = torch.cuda.CUDAGraph(), False
    stream = torch.cuda.Stream(device)  # capturing needs one of its own, and allocations to have been made on it
    try:
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                step(*static)
        torch.cuda.current_stream(device).wait_stream(stream)
        optimizer.zero_grad()  # so that gradients lie in the graph's own memory
        with torch.cuda.graph(graph, stream=stream):
            outputs = step(*static)
        captured = True
    finally:
        optimizer.restore()
        with torch.no_grad():
            for t, value in before:
                t.copy_(value)
            for p, key, value in _state(optimizer):
                value.copy_(state[p, key]) if (p, key) in state else value.zero_()
        optimizer.skipped_steps = skipped_steps
        torch.cuda.set_rng_state(generator, device)
        if not captured:
            optimizer.zero_grad()
            for group, lr in zip(optimizer.param_groups, lrs):
                group["lr"] = lr

    lrs = [group["lr"] for group in optimizer.param_groups]
    memory = (model, step, optimizer._plan.memory(), [value for _, _, value in _state(optimizer)])

    def replay(*inputs: Tensor) -> Any:
        _ = memory  # which the graph uses: it lives as long as this function
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in static]:
            expected = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in static)
            raise ValueError(f"the captured step takes {expected}: run the uncaptured one for other batches")
        if any(group["lr"] is not lr for group, lr in zip(optimizer.param_groups, lrs)):
            raise RuntimeError("learning rates have been replaced, by load_state_dict() or by hand: capture again")
        for target, x in zip(static, inputs):
            target.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    return replay


def _check(optimizer: SAM, inputs: tuple[Tensor, ...], warmup: int) -> None:
    if not isinstance(optimizer, SAM):
        raise TypeError(f"capture needs a mup2_fused.SAM, as every other optimizer waits for the host: {optimizer!r}")
    optimizer._require_restored("capture()")
    groups = optimizer.param_groups
    if not optimizer._has_kernel() or any(group.get("amsgrad") for group in groups):
        name = type(optimizer.base_optimizer).__name__
        raise ValueError(f"{name} waits for the host: only SGD, Adam and AdamW without amsgrad and hooks do not")
    if optimizer.same_randomness:
        raise ValueError("same_randomness reads the state of the random numbers on the host: it cannot be captured")
    new = [p for group in groups for p in group["params"] if p not in optimizer.state]
    if new and any(group.get("momentum") and group.get("dampening") for group in groups):
        raise ValueError("with dampening the first update differs from the others: take one step before capture()")
    if warmup < 1 or not inputs or not all(map(_on_gpu, inputs)):
        raise ValueError("capture needs at least one input, all of them on the GPU, and one run of step for warming up")


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _state(optimizer: SAM) -> list[tuple[Tensor, str, Tensor]]:
    """(parameter, key, value) of all tensors in the optimizer's state."""
    return [(p, k, v) for p, own in optimizer.state.items() for k, v in own.items() if torch.is_tensor(v)]

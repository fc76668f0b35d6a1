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
    change in place; rho, momentum and the other settings are fixed from here on.

    step runs warmup times and is captured, and what that did to weights, buffers, state and skipped_steps is undone.
    Raises ValueError if the base optimizer is not SGD, Adam or AdamW, TypeError for another package's optimizer.
    """
    if not isinstance(optimizer, SAM):
        raise TypeError(f"capture needs a mup2_fused.SAM, as every other optimizer waits for the host: {optimizer!r}")
    if optimizer._fused_method() is None:
        name = type(optimizer.base_optimizer).__name__
        raise ValueError(f"{name} waits for the host: only SGD, Adam and AdamW without hooks do not")
    optimizer._require_restored("capture()")
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    if new and any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        raise ValueError("with dampening the first update differs from the others: take one step before capture()")
    for group in optimizer.param_groups:
        if group["params"]:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)

    skipped_steps = optimizer.skipped_steps
    before = [(t, t.detach().clone()) for t in chain(model.parameters(), model.buffers())]
    state = {(p, key): value.clone() for p, own in optimizer.state.items() for key, value in own.items()}
    static = [x.clone() for x in inputs]
    device = static[0].device
    generator = torch.cuda.get_rng_state(device)
    stream = torch.cuda.Stream(device)  # capturing needs one of its own, and allocations to have been made on it
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            step(*static)
    torch.cuda.current_stream(device).wait_stream(stream)
    optimizer.zero_grad()  # so that gradients lie in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = step(*static)

    with torch.no_grad():
        for t, value in before:
            t.copy_(value)
        for p, own in optimizer.state.items():
            for key, value in own.items():
                value.copy_(state[p, key]) if (p, key) in state else value.zero_()
    optimizer.skipped_steps = skipped_steps
    torch.cuda.set_rng_state(generator, device)

    def replay(*inputs: Tensor) -> Any:
        if [(x.shape, x.dtype) for x in inputs] != [(x.shape, x.dtype) for x in static]:
            expected = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in static)
            raise ValueError(f"the captured step takes {expected}: run the uncaptured one for other batches")
        for target, x in zip(static, inputs):
            target.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    return replay

"""One model at one width: a few SAM steps, and what the last one does to the output of every module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mup2_fused.loops import frozen_buffers
from mup2_fused.optimizer import SAM
from mup2_fused.torch_passes import climbing
from mup2_fused.user_code import Loss
from mup2_ref import contribution, joint_norm

QUANTITIES = ("init", "update", "perturbation", "norm share")
WHOLE = "(network output)"
Values = dict[str, dict[str, float]]  # parameter -> quantity -> value
Inputs = dict[str, tuple[Any, Any]]  # module -> args and kwargs of its first call


class Snapshot(NamedTuple):
    """The weights at one moment, and what they make of the data."""

    weights: dict[str, Tensor]
    inputs: Inputs
    output: Tensor | None  # of the network; None if the loss calls only parts of it


def measure(model: nn.Module, loss: Loss, opt: SAM, roles: dict[str, str], steps: int) -> Values:
    """Takes steps SAM steps, and measures in one more. The model keeps the weights from before that last step.

    roles: parameter -> role. Returns QUANTITIES of each parameter, and under WHOLE how the network's output moves.
    Raises FloatingPointError if the loss is not finite.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values: Values = {n: {"init": p.detach().double().std(correction=0).item()} for n, p in params.items()}
    closure = closure_of(model, loss, opt)
    for _ in range(steps):
        opt.step(closure)
    closure()
    shares = norm_shares(params, opt)
    before = snapshot(model, loss)
    opt.first_step()
    climbed = snapshot(model, loss)
    closure()
    opt.second_step()
    after = snapshot(model, loss)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before.weights[name])
    for name in params:
        values[name]["update"] = effect(model, name, roles[name], after.weights[name], before.inputs)
        if name in shares:
            values[name]["perturbation"] = effect(model, name, roles[name], climbed.weights[name], climbed.inputs)
            values[name]["norm share"] = shares[name]
    moved = {"update": after.output, "perturbation": climbed.output}
    values[WHOLE] = {q: rms(x - before.output) for q, x in moved.items() if x is not None and before.output is not None}
    return values


def closure_of(model: nn.Module, loss: Loss, opt: SAM) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        torch.manual_seed(1)
        value = loss(model)
        value.backward()
        if not value.isfinite():
            raise FloatingPointError("the loss is no longer finite: lower lr or rho")
        return value.detach()

    return closure


def norm_shares(params: dict[str, nn.Parameter], opt: SAM) -> dict[str, float]:
    """The part of every perturbed parameter in the joint norm of what it climbs along now."""
    names = {p: name for name, p in params.items()}
    perturbed = climbing(opt.param_groups, opt.moments)
    parts = {names[p]: (p, g, group["gradnorm_scaling"]) for p, g, group in perturbed if p in names}
    norm = joint_norm(list(parts.values()), opt.variant)
    return {name: (contribution(*part, opt.variant) / norm).item() for name, part in parts.items()}


def snapshot(model: nn.Module, loss: Loss) -> Snapshot:
    """The model's weights now, and arguments and output of a forward pass."""
    inputs: Inputs = {}
    outputs: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: inputs.setdefault(name, (args, kwargs)) and None

    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in model.named_modules()]
    hooks.append(model.register_forward_hook(lambda module, args, out: outputs.append(main_tensor(out))))
    try:
        torch.manual_seed(1)  # the same dropout as in the closure
        with torch.no_grad():
            loss(model)
    finally:
        for hook in hooks:
            hook.remove()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Snapshot(weights, inputs, outputs[0] if outputs else None)


def main_tensor(out: Any) -> Tensor:
    """The output itself, of modules that return several things, and of Hugging Face's models."""
    while not isinstance(out, Tensor):
        parts = [out.logits] if hasattr(out, "logits") else list(out.values()) if isinstance(out, dict) else list(out)
        out = next(part for part in parts if part is not None)
    return out.detach()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def effect(model: nn.Module, name: str, role: str, after: Tensor, inputs: Inputs) -> float:
    """The rms change of the module's output when this parameter alone changes to after. The model is left as it was."""
    p, owner = model.get_parameter(name), name.rpartition(".")[0]
    if any(model.get_submodule(owner).children()) and role in ("input", "finite"):
        return rms(after - p)  # a raw vector, such as a class token, is added to the activations of a larger module
    while owner not in inputs:  # another module reads the parameters of this one, which is never called itself
        if not owner:
            return 0.0
        owner = owner.rpartition(".")[0]
    module, before = model.get_submodule(owner), p.detach().clone()
    args, kwargs = inputs[owner]
    outputs = []
    with frozen_buffers(module):
        for value in (after, before):
            p.copy_(value)
            torch.manual_seed(0)  # the same dropout
            outputs.append(main_tensor(module(*args, **kwargs)).clone())
    return rms(outputs[0] - outputs[1])

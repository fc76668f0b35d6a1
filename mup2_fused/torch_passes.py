"""A SAM step in torch operations, for any device: climb to w + e, restore w, descend from w.

The formulas are mup2_ref's. compiled_passes.py has the same functions as methods, in fewer passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mup2_fused.arguments import check_factors
from mup2_fused.sharded import Groups, in_any_process, is_spread, place_gradients, whole
from mup2_ref import EPS, contribution, joint_norm, perturb_

Moments = tuple[dict[Any, Any], str] | None  # the base optimizer's state, and the key of the first moment in it


@dataclass(eq=False)
class Phase:
    """Where an optimizer stands between two updates. It can be copied and pickled at any time."""

    # (parameter, its weights w) for all that is perturbed. None: there was no first step since the last update.
    # An empty list: there was one, but the weights are at w.
    backups: list[tuple[Tensor, Tensor]] | None = None
    # Whether the gradient of the latest first_step() was finite. None: the kernels left the answer on the device.
    finite: bool | None = True
    skipped: int = 0  # updates that were skipped, without those that the kernels have counted
    steps: int = 0  # finished steps, to count the interval between steps with SAM


class Passes(Protocol):
    """What SAM calls. This module is one implementation, CompiledPasses the other."""

    def climb(
        self, phase: Phase, groups: Groups, variant: str, process_group: Any = None, moments: Moments = None
    ) -> None: ...
    def restore(self, phase: Phase) -> None: ...
    def descend(
        self,
        phase: Phase,
        base: torch.optim.Optimizer,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
    ) -> None: ...
    def finite(self, phase: Phase) -> bool: ...
    def skipped(self, phase: Phase) -> int: ...


@torch.no_grad()
def climb(phase: Phase, groups: Groups, variant: str, process_group: Any = None, moments: Moments = None) -> None:
    """w <- w + e, unless the gradient is not finite in this process or in another one of process_group.

    moments: climb against the first moments instead of along the gradients. No group: nothing climbs.
    """
    place_gradients(groups)
    perturbed = climbing(groups, moments)
    for p, g, _ in perturbed:
        refuse_sparse_and_complex(p, g)
    norm = norm_of([(p, g, group["gradnorm_scaling"]) for p, g, group in perturbed], variant)
    broken = ~norm.isfinite()
    if process_group is not None:  # without gradients the norm is on the CPU, but NCCL takes tensors on the GPU only
        device = next((p.device for group in groups for p in group["params"]), broken.device)
        broken = in_any_process(broken.to(device), process_group)
    phase.finite = not broken
    phase.backups = [(p, p.detach().clone()) for p, _, _ in perturbed]
    try:
        for p, g, group in perturbed if phase.finite else ():
            perturb_(p, g, signed_rho(group, moments) / (norm + EPS), variant)
    except BaseException:
        restore(phase)
        raise


def climbing(groups: Groups, moments: Moments = None) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(parameter, gradient or first moment, group) for all that first_step() perturbs: perturb=True, and there is one.

    KeyError for a group that lacks one of SAM's keys; ValueError for a rho that is negative or not finite.
    """
    for group in groups:
        check_factors(group)
    params = [(p, group) for group in groups if group["perturb"] for p in group["params"]]
    directions = [moments[0].get(p, {}).get(moments[1]) if moments else p.grad for p, _ in params]
    return [(p, g, group) for (p, group), g in zip(params, directions) if g is not None]


def refuse_sparse_and_complex(p: Tensor, g: Tensor) -> None:
    """RuntimeError if SAM cannot perturb p by its gradient g."""
    if g.layout != torch.strided or g.is_complex():
        raise RuntimeError(
            f"SAM cannot perturb by a {'complex' if g.is_complex() else 'sparse'} gradient (shape "
            f"{tuple(p.shape)}): use sparse=False in embeddings, torch.view_as_real for complex weights, or "
            "perturb=False"
        )


def norm_of(triples: list[tuple[Any, Any, float]], variant: str) -> Tensor:
    """joint_norm over all processes, of (w, g, gradnorm_scaling)."""
    if any(is_spread(w) for w, _, _ in triples):
        parts = [whole(contribution(*triple, variant)) for triple in triples]
        triples, variant = [(part, part, 1.0) for part in parts], "sam"  # a part is a number: its norm is itself
    return joint_norm(triples, variant)


def signed_rho(group: dict[str, Any], moments: Moments = None) -> float:
    """rho, or -rho against moments, and with maximize=True, where climbing must lower the objective."""
    return -group["rho"] if moments or group.get("maximize") else group["rho"]


@torch.no_grad()
def restore(phase: Phase) -> None:
    """Return every perturbed weight to w, bit for bit. Does nothing if none is perturbed."""
    for w, backup in phase.backups or ():
        w.copy_(backup)
    phase.backups = None


@torch.no_grad()
def descend(
    phase: Phase, base: torch.optim.Optimizer, grad_scale: Tensor | None, found_inf: Tensor | None, skip_nonfinite: bool
) -> None:
    """Return to w, divide the gradients by grad_scale, and let base step, unless a gradient was not finite."""
    restore(phase)
    place_gradients(base.param_groups)
    gradients = gradients_of(base.param_groups)
    if grad_scale is not None:
        for g in gradients:
            g.div_(grad_scale.to(g.device))
    skip = not phase.finite or (found_inf is not None and found_inf.item() > 0)
    if skip or (skip_nonfinite and not norm_of_gradients(gradients).isfinite()):
        phase.skipped += 1
    else:
        update(base)


def update(base: torch.optim.Optimizer) -> None:
    """base.step() without the hooks for all optimizers, which torch has called around SAM's step already."""
    step: Any = type(base).step
    if has_own_step(base) or not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks):
        base.step()
        return
    hooked = getattr(step, "hooked", False)
    arguments: tuple[Any, Any] = ((base,), {})
    for hook in base._optimizer_step_pre_hooks.values():
        arguments = hook(base, *arguments) or arguments
    (step.__wrapped__ if hooked else step)(*arguments[0], **arguments[1])
    for hook in base._optimizer_step_post_hooks.values():
        hook(base, *arguments)
    note_step(base)


def has_own_step(base: torch.optim.Optimizer) -> bool:
    """Whether this object's step() is another one than its class's. Schedulers replace it, but only to note calls."""
    step: Any = vars(base).get("step")
    return bool(step) and not (hasattr(step, "_wrapped_by_lr_sched") and step.__wrapped__ is type(base).step)


def note_step(base: Any) -> None:
    """Tell schedulers of the base optimizer that it has made a step."""
    base._opt_called = True


@torch.no_grad()
def make_state(base: torch.optim.Optimizer) -> None:
    """Make the base optimizer's state by a step with lr and gradients at 0; RuntimeError for any other step.

    torch.distributed.checkpoint calls step() in this way before it loads, without a first_step().
    """
    gradients = gradients_of(base.param_groups)
    trained = base.state or not gradients or any(group.get("lr", 1) for group in base.param_groups)
    if trained or norm_of_gradients(gradients):
        raise RuntimeError(
            "nothing is perturbed: call first_step() after the first backward, or step(closure). Hugging Face's "
            "Trainer does neither: take mup2_fused.huggingface.SAMTrainer"
        )
    update(base)


def gradients_of(groups: Groups) -> list[Tensor]:
    """All gradients that there are."""
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def norm_of_gradients(gradients: list[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, sparse and complex ones too."""
    values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    values = [torch.view_as_real(g) if g.is_complex() else g for g in values]
    return norm_of([(g, g, 1.0) for g in values], "sam")


def finite(phase: Phase) -> bool:
    """Whether the gradient of the latest first_step() was finite."""
    return bool(phase.finite)


def skipped(phase: Phase) -> int:
    """How many updates were skipped."""
    return phase.skipped

"""What `python -m mup2_fused.verify` compares: the product and the reference, side by side on copies of one model.

The reference, mup2_ref.SAM, knows SAM steps only. The steps with fewer passes (docs/cheaper-sam.md) are written out
here as loops around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mup2_ref
from mup2_fused import compiled_passes, torch_passes
from mup2_fused.optimizer import SAM
from mup2_fused.user_code import Loss

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),  # in float16 the usual eps is 0
}
BACKENDS = ("torch", "compiled")
INTERVAL = 4


class Side(NamedTuple):
    """One optimizer with its parameters, and a model of its own that computes the gradients.

    The float64 side has parameters in float64 beside a model in the type that is verified.
    """

    model: nn.Module
    params: list[nn.Parameter]
    opt: Any  # the product's SAM or the reference's
    loss: Loss

    def backward(self) -> None:
        mine = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, q in zip(mine, self.params):
                p.copy_(q)
        self.model.zero_grad()
        self.loss(self.model).backward()
        for p, q in zip(mine, self.params):
            q.grad = None if p.grad is None else p.grad.to(q.dtype)

    def gradients_of(self, other: Side) -> None:
        """Take the other side's gradients, so that optimizers are compared and not autograd."""
        for p, q in zip(self.params, other.params):
            p.grad = None if q.grad is None else q.grad.detach().clone().to(p.dtype)

    def first_step(self) -> float:
        """Take the first step, and return the joint norm that this side divided by."""
        groups, variant = self.opt.param_groups, self.opt.variant
        triples = [(p, p.grad, g["gradnorm_scaling"]) for g in groups for p in g["params"] if p.grad is not None]
        formula = torch_passes.norm_of if isinstance(self.opt, SAM) else mup2_ref.joint_norm
        norm = formula(triples, variant).item()
        self.opt.first_step()
        passes = getattr(self.opt, "passes", None)
        return passes.norms()[0] if isinstance(passes, compiled_passes.CompiledPasses) else norm

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def results(self) -> list[Tensor]:
        """Weights and the moments of the base optimizer."""
        states = [(p, x) for p in self.params for x in self.opt.state[p].values()]
        return self.weights() + [x.clone() for p, x in states if torch.is_tensor(x) and x.ndim == p.ndim]


def product_step(side: Side) -> None:
    """A whole step of the product, in each of WAYS."""
    if not side.opt.moments:
        side.backward()
    if side.opt.first_step():
        side.backward()
    side.opt.second_step()


def sam_step(side: Side, number: int) -> None:
    """The reference's step. number: of the step, from 0."""
    side.backward()
    side.opt.first_step()
    side.backward()
    side.opt.second_step()


def step_with_interval(side: Side, number: int) -> None:
    """One in INTERVAL steps is the reference's step, and the others are its base optimizer's own."""
    if number % INTERVAL == 0:
        sam_step(side, number)
    else:
        side.backward()
        side.opt.base_optimizer.step()


def step_by_momentum(side: Side, number: int) -> None:
    """The reference climbs along -v in place of the gradient. v is the first moment; before step 0 there is none.

    Source: Becker, Altrock, Risse: "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024.
    """
    for p in side.params:
        state = side.opt.state.get(p, {})
        v = state.get("momentum_buffer", state.get("exp_avg"))
        p.grad = None if v is None else -v
    side.opt.first_step()
    side.backward()
    side.opt.second_step()


class Way(NamedTuple):
    """A way to climb: the product's arguments for it, and the same written out with the reference."""

    arguments: dict[str, Any]
    written_out: Callable[[Side, int], None]


WAYS = {
    "steps": Way({}, sam_step),
    "steps, interval": Way(dict(interval=INTERVAL), step_with_interval),
    "steps, momentum": Way(dict(ascent="momentum"), step_by_momentum),
}


def make_side(model: nn.Module, loss: Loss, variant: str, base: str, rho: float, way: str, name: str) -> Side:
    """name: one of BACKENDS, or "reference", or "exact" for the reference in float64. way: a key of WAYS.

    Raises RuntimeError if name is "compiled" and the kernels cannot run on this model.
    """
    own = copy.deepcopy(model)
    params = [p for p in own.parameters() if p.requires_grad]
    if name == "exact":
        params = [nn.Parameter(p.detach().double()) for p in params]
    groups = [  # two groups, so that factors differ
        {"params": params[::2], "rho": rho, "gradnorm_scaling": 1.0},
        {"params": params[1::2], "rho": 0.5 * rho, "gradnorm_scaling": 2.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind, kwargs = BASES[base]
    if name in BACKENDS:
        opt: Any = SAM(groups, kind, variant=variant, backend=name, **WAYS[way].arguments, **kwargs)
    else:
        opt = mup2_ref.SAM(groups, kind, variant=variant, **kwargs)
    return Side(own, params, opt, loss)

"""Parameter groups and initial weights for any architecture.

The formulas are mup2_ref's, and roles.py tells the roles. This file adds perturbations of some parameters only (SAM-ON)
and the factors of the mup package's readout, which divides its input by the width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mup2_fused.arguments import ScaledGroups
from mup2_fused.bases import Base
from mup2_fused.layouts import LORA
from mup2_fused.optimizer import SAM
from mup2_fused.roles import Weight, describe
from mup2_fused.theory import exponents
from mup2_ref import MUP2, PARAMETERIZATIONS, ROLES, Exponents, factors, initial_std, known


def param_groups(
    model: nn.Module,
    base: Base = None,
    scaling: Exponents = MUP2,
    *,
    lr: float | None,
    rho: float,
    weight_decay: float = 0.0,
    perturb: str | Callable[[str, Tensor], bool] = "all",
    roles: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for SAM, or for any torch optimizer, with the lr, rho and gradnorm_scaling of this width.

    base: the same architecture at the base width, where lr and rho were tuned. A dimension in which the models differ
    is a width. At the base width every factor is 1. base may be a model, also on the meta device. It may be a function
    without arguments, or a config of transformers: the base model is then made on the meta device. None: the model went
    through mup.set_base_shapes() of the mup package, and its p.infshape is read.
    lr: None leaves lr and weight_decay to an optimizer that scales them by itself, such as mup.MuSGD or mup.MuAdam.
    weight_decay: lr * weight_decay is the same at every width.
    perturb: "all", "norm" (only normalization layers: SAM-ON), or a function (name, parameter) -> bool. Where some
    roles are not perturbed, the rows that exponents() made are replaced by those for the other roles.
    roles: {parameter name: "input", "hidden", "output" or "finite"} where modules and shapes do not tell. Instead of a
    role, a layout says which dimensions are fan_out and fan_in: "out in", "in out", or "batch in out" for a stack of
    matrices such as experts. There is one word for each dimension, and leading batch dimensions may be left out.
    Groups have params, names, role, lr, weight_decay, rho, gradnorm_scaling, perturb and variant. ValueError for an
    ambiguous role, an unknown name, or models that differ in more than their width. A warning lists raw vectors whose
    role "input" is only assumed. scaling also says for which base optimizer the learning rates are, as in
    exponents(base_optimizer="adam"): SAM warns if it gets another one.
    """
    if lr is None and weight_decay:
        raise ValueError("with lr=None, pass weight_decay to the optimizer: SAM(groups, MuSGD, weight_decay=...)")
    weights = {name: w for name, w in describe(model, base, roles).items() if w.parameter.requires_grad}
    _warn_of_assumed(weights)
    perturbed = _perturbed_names(weights, perturb)
    scaling = _for_weights(scaling, weights, {weights[name].role for name in perturbed})
    n = _width(weights)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, weight in weights.items():
        of_lr, of_rho, of_norm = _factors_with_divisor(scaling, weight, n)
        rates = {} if lr is None else dict(lr=lr * of_lr, weight_decay=weight_decay / of_lr)
        radii = dict(rho=rho * of_rho, gradnorm_scaling=of_norm, perturb=name in perturbed)
        settings = dict(role=weight.role, variant=scaling.variant) | rates | radii
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": []} | settings)
        group["params"].append(weight.parameter)
        group["names"].append(name)
    made = ScaledGroups(groups.values())
    made.given = {} if lr is None else dict(lr=lr, weight_decay=weight_decay)
    if lr is not None and any(group["lr"] != lr for group in made):
        made.scaled_for = _rule(scaling)
    return made


def _rule(scaling: Exponents) -> str:
    """Whose learning rates these exponents are for: "sgd" or "adam", "" for the user's own exponents."""
    _, *rows = PARAMETERIZATIONS.get(scaling.parameterization, ((),))
    of_table = dict(zip(("sgd", "adam"), rows)).get(scaling.base_optimizer)
    return scaling.base_optimizer if scaling.c == of_table else ""


def _warn_of_assumed(weights: dict[str, Weight]) -> None:
    names = [name for name, weight in weights.items() if weight.assumed]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"raw vectors count as 'input', as biases do: {', '.join(names[:5])}{more}. If forward() multiplies with "
            f"one and sums over it, as in x @ v, say roles={{'{names[0]}': 'output'}}. roles={{'{names[0]}': 'input'}} "
            "confirms the assumption and silences this warning.",
            stacklevel=3,
        )


def _perturbed_names(weights: dict[str, Weight], perturb: str | Callable[[str, Tensor], bool]) -> set[str]:
    if callable(perturb):
        names = {name for name, weight in weights.items() if perturb(name, weight.parameter)}
    else:
        everything = known(perturb, ("all", "norm")) == "all"
        names = {name for name, weight in weights.items() if everything or weight.in_norm}
    if not names:
        raise ValueError(f"perturb={perturb!r} selects no trainable parameter")
    return names


def _for_weights(scaling: Exponents, weights: dict[str, Weight], roles: set[str]) -> Exponents:
    """The same row of the tables for networks in which only these roles are perturbed.

    Exponents that are no row of the tables, but the user's own, are returned as they are.
    """

    def row(perturbation: Any, perturbed: tuple[str, ...]) -> Exponents:
        names = (scaling.parameterization, perturbation, scaling.variant)
        return exponents(*names, base_optimizer=scaling.base_optimizer, norm=scaling.norm, perturbed=perturbed)

    try:
        if scaling != row(scaling.perturbation, ROLES):
            return scaling
    except ValueError:  # the user's own names
        return scaling
    divided = {w.divisor / w.growth.fan_in for w in weights.values() if w.divisor != 1}
    if divided and scaling.perturbation == "global" and scaling.variant == "sam":
        if scaling.parameterization != "mup" or not roles >= set(ROLES) or any(abs(x - 1) > 1e-6 for x in divided):
            raise ValueError(
                "with mup.MuReadout, 'global' needs 'mup' and all roles perturbed, and with another division of the "
                "logits, that by the growth of the width: take 'effective'"
            )
        return row("naive", ROLES)  # MuReadout's gradient is n times smaller, so that hidden layers dominate the norm
    # At the base width nothing grows: every role is "finite", and all exponents mean the same.
    return row(scaling.perturbation, tuple(role for role in ROLES if role in roles) or ROLES)


def _width(weights: dict[str, Weight]) -> float | None:
    """By how much the model is wider than the base model; None if its dimensions grow by different factors."""
    ratios = {ratio for weight in weights.values() for ratio in weight.growth if ratio != 1}
    return max(ratios, default=1.0) if len(ratios) < 2 else None


def _factors_with_divisor(scaling: Exponents, weight: Weight, n: float | None) -> tuple[float, float, float]:
    """Factors of lr, rho and gradnorm_scaling of one parameter.

    A module that divides its input by a applies the matrix V = W / a, of which the theory speaks. The parameter W needs
    e_W = a e_V, and its gradient is dL/dV / a. So a² goes into the factor of rho, and a into that of the norm;
    adaptive SAM has these factors in T. SGD's learning rate gets a², Adam's gets a.
    """
    of_lr, of_rho, of_norm = factors(scaling, weight.growth, n)
    a = weight.divisor
    of_lr *= a**2 if scaling.base_optimizer == "sgd" else a
    if any(scaling.dl) and scaling.variant == "sam":
        of_rho, of_norm = of_rho * a**2, of_norm * a
    return of_lr, of_rho, of_norm


def initial_scale(weight: Weight, scaling: Exponents) -> float:
    """Initial standard deviation over that in the base model."""
    return initial_std(weight.growth, scaling) * weight.divisor


@torch.no_grad()
def init_(
    model: nn.Module,
    base: Base = None,
    scaling: Exponents = MUP2,
    *,
    zero_output: bool = False,
    gain: float = 2**0.5,
    roles: dict[str, str] | None = None,
) -> nn.Module:
    """Draw the initial weights of an existing model in place, and return the model.

    Matrices are drawn with standard deviation gain / sqrt(fan_in) at the base width. At n times the base width, in muP,
    it is 1 (input), n^(-1/2) (hidden) or 1/n (output) times that: n^(-b_l) of Definition 4. Their biases become 0. Raw
    matrices are drawn, too, if their role is hidden or output, or if roles= says a layout.
    gain: as in torch.nn.init.calculate_gain, sqrt(2) for ReLU. Embeddings, normalizations and other vectors need no
    scale and keep their values. So do raw parameters of the role "input", frozen parameters (freeze what is not to be
    drawn), and those matrices of LoRA that are zero.
    The result does not depend on the values before, so drawing twice is the same as drawing once.
    base, roles: as for param_groups, with the same errors; and ValueError for a matrix whose fan_in is unknown.
    zero_output: output weights start at 0, but not those of LoRA and of transformers' routers. At the base width, name
    them: roles={"head.weight": "output"}.
    """
    weights = {name: w for name, w in describe(model, base, roles).items() if _to_draw(name, w.parameter)}
    zeros = {name for name, weight in weights.items() if zero_output and _may_start_at_zero(name, weight)}
    if zero_output and not zeros:
        raise ValueError(
            "zero_output: no trainable tensor has the role 'output'. Name it: roles={'head.weight': 'output'}."
        )
    for name, weight in weights.items():
        if weight.base_fan_in is None and weight.role in ("hidden", "output") and not weight.bias | (name in zeros):
            raise ValueError(
                f"init_ cannot tell the fan_in of '{name}' (shape {tuple(weight.parameter.shape)}): say its layout "
                f"instead of its role, such as roles={{'{name}': 'in out'}} for x @ w and 'out in' for F.linear(x, w), "
                "pass the base model, or freeze it while init_ draws the others."
            )
    for name, weight in weights.items():
        p = weight.parameter
        if name in zeros or weight.bias:
            p.zero_()
        elif weight.base_fan_in:  # there is nothing to draw where it is 0
            p.normal_(0, gain * weight.base_fan_in**-0.5 * initial_scale(weight, scaling))
    return model


def _may_start_at_zero(name: str, weight: Weight) -> bool:
    """Not LoRA's A, as its B is 0 already, and no router, which would send all inputs to the same experts."""
    inside = LORA.search(name) is not None or "Router" in type(weight.module).__name__
    return weight.role == "output" and not inside


def _to_draw(name: str, p: nn.Parameter) -> bool:
    """One of LoRA's two matrices starts at 0, so that an adapter changes nothing at first."""
    return p.requires_grad and not (LORA.search(name) and not p.any())


def report(groups: list[dict[str, Any]] | SAM) -> str:
    """A table with one row per parameter: name, shape, role, lr, rho, gradnorm_scaling ("-": not perturbed).

    groups: made by param_groups(), or a SAM with such groups. For a SAM, a line below the table says how it climbs, and
    how many forward-backward passes a step takes on average. KeyError for groups without names and roles.
    """
    rows = [("name", "shape", "role", "lr", "rho", "gradnorm_scaling")]
    for g in groups.param_groups if isinstance(groups, SAM) else groups:
        for name, p in zip(g["names"], g["params"]):
            radius = (f"{g['rho']:.4g}", f"{g['gradnorm_scaling']:.4g}") if g["perturb"] else ("-", "-")
            lr = f"{g['lr']:.4g}" if "lr" in g else "-"
            rows.append((name, "x".join(map(str, p.shape)), g["role"], lr, *radius))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, _way_to_climb(groups)] if isinstance(groups, SAM) else lines)


def _way_to_climb(optimizer: SAM) -> str:
    if optimizer.moments:
        return "SAM by momentum in every step, 1 pass per step"
    k = optimizer.interval
    return f"SAM in {f'1 of {k} steps' if k > 1 else 'every step'}, {1 + 1 / k:.4g} passes per step"

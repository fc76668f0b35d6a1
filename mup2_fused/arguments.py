"""What SAM accepts: base optimizers, groups and variants. Every error says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from mup2_ref import VARIANTS, known


def check_base(base: Any) -> None:
    """TypeError if SAM cannot be put around this class or function."""
    if isinstance(base, torch.optim.Optimizer) or not callable(base):
        raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, not {base!r}")
    if isinstance(base, type) and not issubclass(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, or returns one's object, not {base!r}")
    if isinstance(base, type) and issubclass(base, (torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.SparseAdam)):
        raise TypeError(
            f"{base.__name__} cannot be the base: LBFGS evaluates the loss inside its step, Adadelta has a rho of its "
            "own in its groups, and SparseAdam takes sparse gradients only"
        )


def make_base(base: Callable[..., Any], groups: list[dict[str, Any]], kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    """base(groups, **kwargs). ValueError if its groups are others, or have other learning rates."""
    scaled = {p: group["lr"] for group in groups if "role" in group and "lr" in group for p in group["params"]}
    made = base(groups, **kwargs)
    check_base(type(made))
    groups = made.param_groups
    if any("rho" not in group or "perturb" not in group for group in groups):
        raise ValueError(f"{base} must make its optimizer from the groups that it is given")
    if any(scaled[p] != group["lr"] for group in groups for p in group["params"] if p in scaled):
        raise ValueError(
            f"{base} scales learning rates, and those of these groups are scaled already: make them with "
            "param_groups(lr=None) and give lr to SAM"
        )
    return made


def check_group(group: dict[str, Any], variant: str) -> None:
    """ValueError if the group's factors are out of range or made for another variant."""
    if not (0 <= group["rho"] < math.inf and 0 < group["gradnorm_scaling"] < math.inf):
        raise ValueError(
            f"rho must be finite and >= 0, not {group['rho']}; gradnorm_scaling must be finite and > 0, not "
            f"{group['gradnorm_scaling']} (perturb=False keeps a group out of perturbation and norm)"
        )
    variant_of([group], variant)


def variant_of(groups: list[dict[str, Any]], variant: str | None) -> str:
    """The variant of SAM that is given, or that the groups are made for; ValueError for several.

    A group that names none is made for the given variant, and for "sam" if none is given.
    """
    found = {group.get("variant") or variant or "sam" for group in groups} | ({variant} if variant else set())
    if len(found) > 1:
        raise ValueError(
            f"groups and optimizer are made for different variants of SAM, {' and '.join(map(repr, sorted(found)))}: "
            "give exponents() and SAM() the same variant"
        )
    return known((found or {"sam"}).pop(), VARIANTS)

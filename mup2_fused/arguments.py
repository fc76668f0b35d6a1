"""What SAM accepts: base optimizers, groups and variants. Every error says what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from mup2_ref import VARIANTS, known

RATES = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adam"}  # which rule they follow
SETTINGS = ("rho", "gradnorm_scaling", "perturb", "variant")  # SAM's keys in every group


class ScaledGroups(list[dict[str, Any]]):
    """Groups of param_groups().

    scaled_for: the rule of their learning rates, "" if this width does not change them. given: the lr and weight_decay
    from which they are made, if any.
    """

    scaled_for, given = "", dict[str, float]()


def check_arguments(params: Any, base: Any, base_kwargs: dict[str, Any]) -> None:
    """Errors for arguments that belong to another package's SAM, or that no SAM can obey.

    A warning for groups whose learning rates follow the rule of another base optimizer, and for options that have no
    effect because the groups of param_groups() have their own.
    """
    if isinstance(params, torch.optim.Optimizer):
        raise TypeError(
            f"SAM makes its base optimizer: SAM(model.parameters(), torch.optim.{type(params).__name__}, lr=...)"
        )
    if "adaptive" in base_kwargs:  # some bases would swallow it
        raise TypeError("adaptive=True is variant='elementwise' here")
    if not isinstance(params, ScaledGroups):
        return
    for name, value in params.given.items():
        if base_kwargs.get(name, value) != value:
            warnings.warn(
                f"{name}={base_kwargs[name]} has no effect: the groups are made with {name}={value}. Give {name} to "
                "param_groups()",
                stacklevel=3,
            )
    made_for = params.scaled_for
    if made_for and isinstance(base, type) and (rule := RATES.get(base, made_for)) != made_for:
        warnings.warn(
            f"at this width {base.__name__} needs other learning rates than those of the groups: make them with "
            f"param_groups(model, base, exponents(base_optimizer={rule!r}), ...)",
            stacklevel=3,
        )


def check_base(base: Any) -> None:
    """TypeError if SAM cannot be put around this class or function."""
    if isinstance(base, torch.optim.Optimizer) or not callable(base):
        raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, not {base!r}")
    if isinstance(base, type) and not issubclass(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, or returns one's object, not {base!r}")
    if isinstance(base, type) and issubclass(base, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise TypeError(
            f"{base.__name__} cannot be the base: LBFGS evaluates the loss inside its step, and SparseAdam takes "
            "sparse gradients only"
        )
    if hasattr(base, "first_step"):
        raise TypeError("a SAM cannot be the base of another one: pass the torch optimizer that makes the update")


def make_base(base: Callable[..., Any], groups: list[dict[str, Any]], kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    """base(groups, **kwargs). TypeError if it wraps an optimizer, or if its groups share a key with SAM's; ValueError
    if its groups are others, or have other learning rates."""
    scaled = {p: group["lr"] for group in groups if "role" in group and "lr" in group for p in group["params"]}
    made = base(groups, **kwargs)
    check_base(type(made))
    if not {"param_groups", "state", "defaults"} <= vars(made).keys():  # they are another optimizer's
        raise TypeError(f"{type(made).__name__} wraps an optimizer: put it around SAM, not SAM around it")
    if taken := made.defaults.keys() & SETTINGS:
        raise TypeError(
            f"{type(made).__name__} cannot be the base: it has settings of its own in its groups that SAM has too "
            f"({', '.join(sorted(taken))})"
        )
    groups = made.param_groups
    if any(group.get("differentiable") for group in groups):
        raise ValueError("SAM changes weights in place: leave out differentiable=True")
    if any("rho" not in group or "perturb" not in group for group in groups):
        raise ValueError(f"{base} must make its optimizer from the groups that it is given")
    if any(scaled[p] != group["lr"] for group in groups for p in group["params"] if p in scaled):
        raise ValueError(
            f"{base} scales learning rates, and those of these groups are scaled already: make them with "
            "param_groups(lr=None) and give lr to SAM"
        )
    return made


def first_moment(ascent: str, interval: int, base: torch.optim.Optimizer) -> str:
    """The key of the base optimizer's first moment if SAM is to climb against it, and "" if it climbs along gradients.

    ValueError for an unknown way to climb, an interval that is no positive integer, and a base without a moment.
    """
    if not (isinstance(interval, int) and interval >= 1):
        raise ValueError(f"interval counts steps from one SAM step to the next: it is 1 or more, not {interval!r}")
    if known(ascent, ("gradient", "momentum")) == "gradient":
        return ""
    if interval > 1:
        raise ValueError("ascent='momentum' takes one pass in every step already: leave out interval")
    if isinstance(base, (torch.optim.Adam, torch.optim.AdamW)):
        return "exp_avg"
    if isinstance(base, torch.optim.SGD):
        check_momentum(base.param_groups)
        return "momentum_buffer"
    raise ValueError(f"ascent='momentum' needs SGD with momentum, Adam or AdamW, not {type(base).__name__}")


def check_momentum(groups: list[dict[str, Any]]) -> None:
    """ValueError if one of SGD's groups has no momentum, against which SAM is to climb."""
    if not all(group["momentum"] for group in groups):
        raise ValueError("ascent='momentum' needs SGD with momentum in every group: give SAM momentum=0.9 or the like")


def check_factors(group: dict[str, Any]) -> None:
    """KeyError if the group lacks one of SAM's keys; ValueError if a factor is out of range."""
    for key in ("rho", "gradnorm_scaling", "perturb"):
        if key not in group:
            raise KeyError(
                f"a parameter group has no {key!r}: add groups with add_param_group(), which fills in what is missing"
            )
    if not (0 <= group["rho"] < math.inf and 0 < group["gradnorm_scaling"] < math.inf):
        raise ValueError(
            f"rho must be finite and >= 0, not {group['rho']}; gradnorm_scaling must be finite and > 0, not "
            f"{group['gradnorm_scaling']} (perturb=False keeps a group out of perturbation and norm)"
        )


def variant_of(groups: list[dict[str, Any]], variant: str | None) -> str:
    """The variant of SAM that is given, or that the groups are made for; ValueError for several.

    A group that names none is made for the given variant, and for "sam" if none is given.
    """
    adaptive = {True: "elementwise"}  # as davda54/sam and pytorch_optimizer say it in their groups
    found = {group.get("variant") or adaptive.get(group.get("adaptive", False)) or variant or "sam" for group in groups}
    found |= {variant} if variant else set()
    if len(found) > 1:
        raise ValueError(
            f"groups and optimizer are made for different variants of SAM, {' and '.join(map(repr, sorted(found)))}: "
            "give exponents() and SAM() the same variant"
        )
    return known((found or {"sam"}).pop(), VARIANTS)

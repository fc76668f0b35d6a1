"""Exponents for the product: all rows of Table D.2, the user's own, and perturbations of some roles only (SAM-ON).

The formulas are mup2_ref's; what is added here is composed from them.
"""

from __future__ import annotations

import math
from typing import Any

import mup2_ref
from mup2_ref import ROLES, Exponents, Prediction, Triple, known, unscaled

PERTURBATIONS = (*mup2_ref.PERTURBATIONS, "balanced", "first-layer")


def exponents(
    parameterization: str = "mup",
    perturbation: str | tuple[float, Triple] = "effective",
    variant: str = "sam",
    *,
    base_optimizer: str = "sgd",
    norm: str = "decoupled",
    perturbed: tuple[str, ...] = ROLES,
) -> Exponents:
    """The rows of Tables D.1, D.2 and 1, and the user's own perturbation. Raises ValueError for unknown names.

    parameterization: "sp", "sp-stable", "ntp" or "mup"; with base_optimizer="adam" (also for AdamW) "sp" or "mup".
    perturbation: "naive" (SAM as it is), "global" (one radius for all layers, the largest stable one), "effective"
    (every layer is perturbed effectively; µP² with "mup"), "balanced" (every layer contributes to the norm),
    "first-layer" (only the input layer is perturbed effectively), or your own (d, (d_in, d_hid, d_out)).
    variant: "sam", or adaptive SAM, "elementwise" or "layerwise".
    norm: "decoupled" (Algorithm 1: every layer contributes Theta(1) to the norm) or "joint" (Definition 4, with
    absolute widths: take a base model of width 1). "balanced", "first-layer" and your own have the joint norm.
    perturbed: the roles that are perturbed, ("input",) for SAM-ON. param_groups finds them by itself.
    """
    if not perturbed or not set(perturbed) <= set(ROLES):
        raise ValueError(f"perturbed must name some of {ROLES}, not {perturbed!r}")
    name = known(perturbation, PERTURBATIONS) if isinstance(perturbation, str) else ""
    row = name if name in mup2_ref.PERTURBATIONS else "effective"
    e = mup2_ref.exponents(parameterization, row, variant, base_optimizer=base_optimizer, norm=norm)
    e = _for_some_roles(e, perturbed)
    if name == row:
        return e
    d, dl = _further_row(e, perturbation, perturbed)
    return e._replace(d=d, dl=dl, norm="joint", perturbation=perturbation)


def _for_some_roles(e: Exponents, perturbed: tuple[str, ...]) -> Exponents:
    """The row for a network of which only these roles are perturbed and contribute to the norm."""
    effect = predict(e, perturbed=perturbed).effect
    if e.perturbation == "global":  # the largest stable radius; what early layers do to the output must be bounded too
        early = 1 - e.b[2]
        return e._replace(d=e.d + max(effect[0] + early, effect[1] + early, effect[2]))
    if e.perturbation == "effective":  # the norm is smaller without the other roles, and the effect larger
        excess = max(effect)
        return e._replace(d=e.d + excess, dl=tuple(x - excess for x in e.dl))
    return e


def _further_row(effective: Exponents, perturbation: Any, perturbed: tuple[str, ...]) -> tuple[float, Triple]:
    """(d, d_l) of the rows that mup2_ref does not have."""
    if perturbation == "first-layer":
        return effective.d, (effective.dl[0], effective.dl[1] + 1, effective.dl[2] + 1)
    if perturbation == "balanced":  # d_l makes each part of the norm Theta(1), and d makes the largest effect Theta(1)
        gradient, T, _ = unscaled(effective)
        dl = tuple(g + t for g, t in zip(gradient, T))
        return max(predict(effective._replace(d=0, dl=dl), perturbed=perturbed).effect), dl
    try:
        d, (d_in, d_hid, d_out) = perturbation
    except (TypeError, ValueError):
        raise ValueError(f"your own perturbation is (d, (d_in, d_hid, d_out)), not {perturbation!r}") from None
    return d, (d_in, d_hid, d_out)


def predict(e: Exponents, at_init: bool = False, *, perturbed: tuple[str, ...] = ROLES) -> Prediction:
    """What the exponents imply; see Prediction. The effect of roles that are not perturbed is -inf.

    at_init: before the first update. The output weights then have their initial size n^(-b_out), which is smaller than
    after it in the unstable "sp".
    """
    e = e._replace(dl=tuple(x if role in perturbed else math.inf for role, x in zip(ROLES, e.dl)))  # n^-inf is 0
    prediction = mup2_ref.predict(e)
    if at_init:
        small = mup2_ref.predict(e._replace(c=(*e.c[:2], max(e.c[2], e.b[2]))))
        prediction = small._replace(update=(*small.update[:2], prediction.update[2]), stable=prediction.stable)
    return prediction

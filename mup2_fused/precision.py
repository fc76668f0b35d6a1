"""What rounding to 16 bits leaves of a perturbation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mup2_fused.optimizer import SAM
from mup2_fused.sharded import is_spread
from mup2_fused.torch_passes import climbing, norm_of, signed_rho
from mup2_ref import EPS, normalizer


class Seen(NamedTuple):
    """How the perturbation that a forward pass sees compares with the intended one. nan: none was intended."""

    norm: float  # its norm over the norm of the intended one
    cosine: float  # of the angle between the two


@torch.no_grad()
def seen_perturbation(optimizer: SAM, dtype: torch.dtype | None = None) -> tuple[Seen, list[Seen]]:
    """What a forward pass at w + e sees of e: of all tensors together, and of each perturbed tensor in their order.

    Call this after a backward pass at w. The gradients stay, and so do the weights. dtype: the type to which autocast
    rounds the weights (here all of them, although autocast leaves normalization and embeddings alone). None: without
    autocast.

    Norm 1 and cosine 1 mean that rounding does no harm. Weights in 16 bits do not move where e is smaller than their
    last digit. With float32 weights under autocast, w and w + e are rounded separately, and the forward pass sees e
    plus two rounding errors. Where the cosine is small, SAM climbs in a direction that is mostly noise: keep float32
    weights, and use autocast to float16 or none at all.
    RuntimeError if there are no gradients or weights are perturbed already; TypeError for DTensors.
    """
    perturbed = climbing(optimizer.param_groups, optimizer.moments)
    if any(is_spread(p) for p, _, _ in perturbed):
        raise TypeError("seen_perturbation does not know DTensors: call it before the model is spread over processes")
    if not perturbed:
        raise RuntimeError("there are no gradients: call seen_perturbation after a backward pass at w")
    before = [p.clone() for p, _, _ in perturbed]
    norm = norm_of([(p, g, group["gradnorm_scaling"]) for p, g, group in perturbed], optimizer.variant) + EPS
    sums = []  # for each tensor: <seen, seen>, <seen, intended>, <intended, intended>
    with optimizer.perturbed():
        for (p, g, group), w in zip(perturbed, before):
            coefficient = (signed_rho(group, optimizer.moments) / norm).to(p.device)
            intended = normalizer(w.double(), optimizer.variant) ** 2 * g.double() * coefficient
            seen = p.to(dtype or p.dtype).double() - w.to(dtype or p.dtype).double()
            sums.append(torch.stack([(x * y).sum() for x, y in ((seen, seen), (seen, intended), (intended, intended))]))
    optimizer.restore()  # so that no update can follow
    sums = [s.cpu() for s in sums]
    return summary(torch.stack(sums).sum(0)), [summary(s) for s in sums]


def summary(sums: Tensor) -> Seen:
    """From <seen, seen>, <seen, intended>, <intended, intended>."""
    ss, si, ii = sums.tolist()
    return Seen(math.sqrt(ss / ii) if ii else math.nan, si / math.sqrt(ss * ii) if ss and ii else math.nan)

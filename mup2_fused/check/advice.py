"""What a wrong power of the width means, and what to change."""

from __future__ import annotations


def power(x: float) -> str:
    """n^(1/2), n^-1: a measured power, rounded to theory's halves."""
    halves = round(2 * x)
    return f"n^{halves // 2}" if halves % 2 == 0 else f"n^({halves}/2)"


def advice_on(quantity: str, excess: float, drawn: bool) -> str:
    """drawn: init_ draws this parameter. It leaves embeddings and vectors to the model's author."""
    way = "grows" if excess > 0 else "vanishes"
    remedy = power(-excess)
    if quantity == "init":
        how = "call mup2_fused.init_(model, base)" if drawn else f"multiply them by {remedy}"
        return f"initial weights are {power(excess)} times what muP has: {how}"
    if quantity == "update":
        return f"update {way} as {power(excess)}: multiply the learning rate by {remedy} (n: width / base width)"
    end = "it will blow up" if excess > 0 else "SAM does not reach this layer in a wide network"
    return f"perturbation {way} as {power(excess)}, {end}: multiply rho by {remedy}"


def advice_on_output(quantity: str, excess: float) -> str:
    what = {"update": "an update", "perturbation": "the perturbation"}[quantity]
    return (
        f"{what} moves it by {power(excess)}, too far in a wide network: look for a sum over the width without 1/n, "
        "such as a readout tied to the embedding (mup.MuSharedReadout divides its input by n)"
    )


def advice_on_norm(excess: float) -> str:
    return (
        f"its part of the norm grows as {power(excess)}, and all perturbations vanish once it dominates: multiply "
        f"gradnorm_scaling by {power(-excess)}"
    )

"""The perturbation check finds deliberate mistakes, and names them."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
from test_check import LR, RHO, WIDTHS, Net, correct, initialised
from torch import nn

from mup2_fused import exponents, param_groups
from mup2_fused.check import QUANTITIES, check


def plain(model):
    return [dict(params=initialised(model).parameters(), lr=LR, rho=RHO)]


def base_as_wide(model):
    return param_groups(initialised(model), Net(model.head.in_features), lr=LR, rho=RHO)


def init_forgotten(model):
    return param_groups(model, Net(WIDTHS[0]), lr=LR, rho=RHO)


def constant_init(model):
    """As in much code for transformers: the same standard deviation at every width."""
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    return init_forgotten(model)


def last_bias_like_the_others(model):
    def split(g):
        m = model.head.in_features / WIDTHS[0]
        return g | dict(lr=LR * m, rho=RHO * m, gradnorm_scaling=m**0.5) if "head.bias" in g["names"] else g

    return [split(g) for g in correct()(model)]


def readout_in_no_group(model):
    groups = correct()(model)
    for g in groups:
        g["params"] = [p for p in g["params"] if p is not model.head.weight]
    return groups


def without(key):
    return correct(change=lambda group: {k: v for k, v in group.items() if k != key})


def swapped(g):
    return g | dict(rho=RHO * g["gradnorm_scaling"], gradnorm_scaling=g["rho"] / RHO)


def upside_down(g):
    """1/r where r belongs."""
    return g | dict(rho=RHO**2 / g["rho"], gradnorm_scaling=1 / g["gradnorm_scaling"])


class Mistake(NamedTuple):
    groups: Callable
    wrong: dict  # quantity -> parameters that must be found
    advice: str  # what the report must say
    options: dict | None = None  # of check()


ELEMENTWISE = dict(variant="elementwise", rho=0.2)
ALL = tuple(dict(Net(8).named_parameters()))
VECTORS = ("first.bias", "norm.weight", "norm.bias", "hidden.bias")
INPUT = ("first.weight", *VECTORS)
HIDDEN, HEAD = ("hidden.weight",), ("head.weight",)
WRONG_RATES = {"update": (*INPUT, *HEAD), "perturbation": INPUT}
NOT_REACHED = "SAM does not reach this layer"
MISTAKES = {
    "no muP at all": Mistake(
        plain,
        WRONG_RATES | {"perturbation": (*INPUT, *HEAD)},
        "rates and radii are the same at widths 32 and 256.*all layers have one radius: this is SAM without muP²",
    ),
    "SAM without muP²": Mistake(
        correct(exponents("mup", "naive")),
        {"perturbation": (*INPUT, *HIDDEN, *HEAD)},
        f"SAM without muP².*first.weight.*perturbation vanishes as .*, {NOT_REACHED}.*head.weight: .*it will blow up",
    ),
    "SAM by Adam's moment without muP²": Mistake(
        correct(exponents("mup", "naive", base_optimizer="adam")),
        {"perturbation": (*INPUT, *HIDDEN, *HEAD)},
        f"SAM without muP².*first.weight.*perturbation vanishes as .*, {NOT_REACHED}.*head.weight: .*it will blow up",
        dict(ascent="momentum", base_optimizer="adam"),
    ),
    "global radius": Mistake(correct(exponents("mup", "global")), {"perturbation": (*INPUT, *HIDDEN)}, NOT_REACHED),
    "base model as wide as the model": Mistake(
        base_as_wide, WRONG_RATES, "base model is as wide as the model. Build the base model at one fixed width"
    ),
    "readout forgotten": Mistake(
        correct(roles={"head.weight": "input"}),
        {"update": HEAD, "perturbation": HEAD},
        r"head.weight: update grows as n\^\(?[234].*: multiply the learning rate by n\^",
    ),
    "Adam's learning rates for SGD": Mistake(
        correct(exponents(base_optimizer="adam")),
        {"update": (*INPUT, *HIDDEN)},
        r"update vanishes as n\^-1: multiply the learning rate by n\^1",
    ),
    "SGD's learning rates for Adam": Mistake(
        correct(),
        {"update": (*INPUT, *HIDDEN)},
        r"update grows as n\^1: multiply the learning rate by n\^-1",
        dict(base_optimizer="adam"),
    ),
    "readout in no group": Mistake(
        readout_in_no_group, {"update": HEAD}, "head.weight: never updated: it is in no parameter group"
    ),
    "one learning rate": Mistake(
        correct(change=lambda g: g | dict(lr=LR)), {"update": (*INPUT, *HEAD)}, "all layers have one learning rate"
    ),
    "one radius, muP²'s norm": Mistake(
        correct(change=lambda g: g | dict(rho=RHO)), {"perturbation": INPUT}, "multiply rho by n"
    ),
    "gradnorm_scaling lost": Mistake(
        without("gradnorm_scaling"),
        {"perturbation": ALL, "norm share": HEAD},
        r"all perturbations change alike, as n\^\(-1/2\).*'head.weight'.*gradnorm_scaling must go with rho",
    ),
    "factors swapped": Mistake(correct(change=swapped), {"perturbation": INPUT}, "multiply rho"),
    "factors upside down": Mistake(correct(change=upside_down), {"perturbation": (*INPUT, *HEAD)}, "multiply rho"),
    "last bias like the others": Mistake(
        last_bias_like_the_others,
        {"update": ("head.bias",), "perturbation": ("head.bias",)},
        r"head.bias: perturbation grows as .*it will blow up",
    ),
    "init_ forgotten": Mistake(
        init_forgotten,
        {"init": HEAD},
        r"initial weights are not muP's: correct them first.*head.weight: initial weights are n\^\(1/2\) times",
    ),
    "constant initial weights": Mistake(
        constant_init,
        {"init": (*HIDDEN, *HEAD)},
        r"hidden.weight: initial weights are n\^\(1/2\).*head.weight: initial weights are n\^1",
    ),
    "elementwise ASAM with SAM's factors": Mistake(
        without("variant"), {"perturbation": (*HIDDEN, *HEAD)}, NOT_REACHED, ELEMENTWISE
    ),
    "elementwise ASAM with d of the wrong sign": Mistake(
        correct(exponents("mup", (0.5, (0, 0, 0)), "elementwise")),
        {"perturbation": ("first.weight", *HIDDEN, *HEAD)},
        r"vanishes as n\^-1",
        ELEMENTWISE,
    ),
}
for name in ("SAM without muP²", "gradnorm_scaling lost"):
    MISTAKES[f"{name}, by momentum"] = MISTAKES[name]._replace(options=dict(ascent="momentum"))
LEARNING_RATES_ARE_RIGHT = (
    "SAM without muP²",
    "SAM without muP², by momentum",
    "SAM by Adam's moment without muP²",
    "global radius",
    "gradnorm_scaling lost",
    "gradnorm_scaling lost, by momentum",
    "one radius, muP²'s norm",
)


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_and_named(mistake, seeds):
    groups, expected, advice, options = MISTAKES[mistake]
    report = check(Net, WIDTHS, groups=groups, seeds=seeds, **(options or {}))
    assert not report.passed
    wrong = {q: {r.name for r in report.rows if q in r.wrong} for q in QUANTITIES}
    for quantity, names in expected.items():
        assert set(names) <= wrong[quantity], str(report)
    printed = str(report)
    assert re.search(advice, printed, re.DOTALL), printed
    assert "FAILED" in printed
    if mistake in LEARNING_RATES_ARE_RIGHT:
        assert not wrong["update"] and not wrong["init"], printed

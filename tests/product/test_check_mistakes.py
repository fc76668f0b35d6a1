"""The perturbation check finds what is wrong with a user's groups, and names it."""

import functools
import re

import pytest
from check_models import LR, RHO, WIDTHS, Net, correct, initialised
from torch import nn

from mup2_fused import exponents, param_groups
from mup2_fused.check import QUANTITIES, check


def plain(model):
    return [dict(params=initialised(model).parameters(), lr=LR, rho=RHO)]


def base_as_wide(model):
    return param_groups(initialised(model), Net(model.head.in_features), lr=LR, rho=RHO)


def base_half_as_wide(model):
    return param_groups(initialised(model), Net(model.head.in_features // 2), lr=LR, rho=RHO)


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
    return lambda group: {k: v for k, v in group.items() if k != key}


def swapped(g):
    return g | dict(rho=RHO * g["gradnorm_scaling"], gradnorm_scaling=g["rho"] / RHO)


def upside_down(g):
    """1/r where r belongs."""
    return g | dict(rho=RHO**2 / g["rho"], gradnorm_scaling=1 / g["gradnorm_scaling"])


ELEMENTWISE = dict(variant="elementwise", rho=0.2)
ALL = tuple(dict(Net(8).named_parameters()))
VECTORS = ("first.bias", "norm.weight", "norm.bias", "hidden.bias")
INPUT = ("first.weight", *VECTORS)
# mistake -> (groups, options, {quantity: parameters that must be found wrong}, what the advice must say)
MISTAKES = {
    "no muP at all": (
        plain,
        {},
        {"update": (*INPUT, "head.weight"), "perturbation": (*INPUT, "head.weight")},
        "rates and radii are the same at widths 32 and 256.*all layers have one radius: this is SAM without muP²",
    ),
    "SAM without muP²": (
        correct(exponents("mup", "naive")),
        {},
        {"perturbation": (*INPUT, "hidden.weight", "head.weight")},
        r"SAM without muP².*first.weight.*perturbation vanishes as .*, SAM does not reach this layer",
    ),
    "global radius": (
        correct(exponents("mup", "global")),
        {},
        {"perturbation": (*INPUT, "hidden.weight")},
        "SAM does not reach this layer",
    ),
    "base model as wide as the model": (
        base_as_wide,
        {},
        {"update": (*INPUT, "head.weight"), "perturbation": INPUT},
        "base model is as wide as the model. Build the base model at one fixed width",
    ),
    "base model always half as wide": (
        base_half_as_wide,
        {},
        {"update": (*INPUT, "head.weight"), "perturbation": INPUT},
        "base model is as wide as the model|no muP² groups",
    ),
    "readout forgotten": (
        correct(roles={"head.weight": "input"}),
        {},
        {"update": ("head.weight",), "perturbation": ("head.weight",)},
        r"head.weight: update grows as n\^\(?[234].*: multiply the learning rate by n\^",
    ),
    "Adam's learning rates for SGD": (
        correct(exponents(base_optimizer="adam")),
        {},
        {"update": (*INPUT, "hidden.weight")},
        r"update vanishes as n\^-1: multiply the learning rate by n\^1",
    ),
    "SGD's learning rates for Adam": (
        correct(),
        dict(base_optimizer="adam"),
        {"update": (*INPUT, "hidden.weight")},
        r"update grows as n\^1: multiply the learning rate by n\^-1",
    ),
    "readout in no group": (
        readout_in_no_group,
        {},
        {"update": ("head.weight",)},
        "head.weight: never updated: it is in no parameter group",
    ),
    "one learning rate": (
        correct(change=lambda g: g | dict(lr=LR)),
        {},
        {"update": (*INPUT, "head.weight")},
        "all layers have one learning rate",
    ),
    "one radius, muP²'s norm": (
        correct(change=lambda g: g | dict(rho=RHO)),
        {},
        {"perturbation": INPUT},
        "multiply rho by n",
    ),
    "gradnorm_scaling lost": (
        correct(change=without("gradnorm_scaling")),
        {},
        {"perturbation": ALL, "norm share": ("head.weight",)},
        r"all perturbations change alike, as n\^\(-1/2\).*'head.weight'.*gradnorm_scaling must go with rho",
    ),
    "factors swapped": (correct(change=swapped), {}, {"perturbation": INPUT}, "multiply rho"),
    "factors upside down": (
        correct(change=upside_down),
        {},
        {"perturbation": (*INPUT, "head.weight")},
        "multiply rho",
    ),
    "last bias like the others": (
        last_bias_like_the_others,
        {},
        {"update": ("head.bias",), "perturbation": ("head.bias",)},
        r"head.bias: perturbation grows as .*it will blow up",
    ),
    "init_ forgotten": (
        init_forgotten,
        {},
        {"init": ("head.weight",)},
        r"initial weights are not muP's: correct them first.*head.weight: initial weights are n\^\(1/2\) times",
    ),
    "constant initial weights": (
        constant_init,
        {},
        {"init": ("hidden.weight", "head.weight")},
        r"hidden.weight: initial weights are n\^\(1/2\).*head.weight: initial weights are n\^1",
    ),
    "elementwise ASAM with SAM's factors": (
        correct(change=without("variant")),
        ELEMENTWISE,
        {"perturbation": ("hidden.weight", "head.weight")},
        "SAM does not reach this layer",
    ),
    "elementwise ASAM with d of the wrong sign": (
        correct(exponents("mup", (0.5, (0, 0, 0)), "elementwise")),
        ELEMENTWISE,
        {"perturbation": ("first.weight", "hidden.weight", "head.weight")},
        r"vanishes as n\^-1",
    ),
}


@functools.cache
def report_on(mistake, seeds):
    groups, options, _, _ = MISTAKES[mistake]
    return check(Net, WIDTHS, groups=groups, seeds=seeds, **options)


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_and_named(mistake, seeds):
    _, _, expected, advice = MISTAKES[mistake]
    report = report_on(mistake, seeds)
    assert not report.passed
    wrong = {q: {r.name for r in report.rows if q in r.wrong} for q in QUANTITIES}
    for quantity, names in expected.items():
        assert set(names) <= wrong[quantity], str(report)
    printed = str(report)
    assert re.search(advice, printed, re.DOTALL), printed
    assert "FAILED" in printed


@pytest.mark.parametrize(
    "mistake", ["SAM without muP²", "global radius", "gradnorm_scaling lost", "one radius, muP²'s norm"]
)
def test_right_learning_rates_are_not_blamed(mistake):
    assert not any("update" in r.wrong for r in report_on(mistake, 1).rows), str(report_on(mistake, 1))
    assert not any("init" in r.wrong for r in report_on(mistake, 1).rows)

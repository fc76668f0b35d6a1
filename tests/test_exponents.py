"""Closed forms against the paper's tables, typed in here by hand, and against slopes measured at small widths."""

import numpy as np
import pytest

from exponents import QUANTITIES, Row, measure, slopes
from mup2_ref import ROLES, Exponents, exponents, predict

D1 = {  # name: b, c, r, stable, feature learning
    "sp": ((0, 0.5, 0.5), (0, 0, 0), -1, False, False),
    "sp-stable": ((0, 0.5, 0.5), (1, 1, 1), 0.5, True, False),
    "ntp": ((0, 0.5, 0.5), (0, 1, 1), 0.5, True, False),
    "mup": ((0, 0.5, 1), (-1, 0, 1), 0, True, True),
}


@pytest.mark.parametrize("name", D1)
def test_table_d1(name):
    b, c, r, stable, feature_learning = D1[name]
    e = exponents(name, "global")
    p = predict(e)
    assert (e.b, e.c, p.r, p.stable, p.feature_learning) == (b, c, r, stable, feature_learning)


@pytest.mark.parametrize("name", D1)
def test_table_d2(name):
    b, c, *_ = D1[name]
    k = min(b[2], c[2])  # c_nabla
    expected = {
        "naive": (0, (0, 0, 0)),
        "global": (0.5, (0, 0, 0)),
        "effective": (-0.5, (0.5 - k, 1.5 - k, 1.5)),
        "balanced": (0.5, (0.5 - k, 1 - k, 0.5)),
        "first-layer": (-0.5, (0.5 - k, 2.5 - k, 2.5)),
    }
    for perturbation, (d, dl) in expected.items():
        e = exponents(name, perturbation)
        assert (e.d, e.dl) == (d, dl), perturbation


def test_mup2_is_the_row_that_the_paper_is_about():
    assert exponents() == Exponents((0, 0.5, 1), (-1, 0, 1), (-0.5, 0.5, 1.5), -0.5)
    assert exponents("mup", "global").d == 0.5
    assert exponents("sp", "effective")[2:4] == ((0.5, 1.5, 1.5), -0.5)  # "SP-LP" of Figure 1


@pytest.mark.parametrize(
    "perturbation, effect, effective, dominating, stable",
    [
        ("naive", (-1.5, -0.5, 0.5), (), ("output",), False),
        ("global", (-2, -1, 0), ("output",), ("output",), True),
        ("effective", (0, 0, 0), ROLES, ("input",), True),
        ("balanced", (-1, -0.5, 0), ("output",), ROLES, True),
        ("first-layer", (0, -1, -1), ("input",), ("input",), True),
    ],
)
def test_predictions_for_mup(perturbation, effect, effective, dominating, stable):
    p = predict(exponents("mup", perturbation))
    assert (p.effect, p.effective, p.dominating, p.stable) == (effect, effective, dominating, stable)


@pytest.mark.parametrize(
    "variant, perturbed, d, dl",
    [
        ("elementwise", ROLES, -0.5, (-0.5, -0.5, -0.5)),  # d = +1/2, a sign slip in other code, vanishes as 1/n
        ("layerwise", ROLES, 0, (0, 1, 0)),
        ("sam", ("input",), -0.5, None),  # SAM-ON
        ("sam", ("hidden", "output"), 0, (None, 0, 1)),  # F.1: no input-like layer is perturbed
        ("sam", ("output",), 0.5, (None, None, 0.5)),
    ],
)
def test_table_1_and_subsets(variant, perturbed, d, dl):
    e = exponents("mup", "effective", variant, perturbed)
    assert e.d == d
    for mine, theirs in zip(e.dl, dl or ()):
        assert theirs is None or mine == theirs
    assert predict(e).effective == perturbed


def test_sign_slip_of_elementwise_asam_vanishes():
    assert predict(exponents("mup", (0.5, (0, 0, 0)), "elementwise")).effect == (-1, -1, -1)


@pytest.mark.parametrize("b_out_below_1", ["sp-stable", "ntp"])
def test_no_stable_choice_perturbs_early_layers_if_b_out_is_below_1(b_out_below_1):
    p = predict(exponents(b_out_below_1, "effective"))
    assert p.effect == (0, 0, 0) and not p.stable
    assert predict(exponents(b_out_below_1, "global")).stable


@pytest.mark.parametrize("d", [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
@pytest.mark.parametrize("dominating", range(3))
def test_table_f1_regimes(d, dominating):
    """Table F.1: what can be effective is decided by d and by who dominates the norm."""
    gradient = (-0.5, 0, 0.5)
    dl = tuple(g if i == dominating else g + 0.5 for i, g in enumerate(gradient))
    p = predict(exponents("mup", (d, dl)))
    assert p.dominating == (ROLES[dominating],)
    assert (max(p.effect) > 0) == (d < (-0.5, 0, 0.5)[dominating] or any(d < x - 0.5 for x in (-0.5, 0, 0.5)))
    assert ("input" in p.effective) == (d == (-0.5 if dominating == 0 else -1))
    assert ("hidden" in p.effective) == (d == (0 if dominating == 1 else -0.5))
    assert ("output" in p.effective) == (d == (0.5 if dominating == 2 else 0))


def test_constant_in_dl_changes_nothing():
    e = exponents()
    for constant in (0.1, 0.2, 0.3, 0.7, 3):
        assert predict(e._replace(dl=tuple(x + constant for x in e.dl)))[2:] == predict(e)[2:]


@pytest.mark.parametrize("parameterization", D1)
@pytest.mark.parametrize("variant", ["sam", "elementwise", "layerwise"])
def test_global_is_the_largest_stable_radius(parameterization, variant):
    e = exponents(parameterization, "global", variant)
    p, larger = predict(e), predict(e._replace(d=e.d - 0.1))

    def stable(p):  # of the perturbation alone: sp does not train stably with any
        return max(p.effect) <= 0 and e.b[2] - max(p.effect[:2]) >= 1

    assert stable(p) and not stable(larger)
    assert p.stable == (parameterization != "sp")


@pytest.mark.parametrize("c, b, stable", [((0, 1, 0.5), (0, 0.5, 1), False), ((0, 1, 1), (0, 0.5, 0.25), False)])
def test_conditions_of_stability(c, b, stable):
    """c_out >= 1: updates of the last layer; b_out + r >= 1: what the features' movement does to the output."""
    assert predict(Exponents(b, c, (0, 0, 0), 10.0)).stable == stable


def test_before_the_first_update_sp_has_small_output_weights():
    assert predict(exponents("sp"), at_init=True).gradient == (0, 0.5, 0.5)
    assert predict(exponents("sp")).gradient == (0.5, 1, 0.5)


def test_global_of_a_subset():
    assert exponents("mup", "global", "sam", ("input",)).d == -0.5
    assert exponents("mup", "global", "sam", ("input", "hidden")).d == 0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"parameterization": "mup2"}, "unknown parameterization 'mup2'; choose one of 'sp'"),
        ({"perturbation": "local"}, "unknown perturbation 'local'"),
        ({"perturbation": (0, (1, 2))}, "d_in, d_hid, d_out"),
        ({"variant": "asam"}, "unknown variant 'asam'"),
        ({"perturbed": ("norm",)}, "perturbed must name some of"),
    ],
)
def test_unknown_names(kwargs, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        exponents(**kwargs)


@pytest.mark.parametrize(
    "row",
    [
        Row("D.2", "naive", "mup", "naive"),
        Row("D.2", "muP²", "mup", "effective"),
        Row("D.1", "ntp", "ntp", "global"),
        Row("D.1", "sp", "sp", "naive"),
        Row("1", "elementwise", "mup", "effective", "elementwise"),
        Row("1", "layerwise", "mup", "effective", "layerwise"),
        Row("1", "SAM-ON", "mup", "effective", "sam", "norm"),
        Row("A1", "decoupled", "mup", "effective", "sam", "all", "decoupled", 32),
        Row("A1", "decoupled-elementwise", "mup", "effective", "elementwise", "all", "decoupled", 32),
    ],
    ids=lambda row: row.name,
)
def test_measured_slopes(row):
    """The whole set of rows, at larger widths: experiments/exponents.py. Small widths leave finite-size effects."""
    widths = [64, 128, 256, 512]
    values = [[measure(row, width, seed) for seed in range(3)] for width in widths]
    for quantity in QUANTITIES[: 1 if row.perturb == "norm" else 3]:
        slope = slopes(widths, np.array([[v[quantity] for v in by_seed] for by_seed in values]))
        predicted = getattr(row.prediction(), quantity)
        perturbed = ~np.isnan(slope)
        assert np.abs(slope - predicted)[perturbed].max() < 0.15, (quantity, slope, predicted)

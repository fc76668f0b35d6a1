"""Exponents and predictions against the paper's tables, which are typed in here by hand."""

import pytest

import mup2_fused
import mup2_ref
from mup2_ref import ROLES, Exponents

MODULES = pytest.mark.parametrize("module", [mup2_ref, mup2_fused], ids=lambda m: m.__name__)
D1 = {  # name: b, c, stable, feature learning
    "sp": ((0, 0.5, 0.5), (0, 0, 0), False, False),
    "sp-stable": ((0, 0.5, 0.5), (1, 1, 1), True, False),
    "ntp": ((0, 0.5, 0.5), (0, 1, 1), True, False),
    "mup": ((0, 0.5, 1), (-1, 0, 1), True, True),
}


def effective(prediction):
    """The roles whose perturbation has an effect that does not depend on the width."""
    return tuple(role for role, x in zip(ROLES, prediction.effect) if x == 0)


@MODULES
@pytest.mark.parametrize("name", D1)
def test_table_d1(module, name):
    b, c, stable, feature_learning = D1[name]
    e = module.exponents(name, "global")
    p = module.predict(e)
    assert (e.b, e.c, p.stable, p.feature_learning) == (b, c, stable, feature_learning)
    assert (e.parameterization, e.perturbation, e.variant, e.base_optimizer) == (name, "global", "sam", "sgd")


@pytest.mark.parametrize("name", D1)
def test_table_d2(name):
    b, c, *_ = D1[name]
    k = min(b[2], c[2])  # the paper's c_nabla
    expected = {
        "naive": (0, (0, 0, 0)),
        "global": (0.5, (0, 0, 0)),
        "effective": (-0.5, (0.5 - k, 1.5 - k, 1.5)),
        "balanced": (0.5, (0.5 - k, 1 - k, 0.5)),
        "first-layer": (-0.5, (0.5 - k, 2.5 - k, 2.5)),
    }
    for perturbation, (d, dl) in expected.items():
        e = mup2_fused.exponents(name, perturbation)
        assert (e.d, e.dl) == (d, dl), perturbation
        if perturbation in mup2_ref.PERTURBATIONS:
            assert mup2_ref.exponents(name, perturbation) == e


@MODULES
def test_mup2_is_the_row_that_the_paper_is_about(module):
    assert module.exponents() == Exponents((0, 0.5, 1), (-1, 0, 1), (-0.5, 0.5, 1.5), -0.5)
    assert module.exponents("sp", "effective")[2:4] == ((0.5, 1.5, 1.5), -0.5)  # "SP-LP" of Figure 1


@pytest.mark.parametrize(
    "perturbation, effect, dominating, stable",
    [
        ("naive", (-1.5, -0.5, 0.5), ("output",), False),
        ("global", (-2, -1, 0), ("output",), True),
        ("effective", (0, 0, 0), ("input",), True),
        ("balanced", (-1, -0.5, 0), ROLES, True),
        ("first-layer", (0, -1, -1), ("input",), True),
    ],
)
def test_predictions_for_mup(perturbation, effect, dominating, stable):
    e = mup2_fused.exponents("mup", perturbation)
    for p in (mup2_ref.predict(e), mup2_fused.predict(e)):
        assert (p.gradient, p.update) == ((-0.5, 0, 0.5), (0, 0, 0))
        assert (p.effect, p.dominating, p.stable) == (effect, dominating, stable)


def test_adam():
    """Adam's learning rates of muP, and what its updates do: their size does not depend on the gradient's."""
    mup, sp = (mup2_ref.exponents(name, base_optimizer="adam") for name in ("mup", "sp"))
    assert (mup.c, sp.c) == ((0, 1, 1), (0, 0, 0))
    assert mup2_ref.predict(mup).update == (0, 0, 0) and mup2_ref.predict(mup).feature_learning
    assert mup2_ref.predict(sp).update == (0, 1, 1) and not mup2_ref.predict(sp).stable
    assert (mup.d, mup.dl) == (mup2_ref.exponents().d, mup2_ref.exponents().dl), "the climb never uses Adam's scaling"
    for module in (mup2_ref, mup2_fused):
        with pytest.raises(ValueError, match="ntp"):
            module.exponents("ntp", base_optimizer="adam")


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
    e = mup2_fused.exponents("mup", "effective", variant, perturbed=perturbed)
    assert e.d == d
    for mine, theirs in zip(e.dl, dl or ()):
        assert theirs is None or mine == theirs
    assert effective(mup2_fused.predict(e, perturbed=perturbed)) == perturbed
    if perturbed == ROLES:
        assert e == mup2_ref.exponents("mup", "effective", variant)


def test_the_sign_slip_of_elementwise_asam_vanishes():
    e = mup2_fused.exponents("mup", (0.5, (0, 0, 0)), "elementwise")
    assert mup2_ref.predict(e).effect == (-1, -1, -1)


@pytest.mark.parametrize("name", ["sp-stable", "ntp"])
def test_no_stable_choice_perturbs_early_layers_if_b_out_is_below_1(name):
    p = mup2_ref.predict(mup2_ref.exponents(name, "effective"))
    assert p.effect == (0, 0, 0) and not p.stable
    assert mup2_ref.predict(mup2_ref.exponents(name, "global")).stable


@pytest.mark.parametrize("dominating", range(3))
def test_table_f1_regimes(dominating):
    """What can be effective is decided by d and by the layer that dominates the norm."""
    gradient = (-0.5, 0, 0.5)
    dl = tuple(g if i == dominating else g + 0.5 for i, g in enumerate(gradient))
    for d in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1):
        p = mup2_ref.predict(mup2_fused.exponents("mup", (d, dl)))
        assert p.dominating == (ROLES[dominating],)
        assert (max(p.effect) > 0) == (d < (-0.5, 0, 0.5)[dominating] or any(d < x - 0.5 for x in (-0.5, 0, 0.5)))
        assert ("input" in effective(p)) == (d == (-0.5 if dominating == 0 else -1))
        assert ("hidden" in effective(p)) == (d == (0 if dominating == 1 else -0.5))
        assert ("output" in effective(p)) == (d == (0.5 if dominating == 2 else 0))


def test_a_constant_added_to_dl_changes_nothing():
    e = mup2_ref.exponents()
    for constant in (0.1, 0.2, 0.3, 0.7, 3):
        assert mup2_ref.predict(e._replace(dl=tuple(x + constant for x in e.dl))) == mup2_ref.predict(e)


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
@pytest.mark.parametrize("name", D1)
def test_global_is_the_largest_stable_radius(name, variant):
    e = mup2_ref.exponents(name, "global", variant)
    p, larger = mup2_ref.predict(e), mup2_ref.predict(e._replace(d=e.d - 0.1))

    def stable(p):  # the perturbation alone: "sp" does not train stably with any radius
        return max(p.effect) <= 0 and e.b[2] - max(p.effect[:2]) >= 1

    assert stable(p) and not stable(larger)
    assert p.stable == (name != "sp")


@pytest.mark.parametrize("c, b", [((0, 1, 0.5), (0, 0.5, 1)), ((0, 1, 1), (0, 0.5, 0.25))])
def test_conditions_of_stability(c, b):
    """c_out >= 1 bounds the last layer's updates; b_out + r >= 1 bounds what moving features do to the output."""
    assert not mup2_ref.predict(Exponents(b, c, (0, 0, 0), 10.0)).stable


def test_before_the_first_update_sp_has_small_output_weights():
    sp = mup2_fused.exponents("sp")
    assert mup2_fused.predict(sp, at_init=True).gradient == (0, 0.5, 0.5)
    assert mup2_fused.predict(sp, at_init=True).update == (-0.5, 0.5, 1)
    assert mup2_fused.predict(sp).gradient == (0.5, 1, 0.5)


def test_global_of_a_subset():
    assert mup2_fused.exponents("mup", "global", perturbed=("input",)).d == -0.5
    assert mup2_fused.exponents("mup", "global", perturbed=("input", "hidden")).d == 0


@MODULES
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("mup2", {"parameterization": "mup2"}),
        ("local", {"perturbation": "local"}),
        ("asam", {"variant": "asam"}),
        ("adamw", {"base_optimizer": "adamw"}),
        ("both", {"norm": "both"}),
    ],
)
def test_unknown_names(module, name, kwargs):
    with pytest.raises(ValueError, match=f"{name}.*choose one of"):
        module.exponents(**kwargs)


def test_wrong_perturbations_of_the_product():
    with pytest.raises(ValueError, match="d_in, d_hid, d_out"):
        mup2_fused.exponents(perturbation=(0, (1, 2)))
    with pytest.raises(ValueError, match="perturbed must name some of"):
        mup2_fused.exponents(perturbed=("norm",))

"""Groups and initial weights of the reference: factors typed in by hand, and those of the product."""

import itertools

import pytest
import torch
from small_problems import by_name
from torch import nn

import mup2_fused
import mup2_ref


def net(width, hidden=None):
    """Every kind of module that the reference knows. hidden: another width, so that dimensions may grow differently."""
    hidden = hidden or width
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(11, width),
            "conv": nn.Conv2d(3, width, 3),
            "norm": nn.BatchNorm2d(width),
            "hidden": nn.Linear(width, hidden),
            "output": nn.Linear(hidden, 5),
        }
    )


INPUT = ("embedding.weight", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "hidden.bias")
ROLES = dict.fromkeys(INPUT, "input") | {"hidden.weight": "hidden", "output.weight": "output", "output.bias": "finite"}
R = {"input": 4, "hidden": 1, "output": 1 / 4, "finite": 1}  # fan_out / fan_in, at four times the base width
S = {"input": 1, "hidden": 1 / 2, "output": 1 / 4, "finite": 1}  # relative initial scale


@pytest.mark.parametrize("base_optimizer", ["sgd", "adam"])
def test_mup2_at_four_times_the_base_width(base_optimizer):
    """THE table of Algorithm 1: rho is multiplied by r, the norm's part by sqrt(r), SGD's learning rate by r."""
    scaling = mup2_ref.exponents(base_optimizer=base_optimizer)
    groups = by_name(mup2_ref.param_groups(net(32), net(8), scaling, lr=0.1, rho=0.2, weight_decay=0.01))
    assert {name: group["role"] for name, group in groups.items()} == ROLES
    for group in groups.values():
        role = group["role"]
        lr = R[role] if base_optimizer == "sgd" else {"hidden": 1 / 4, "output": 1 / 4}.get(role, 1)
        assert group["rho"] == pytest.approx(0.2 * R[role], rel=1e-14)
        assert group["gradnorm_scaling"] == pytest.approx(R[role] ** 0.5, rel=1e-14)
        assert group["lr"] == pytest.approx(0.1 * lr, rel=1e-14)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * 0.01, rel=1e-14)
        assert group["perturb"] is True and group["variant"] == "sam"


@pytest.mark.parametrize("variant", ["elementwise", "layerwise"])
def test_adaptive_variants_divide_by_the_growth_of_t(variant):
    groups = by_name(mup2_ref.param_groups(net(32), net(8), mup2_ref.exponents(variant=variant), lr=1, rho=1))
    fans = {"input": 4, "hidden": 16, "output": 4, "finite": 1}  # fan_out * fan_in, relative to the base
    for name, group in groups.items():
        role = group["role"]
        t = S[role] * (fans[role] ** 0.5 if variant == "layerwise" else 1)
        assert group["rho"] == pytest.approx(R[role] / t**2, rel=1e-14), name
        assert group["gradnorm_scaling"] == pytest.approx(R[role] ** 0.5 / t, rel=1e-14), name


def test_definition_4_at_base_width_1():
    """The paper's MLP: rho n^(-d - d_l) and, in the joint norm, n^(-d_l)."""
    n, model, base = 64, mup2_ref.MLP(7, 64, 3), mup2_ref.MLP(7, 1, 3)
    groups = mup2_ref.param_groups(model, base, mup2_ref.exponents(norm="joint"), lr=1, rho=1)
    assert [g["role"] for g in groups] == ["input", "hidden", "output"]
    assert [g["rho"] for g in groups] == pytest.approx([n, 1, 1 / n], rel=1e-14)
    assert [g["gradnorm_scaling"] for g in groups] == pytest.approx([n**0.5, n**-0.5, n**-1.5], rel=1e-14)
    assert [g["lr"] for g in groups] == pytest.approx([n, 1, 1 / n], rel=1e-14)


@pytest.mark.parametrize("width, hidden", [(32, 32), (8, 8), (4, 4), (32, 16)])
def test_the_same_groups_as_the_product(width, hidden):
    """The base model may be on the meta device."""
    with torch.device("meta"):
        base = net(8)
    names = itertools.product(mup2_ref.PARAMETERIZATIONS, mup2_ref.PERTURBATIONS, mup2_ref.VARIANTS)
    compared = 0
    for row, norm, base_optimizer in itertools.product(names, ("decoupled", "joint"), ("sgd", "adam")):
        if base_optimizer == "adam" and row[0] not in ("sp", "mup"):
            continue
        scaling = mup2_ref.exponents(*row, base_optimizer=base_optimizer, norm=norm)
        arguments = (net(width, hidden), base, scaling)
        settings = dict(lr=0.1, rho=0.2, weight_decay=0.01)
        try:
            mine = mup2_ref.param_groups(*arguments, **settings)
        except ValueError as error:
            assert "one width" in str(error) and width != hidden
            with pytest.raises(ValueError):
                mup2_fused.param_groups(*arguments, **settings)
            continue
        theirs = mup2_fused.param_groups(*arguments, **settings)
        assert mine[0].keys() == theirs[0].keys()
        theirs = by_name(theirs)
        for name, group in by_name(mine).items():
            for key in ("role", "variant", "perturb"):
                assert group[key] == theirs[name][key]
            for key in ("lr", "rho", "gradnorm_scaling", "weight_decay"):
                assert group[key] == pytest.approx(theirs[name][key], rel=1e-13), (name, key, scaling)
        compared += 1
    assert compared >= 30


def test_at_the_base_width_everything_is_plain_sam():
    for parameterization, variant in itertools.product(mup2_ref.PARAMETERIZATIONS, mup2_ref.VARIANTS):
        scaling = mup2_ref.exponents(parameterization, "effective", variant)
        (group,) = mup2_ref.param_groups(net(8), net(8), scaling, lr=0.1, rho=0.2)
        assert (group["lr"], group["rho"], group["gradnorm_scaling"]) == (0.1, 0.2, 1.0)


@pytest.mark.parametrize("parameterization, output_scale", [("mup", 1 / 4), ("sp", 1 / 2)])
def test_initial_weights(parameterization, output_scale):
    """n^(-b_l) times the base width's standard deviation sqrt(2 / fan_in); embeddings and norms stay, biases are 0."""
    model, base = net(1024), net(256)
    kept = model["embedding"].weight.detach().clone()
    assert mup2_ref.init_(model, base, mup2_ref.exponents(parameterization)) is model
    expected = {"conv": (2 / 27) ** 0.5, "hidden": (2 / 256) ** 0.5 / 2, "output": (2 / 256) ** 0.5 * output_scale}
    for name, std in expected.items():
        assert model[name].weight.std().item() == pytest.approx(std, rel=0.05), name
        assert not model[name].bias.any()
    assert torch.equal(model["embedding"].weight, kept) and (model["norm"].weight == 1).all()


def test_initial_weights_of_a_layer_whose_fans_grow_differently():
    """In muP std is multiplied by min(1, sqrt(fan_out / fan_in)), for hidden layers only."""
    std = lambda *fans, name="mup": mup2_ref.initial_std(mup2_ref.Growth(*fans), mup2_ref.exponents(name))
    assert std(2, 4) == pytest.approx(0.5 * 0.5**0.5) and std(4, 2) == pytest.approx(0.5**0.5)
    assert std(2, 4, name="sp") == 0.5 and std(0.5, 1) == 1 and std(1, 4) == 0.25


def test_algorithm_1_from_the_mup_package():
    """Tensors with two infinite dimensions have r = 1; those with one have r = m, MuReadout's weight, too."""
    mup = pytest.importorskip("mup")

    def make(width):
        return nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), mup.MuReadout(width, 3))

    model = mup.set_base_shapes(make(64), make(16), delta=make(32))
    groups = by_name(mup2_ref.param_groups(model, None, lr=1, rho=1))
    factors = {name: group["rho"] for name, group in groups.items()}
    assert factors == {"0.weight": 4, "0.bias": 4, "2.weight": 1, "2.bias": 4, "3.weight": 4, "3.bias": 1}
    theirs = by_name(mup2_fused.param_groups(model, lr=1, rho=1))
    for key in ("rho", "gradnorm_scaling", "lr"):
        assert {n: g[key] for n, g in groups.items()} == pytest.approx({n: g[key] for n, g in theirs.items()})


def test_unknown_modules_point_to_the_product():
    class Raw(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(n, n))

    with pytest.raises(ValueError, match=r"Raw: mup2_fused knows more modules"):
        mup2_ref.param_groups(Raw(4), Raw(2), lr=1, rho=1)

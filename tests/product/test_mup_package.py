"""Models of the mup package: factors from p.infshape, MuReadout's convention, MuSGD and MuAdam as base optimizers."""

import copy

import pytest
import torch
from small_problems import assert_close, by_name, equal, train_closure
from torch import nn

from experiments import networks
from mup2_fused import SAM, exponents, init_, param_groups, report
from mup2_fused.check import check

mup = pytest.importorskip("mup", reason="pip install mup")

BASE, WIDE, M = 8, 32, 4


def mlp(n, readout=nn.Linear):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, n), nn.Tanh(), nn.Linear(n, 2 * n), nn.Tanh(), nn.Linear(2 * n, n), readout(n, 5)
    )


def resnet(n, readout=nn.Linear):
    return networks.ResNet18(n, 5, readout=readout)


def vit(n, readout=nn.Linear):
    return networks.ViT(n, 2, 4, image=4, patch=2, classes=5, base_head_dim=BASE // 4, readout=readout)


NETWORKS = {"mlp": mlp, "resnet": resnet, "vit": vit}


def with_infshapes(build, n=WIDE, base=BASE):
    """As mup's users make a model."""
    model = build(n, mup.MuReadout)
    return mup.set_base_shapes(model, build(base, mup.MuReadout), delta=build(2 * base, mup.MuReadout))


def batch(dtype=torch.float64):
    return torch.randn(6, 3, 4, 4, dtype=dtype), torch.randint(5, (6,))


def growth(p):
    """r of the paper's Algorithm 1, by infinite dimensions: 1, the multiplier, the growth of fan_out / fan_in."""
    sizes = [(d.dim, d.base_dim) for d in p.infshape if d.base_dim is not None]
    if len(sizes) == 2:
        (out, out0), (inp, inp0) = sizes
        return (out / inp) * (inp0 / out0)
    return sizes[0][0] / sizes[0][1] if sizes else 1.0


def uneven(n, readout=nn.Linear):
    """Its middle grows with n², so that the first hidden layer's fan_out grows more than its fan_in."""
    k = n * n // 16
    return nn.Sequential(nn.Flatten(), nn.Linear(48, n), nn.Tanh(), nn.Linear(n, k), nn.Linear(k, n), readout(n, 5))


@pytest.mark.parametrize("network", [*NETWORKS, "uneven"])
def test_step_equals_algorithm_1(network):
    model = with_infshapes(NETWORKS.get(network, uneven)).double()
    r = {name: growth(p) for name, p in model.named_parameters()}
    assert set(r.values()) == {1.0, 4.0, 16.0, 0.25} if network == "uneven" else {1.0, 4.0}
    opt = SAM(param_groups(model, lr=0.1, rho=0.3))
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norm = sum((r[name] ** 0.5 * p.grad.norm()) ** 2 for name, p in model.named_parameters()) ** 0.5
    opt.first_step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p - before[name], 0.3 * r[name] * p.grad / norm, rtol=1e-9, atol=1e-13)
    opt.second_step()
    for name, p in model.named_parameters():  # MuSGD's learning rate is the same multiple
        torch.testing.assert_close(p - before[name], -0.1 * r[name] * p.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("perturbation", ["naive", "global"])
def test_naive_and_global_are_plain_sam(perturbation):
    """The readout's gradient is 1/n smaller here, so that hidden layers dominate and one radius is stable."""
    groups = param_groups(with_infshapes(vit), None, exponents("mup", perturbation), lr=0.1, rho=0.3)
    assert {(g["rho"], g["gradnorm_scaling"]) for g in groups} == {(0.3, 1.0)}
    assert len({g["lr"] for g in groups}) > 1
    for name, perturb in (("ntp", "all"), ("mup", lambda name, p: p.ndim < 2)):
        with pytest.raises(ValueError, match="mup.MuReadout, 'global' needs 'mup' and all roles"):
            param_groups(with_infshapes(mlp), None, exponents(name, "global"), lr=0.1, rho=0.3, perturb=perturb)


SCALINGS = {  # (perturbation, variant, norm) and which parameters are perturbed
    "sam": (("effective", "sam", "decoupled"), "all"),
    "elementwise": (("effective", "elementwise", "decoupled"), "all"),
    "layerwise": (("effective", "layerwise", "decoupled"), "all"),
    "joint": (("effective", "sam", "joint"), "all"),
    "balanced": (("balanced", "sam", "joint"), "all"),
    "first-layer": (("first-layer", "layerwise", "joint"), "all"),
    "readout only": (("effective", "sam", "decoupled"), lambda name, p: "head" in name or name.startswith("6")),
}
KINDS = {  # eps would weigh differently in the two conventions
    "sgd": (torch.optim.SGD, dict(momentum=0.9)),
    "adam": (torch.optim.AdamW, dict(eps=1e-30)),
}


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("network, scaling", [*(("mlp", name) for name in SCALINGS), ("vit", "sam"), ("vit", "joint")])
def test_trajectories_do_not_depend_on_the_convention(network, scaling, base):
    """W = m V: five steps from the same function, with momentum or moments and weight decay, in float64."""
    build, ((perturbation, variant, norm), perturb) = NETWORKS[network], SCALINGS[scaling]
    e = exponents("mup", perturbation, variant, norm=norm, base_optimizer=base)
    theirs, ours, base_model = with_infshapes(build).double(), build(WIDE).double(), build(BASE)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.copy_(q)
        readouts = [list(m.modules())[-1] for m in (ours, theirs)] if network == "mlp" else [ours.head, theirs.head]
        a = readouts[1].width_mult()
        assert isinstance(readouts[1], mup.MuReadout) and a == M
        readouts[0].weight.div_(a)
    x, y = batch()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-13)
    kind, kwargs = KINDS[base]
    losses = []
    for model, base_or_none in ((ours, base_model), (theirs, None)):
        groups = param_groups(model, base_or_none, e, lr=0.02, rho=0.1, weight_decay=0.1, perturb=perturb)
        opt = SAM(groups, kind, **kwargs)
        losses.append([opt.step(train_closure(opt, model, x, y)).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][0] != losses[0][-1]
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        scale = a if p is readouts[0].weight else 1
        torch.testing.assert_close(p * scale, q, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("network", NETWORKS)
def test_init_gives_the_same_function_in_both_conventions(network):
    theirs, ours, base = with_infshapes(NETWORKS[network]), NETWORKS[network](WIDE), NETWORKS[network](BASE)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        q.data.copy_(p)  # what is not drawn
    for model, other in ((ours, base), (theirs, None)):
        torch.manual_seed(1)
        init_(model, other)
    for model in (ours, theirs):
        model.eval()
    x, _ = batch(torch.float32)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-6) and ours(x).std() > 0.01


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_mup_optimizers_as_base(network, base):
    """They split and reorder groups and scale the learning rates; the result is that of scaled groups."""
    x, y = batch()
    model = with_infshapes(NETWORKS[network]).double()
    other = with_infshapes(NETWORKS[network]).double()  # as mup's attributes do not survive a deepcopy
    other.load_state_dict(model.state_dict())
    kwargs = dict(weight_decay=0.1)
    scaling = exponents(base_optimizer=base)
    scaled = param_groups(model, None, scaling, lr=0.05, rho=0.2, **kwargs)
    bare = param_groups(other, None, scaling, lr=None, rho=0.2)
    assert all("lr" not in g and "weight_decay" not in g for g in bare) and "-" in report(bare)
    torch_kind, mup_kind = {"sgd": (torch.optim.SGD, mup.MuSGD), "adam": (torch.optim.AdamW, mup.MuAdamW)}[base]
    with pytest.raises(ValueError, match=r"scaled already: make them with param_groups\(lr=None\)"):
        SAM(scaled, mup_kind)
    a, b = SAM(scaled, torch_kind), SAM(bare, mup_kind, lr=0.05, **kwargs)
    assert type(b.base_optimizer) is torch_kind and all("gradnorm_scaling" in g for g in b.param_groups)
    for opt, m in ((a, model), (b, other)):
        for _ in range(3):
            opt.step(train_closure(opt, m, x, y))
    assert_close(model.parameters(), other.parameters())
    again = SAM(param_groups(model, None, scaling, lr=None, rho=0.1), mup_kind, lr=0.01, **kwargs)
    again.load_state_dict(copy.deepcopy(b.state_dict()))  # their order of groups is a function of the model
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in b.param_groups]
    model.load_state_dict(other.state_dict())
    for opt, m in ((again, model), (b, other)):
        opt.step(train_closure(opt, m, x, y))
    assert equal(model.parameters(), other.parameters())


def test_plain_sam_in_muP_with_mup_alone():
    model = with_infshapes(mlp)
    opt = SAM(model.parameters(), mup.MuSGD, lr=0.05, rho=0.2, momentum=0.9)
    assert len({g["lr"] for g in opt.param_groups}) > 1 and {g["rho"] for g in opt.param_groups} == {0.2}
    opt.step(train_closure(opt, model, *batch(torch.float32)))


class Shared(nn.Module):
    def __init__(self, n, readout=None):
        super().__init__()
        self.embed = nn.Embedding(11, n)
        self.hidden = nn.Linear(n, n)
        self.head = mup.MuSharedReadout(self.embed.weight, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embed(x))))


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_a_readout_shared_with_the_embedding_needs_no_word(base):
    model = mup.set_base_shapes(Shared(WIDE), Shared(BASE), delta=Shared(2 * BASE))
    groups = param_groups(model, None, exponents(base_optimizer=base), lr=1.0, rho=1.0)
    [g] = [g for g in groups if "embed.weight" in g["names"]]
    assert (g["rho"], g["gradnorm_scaling"], g["lr"]) == (M, M**0.5, M if base == "sgd" else 1)


class Raw(nn.Module):
    def __init__(self, n, rows=BASE):
        super().__init__()
        self.table, self.matrix = nn.Parameter(torch.randn(7, n)), nn.Parameter(torch.randn(2 * n, n))
        self.side = nn.Parameter(torch.randn(rows, n))
        self.up = nn.ConvTranspose2d(n, n, 2, groups=n)


def test_raw_parameters_mean_what_they_mean_to_mup():
    model = mup.set_base_shapes(Raw(WIDE), Raw(BASE), delta=Raw(2 * BASE, 2 * BASE))
    groups = by_name(param_groups(model, lr=1.0, rho=1.0, roles={"up.weight": "input"}))
    assert (groups["table"]["rho"], groups["matrix"]["rho"]) == (M, 1)
    assert groups["side"]["rho"] == 1 / M, "its rows are a width that is at its base"
    rates = {p: g["lr"] for g in mup.MuSGD(model.parameters(), lr=1.0).param_groups for p in g["params"]}
    assert all(rates[model.get_parameter(n)] == groups[n]["lr"] for n in ("table", "matrix", "side"))
    with pytest.raises(ValueError, match=r"role of 'up.weight'"):  # depthwise or not: shapes do not tell
        param_groups(model, lr=1.0, rho=1.0)


def test_init_of_raw_parameters():
    """A depthwise weight is an input layer, which keeps its values where its fan_in is not known."""
    model = mup.set_base_shapes(Raw(WIDE), Raw(BASE), delta=Raw(2 * BASE, 2 * BASE))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    init_(model, gain=1.0, roles={"up.weight": "input"})
    assert torch.equal(model.table, before["table"]) and torch.equal(model.up.weight, before["up.weight"])
    assert model.matrix.std().item() == pytest.approx(WIDE**-0.5, rel=0.05)
    with pytest.raises(ValueError, match=r"fan_in of 'up.weight' .* pass the base model"):
        init_(model, roles={"up.weight": "hidden"})


def test_without_infshapes():
    model = with_infshapes(mlp)
    with pytest.raises(ValueError, match=r"'1.weight' has no infshape. Pass the base model, or call mup.set"):
        param_groups(copy.deepcopy(model), lr=1.0, rho=1.0)
    with pytest.raises(ValueError, match="no infshape"):
        init_(nn.Linear(3, 4))


@pytest.mark.parametrize("scaling", [exponents(), exponents(norm="joint"), exponents(variant="elementwise")])
def test_with_base_model_too(scaling):
    """A base model of the same base, with or without shapes of its own, or another base that is noted in both."""

    def factors(model, base):
        groups = param_groups(model, base, scaling, lr=1.0, rho=1.0)
        return {f"{n} {k}": g[k] for g in groups for n in g["names"] for k in ("lr", "rho", "gradnorm_scaling")}

    model = with_infshapes(mlp)
    expected = factors(model, None)
    assert expected["6.weight lr"] == M
    for base in (mlp(BASE, mup.MuReadout), with_infshapes(mlp, BASE)):
        assert factors(model, base) == pytest.approx(expected)
    narrower, wider = with_infshapes(mlp, base=4), with_infshapes(mlp, 8, base=4)
    assert factors(narrower, wider) == pytest.approx(expected)
    factors(with_infshapes(mlp, 112, base=48), with_infshapes(mlp, 80, base=48))  # quotients that floats round
    with pytest.raises(ValueError, match="'6.weight' divides its input by 8, .* but its fan_in grows by 4"):
        factors(narrower, mlp(BASE, mup.MuReadout))


def with_mup(readout):
    build = lambda n: nn.Sequential(nn.Linear(20, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), readout(n, 10))
    return lambda n: mup.set_base_shapes(build(n), build(32), delta=build(64), do_assert=False)


def test_the_perturbation_check():
    def mu_sgd(model):
        return mup.MuSGD(param_groups(model, lr=None, rho=0.02), lr=0.02).param_groups

    widths = [32, 64, 128, 256]
    assert check(with_mup(mup.MuReadout), widths, groups=mu_sgd).passed
    for some in (widths, [64, 128, 256], [8, 16, 32]):  # wherever mup's base is
        report = check(with_mup(mup.MuReadout), some)
        assert report.passed and [r.role for r in report.rows[::2]][:3] == ["input", "hidden", "output"], str(report)
    forgotten = check(with_mup(nn.Linear), widths, groups=mu_sgd)  # for it, MuSGD takes m where 1/m belongs
    assert [r.name for r in forgotten.rows if "update" in r.wrong] == ["4.weight"], str(forgotten)

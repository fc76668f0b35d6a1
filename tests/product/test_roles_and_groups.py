"""Roles, factors and initial weights of any module, against the spectral rule.

That the factors are Algorithm 1's is in tests/reference, and that steps are Algorithm 1's in test_mup_package.py.
"""

import itertools
import pickle
import warnings

import pytest
import torch
from small_problems import VARIANTS, Raw, Tied, by_name
from torch import nn

from mup2_fused import MLP, SAM, exponents, init_, param_groups, predict, report
from mup2_fused.check.run import tied
from mup2_ref import MUP2

BASE, WIDE, M = 8, 32, 4
PERTURBATIONS = ("naive", "global", "effective", "balanced", "first-layer", (0.3, (1, 2, 3)))
INPUT, HIDDEN = ("input", M, M, M**0.5), ("hidden", 1, 1, 1)
OUTPUT, FINITE = ("output", 1 / M, 1 / M, M**-0.5), ("finite", 1, 1, 1)


def factors(model, base, scaling=MUP2, **kwargs):
    """name -> (role, factor of lr, factor of rho, gradnorm_scaling)"""
    groups = by_name(param_groups(model, base, scaling, lr=1.0, rho=1.0, **kwargs))
    return {name: (g["role"], g["lr"], g["rho"], g["gradnorm_scaling"]) for name, g in groups.items()}


def pair(build):
    """(model, base model), without values."""
    with torch.device("meta"):
        return build(WIDE), build(BASE)


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.embed = nn.Linear(5, n)
        self.position = nn.Parameter(torch.zeros(1, 4, n))
        self.norm = nn.LayerNorm(n)
        self.attention = nn.MultiheadAttention(n, 2, batch_first=True)
        self.head = nn.Linear(n, 3)

    def forward(self, x):
        x = self.norm(self.embed(x) + self.position)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


EXPECTED = {
    "mlp": (lambda n: MLP(5, n, 3), {"layers.0.weight": INPUT, "layers.1.weight": HIDDEN, "layers.2.weight": OUTPUT}),
    "first linear": (lambda n: nn.Linear(5, n), {"weight": INPUT, "bias": INPUT}),
    "last linear": (lambda n: nn.Linear(n, 3), {"weight": OUTPUT, "bias": FINITE}),
    "nothing grows": (lambda n: nn.Linear(5, 3), {"weight": FINITE, "bias": FINITE}),
    "hidden linear": (lambda n: nn.Linear(n, 4 * n), {"weight": HIDDEN, "bias": INPUT}),
    "hidden conv": (lambda n: nn.Conv2d(n, 2 * n, 3), {"weight": HIDDEN, "bias": INPUT}),
    "last conv": (lambda n: nn.Conv1d(n, 3, 5), {"weight": OUTPUT, "bias": FINITE}),
    "depthwise": (lambda n: nn.Conv2d(n, n, 3, groups=n), {"weight": INPUT, "bias": INPUT}),  # fan_in is 9
    "grouped": (lambda n: nn.Conv2d(n, n, 3, groups=4), {"weight": HIDDEN, "bias": INPUT}),
    "first transposed": (lambda n: nn.ConvTranspose2d(3, n, 2), {"weight": INPUT, "bias": INPUT}),
    "hidden transposed": (lambda n: nn.ConvTranspose2d(n, n, 2), {"weight": HIDDEN, "bias": INPUT}),
    "last transposed": (lambda n: nn.ConvTranspose2d(n, 3, 2), {"weight": OUTPUT, "bias": FINITE}),
    "depthwise transposed": (lambda n: nn.ConvTranspose2d(n, n, 2, groups=n), {"weight": INPUT, "bias": INPUT}),
    "embedding": (lambda n: nn.Embedding(11, n), {"weight": INPUT}),
    "embedding bag": (lambda n: nn.EmbeddingBag(11, n), {"weight": INPUT}),
    "layer norm of images": (lambda n: nn.LayerNorm([n, 4, 4]), {"weight": INPUT, "bias": INPUT}),
    "layer norm": (lambda n: nn.LayerNorm(n), {"weight": INPUT, "bias": INPUT}),
    "batch norm": (lambda n: nn.BatchNorm2d(n), {"weight": INPUT, "bias": INPUT}),
    "group norm": (lambda n: nn.GroupNorm(2, n), {"weight": INPUT, "bias": INPUT}),
    "prelu": (lambda n: nn.PReLU(), {"weight": FINITE}),
    "lstm": (
        lambda n: nn.LSTM(5, n),
        {"weight_ih_l0": INPUT, "weight_hh_l0": HIDDEN, "bias_ih_l0": INPUT, "bias_hh_l0": INPUT},
    ),
    "attention": (
        lambda n: nn.MultiheadAttention(n, 2),
        {"in_proj_weight": HIDDEN, "in_proj_bias": INPUT, "out_proj.weight": HIDDEN, "out_proj.bias": INPUT},
    ),
    "positions": (lambda n: Raw(1, 7, n), {"w": INPUT}),
    "class token": (lambda n: Raw(1, 1, n), {"w": INPUT}),
    "layer scale": (lambda n: Raw(n, 1, 1), {"w": INPUT}),
    "raw vector": (lambda n: Raw(n), {"w": INPUT}),
    "raw constant": (lambda n: Raw(5, 7), {"w": FINITE}),
    "raw scalar": (lambda n: Raw(), {"w": FINITE}),
}


@pytest.mark.filterwarnings("ignore:raw vectors")  # the names here do not tell what they are
@pytest.mark.parametrize("kind", EXPECTED)
def test_roles_and_factors(kind):
    build, expected = EXPECTED[kind]
    found = factors(*pair(build))
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert found[name] == pytest.approx(want), name


def test_ambiguous_tensors_name_the_parameter_and_the_remedy():
    for shape in (lambda n: (n, n), lambda n: (3, n), lambda n: (n, 1), lambda n: (2, n, n)):
        model, base = pair(lambda n, shape=shape: nn.Sequential(nn.ReLU(), Raw(*shape(n))))
        with pytest.raises(ValueError, match=r"role of '1\.w'.*Pass roles=\{'1\.w': role\}"):
            param_groups(model, base, lr=1, rho=1)
        with pytest.raises(ValueError, match=r"role of '1\.w'"):
            init_(model, base)


@pytest.mark.parametrize(
    "kind, args",
    [
        (nn.Linear, lambda n: (n, n)),
        (nn.Conv1d, lambda n: (n, n, 3)),
        (nn.LSTM, lambda n: (n, n)),
        (nn.MultiheadAttention, lambda n: (n, 2)),
        (nn.LayerNorm, lambda n: (n,)),
    ],
)
def test_tensors_that_users_add_to_classes_of_torch_need_a_word(kind, args):
    def own(n):
        module = type("Mine", (kind,), {})(*args(n))
        module.extra = nn.Parameter(torch.randn(n, 4))
        module.stack = nn.Parameter(torch.randn(2, n, n))
        return module

    model, base = pair(own)
    for words in ({}, {"extra": "output"}, {"stack": "hidden"}):
        with pytest.raises(ValueError, match="cannot tell the role of '(extra|stack)'"):
            factors(model, base, roles=words)
    found, plain = (
        factors(model, base, roles={"extra": "output", "stack": "hidden"}),
        factors(*pair(lambda n: kind(*args(n)))),
    )
    assert found == plain | {"extra": OUTPUT, "stack": HIDDEN}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_dimensions_without_elements():
    build = lambda n: nn.Sequential(nn.Linear(0, n), nn.Linear(n, 3))
    assert factors(*pair(build)) == {"0.weight": INPUT, "0.bias": INPUT, "1.weight": OUTPUT, "1.bias": FINITE}
    init_(*pair(build))


def test_a_word_settles_it():
    for shape, expected in (
        (lambda n: (n, n), HIDDEN),
        (lambda n: (3, n), INPUT),
        (lambda n: (3, n), OUTPUT),
        (lambda n: (n, 3), OUTPUT),
        (lambda n: (n, 3), FINITE),
    ):
        model, base = pair(lambda n, shape=shape: Raw(*shape(n)))
        assert factors(model, base, roles={"w": expected[0]})["w"] == pytest.approx(expected)


def test_a_word_keeps_what_the_module_tells_of_its_layout():
    transposed = nn.ConvTranspose2d(32, 16, 2), nn.ConvTranspose2d(8, 8, 2)
    assert factors(*transposed)["weight"] == factors(*transposed, roles={"weight": "hidden"})["weight"]
    assert factors(*transposed)["weight"][2] == pytest.approx((16 / 8) / (32 / 8))
    more_classes = nn.Linear(32, 100), nn.Linear(8, 10)
    assert factors(*more_classes, roles={"weight": "output", "bias": "finite"})["weight"] == pytest.approx(OUTPUT)


def test_wrong_words():
    model, base = pair(lambda n: nn.Linear(n, 3))
    with pytest.raises(ValueError, match="does not have: .'wieght'"):
        factors(model, base, roles={"wieght": "output"})
    with pytest.raises(ValueError, match="'weight' the role 'readout'; take 'input', 'hidden', 'output' or 'finite'"):
        factors(model, base, roles={"weight": "readout"})
    with pytest.raises(ValueError, match="role of 'bias' .* and roles says 'hidden'"):
        factors(model, base, roles={"bias": "hidden"})


def test_tied_weights_need_a_word():
    model, base = Tied(WIDE), Tied(BASE)
    assert tied(model) == {"embed.weight"} and tied(MLP(5, 4, 3)) == set()
    with pytest.raises(ValueError, match=r"'embed.weight' \(input\) and 'head.weight' \(output\) are one tied tensor"):
        param_groups(model, base, lr=1, rho=1)
    assert factors(model, base, roles={"embed.weight": "input"}) == {"embed.weight": pytest.approx(INPUT)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mlp_factors_are_powers_of_the_width(variant):
    """Definition 4; and with the decoupled norm n^(-G_l - t_l), so that every layer contributes Theta(1)."""
    model, base = pair(lambda n: MLP(5, n, 3))
    rows = itertools.product(("sp", "sp-stable", "ntp", "mup"), PERTURBATIONS, ("joint", "decoupled"))
    for parameterization, perturbation, norm in rows:
        e = exponents(parameterization, perturbation, variant, norm=norm)
        layerwise = (0.5 - e.b[0], 1 - e.b[1], 0.5 - e.b[2])
        t = {"sam": (0, 0, 0), "elementwise": [-x for x in e.b], "layerwise": layerwise}[variant]
        decoupled = norm == "decoupled" and perturbation == "effective"
        for i, (_, lr, rho, scaling) in enumerate(factors(model, base, e).values()):
            contribution = predict(e).gradient[i] + t[i]
            assert lr == pytest.approx(M ** -e.c[i])
            assert rho == pytest.approx(M ** (-e.d - e.dl[i]))
            assert scaling == pytest.approx(M ** -(contribution if decoupled else e.dl[i]))
        if perturbation == "balanced":
            assert e.dl == pytest.approx([g + x for g, x in zip(predict(e).gradient, t)]), "equal parts of the norm"


def test_a_last_bias_in_the_joint_norm_gets_d_l_one_half():
    """With 0 it would grow as sqrt(n), and with the last weight's exponent it would vanish."""
    model, base = pair(lambda n: nn.Sequential(nn.Linear(5, n), nn.ReLU(), nn.Linear(n, 3)))
    for variant in VARIANTS:
        e = exponents(variant=variant, norm="joint")
        assert factors(model, base, e)["2.bias"][2:] == pytest.approx((1, M**e.d))


def test_non_uniform_widths_follow_the_spectral_rule():
    def build(n, k):
        return nn.Sequential(nn.Linear(5, n), nn.Linear(n, k), nn.Linear(k, 3))

    model, base = build(32, 80), build(8, 10)
    found = factors(model, base)
    assert found["1.weight"] == pytest.approx(("hidden", 2, 2, 2**0.5))  # r = (80/10) / (32/8)
    assert found["2.weight"] == pytest.approx(("output", 1 / 8, 1 / 8, 8**-0.5))
    assert factors(model, base, exponents(base_optimizer="adam"))["1.weight"][1] == 1 / M
    assert factors(model, base, exponents("mup", "naive"))["1.weight"][2:] == (1, 1)
    for scaling in (exponents(norm="joint"), exponents("mup", "global")):
        with pytest.raises(ValueError, match="one width"):
            param_groups(model, base, scaling, lr=1, rho=1)


@pytest.mark.parametrize(
    "scaling, width, base, named",
    [
        (MUP2, 64, torch.optim.AdamW, "adam"),
        (exponents(base_optimizer="adam"), 64, torch.optim.SGD, "sgd"),
        (MUP2, 64, torch.optim.SGD, None),
        (exponents(base_optimizer="adam"), 64, torch.optim.Adam, None),
        (MUP2, 16, torch.optim.AdamW, None),  # at the base width both rules are the same
        (exponents("sp"), 64, torch.optim.AdamW, None),  # and in SP
        (MUP2._replace(c=(0.0, 1.0, 1.0)), 64, torch.optim.AdamW, None),  # the user's own rule
        (MUP2, 64, torch.optim.RMSprop, None),  # nobody knows this one's
    ],
)
def test_learning_rates_for_another_base_optimizer(scaling, width, base, named):
    groups = param_groups(MLP(5, width, 3), MLP(5, 16, 3), scaling, lr=0.1, rho=0.1)
    assert type(pickle.loads(pickle.dumps(groups))) is type(groups)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SAM(groups, base, lr=0.1)
    texts = [f"{w.message}" for w in seen if w.filename == __file__]
    assert len(texts) == bool(named) and all(f"base_optimizer='{named}'" in text for text in texts)


@pytest.mark.parametrize("options, ignored", [(dict(lr=0.7, weight_decay=0.2), {"lr", "weight_decay"}), ({}, set())])
def test_options_that_the_groups_have_already(options, ignored):
    groups = param_groups(MLP(5, 64, 3), MLP(5, 16, 3), lr=0.1, rho=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        SAM(groups, momentum=0.9, **options)
        SAM(list(groups), **options), SAM(param_groups(MLP(5, 64, 3), MLP(5, 16, 3), lr=None, rho=0.1), **options)
    texts = [f"{w.message}" for w in seen if w.filename == __file__]
    assert {text.partition("=")[0] for text in texts} == ignored and len(texts) == len(ignored)
    assert all(f"Give {name} to param_groups()" in text for name, text in zip(sorted(ignored), texts))


@pytest.mark.parametrize("perturbation", ["naive", "global"])
def test_one_radius_for_all_also_for_biases(perturbation):
    for variant in VARIANTS:
        e = exponents("mup", perturbation, variant)
        for _, _, rho, scaling in factors(*pair(Block), e).values():
            assert (rho, scaling) == pytest.approx((M**-e.d, 1))


class NormalizedLinear(nn.Linear):
    pass


class RMSNorm(nn.Module):  # as other libraries write their own
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))


def test_sam_on_selects_normalization_layers_by_type():
    """In nn.Sequential the parameters' names say nothing about norms."""
    model, base = pair(
        lambda n: nn.Sequential(
            nn.Conv2d(3, n, 3), nn.BatchNorm2d(n), nn.GroupNorm(2, n), RMSNorm(n), NormalizedLinear(n, 3, bias=False)
        )
    )
    groups = by_name(param_groups(model, base, lr=1.0, rho=1.0, perturb="norm"))
    assert [n for n, g in groups.items() if g["perturb"]] == ["1.weight", "1.bias", "2.weight", "2.bias", "3.weight"]
    assert all((g["rho"], g["gradnorm_scaling"]) == (M, M**0.5) for g in groups.values() if g["perturb"])
    joint = by_name(param_groups(model, base, exponents(norm="joint"), lr=1.0, rho=1.0, perturb="norm"))["1.weight"]
    assert joint["rho"] / joint["gradnorm_scaling"] == pytest.approx(M**0.5)  # d = -1/2, d_l equal


def test_what_is_perturbed_decides_the_exponents_but_not_the_users_own():
    arguments = dict(lr=1, rho=1, perturb=lambda name, p: name != "layers.0.weight")
    model, base = pair(lambda n: MLP(5, n, 3))
    scaling = exponents(norm="joint")
    groups = by_name(param_groups(model, base, scaling, **arguments))
    assert [g["perturb"] for g in groups.values()] == [False, True, True]
    assert [g["rho"] for g in groups.values()][1:] == [1, 1 / M]  # d = 0, d_l = 0, 1
    assert [g["gradnorm_scaling"] for g in groups.values()][1:] == [1, 1 / M]
    for own in (scaling._replace(d=-0.25), scaling._replace(d=-0.25, parameterization="mine")):
        groups = by_name(param_groups(model, base, own, **arguments))
        assert [g["rho"] for g in groups.values()] == pytest.approx([M ** (0.25 - x) for x in own.dl])


def test_frozen_parameters_are_left_out():
    model, base = pair(lambda n: MLP(5, n, 3))
    model.layers[0].weight.requires_grad_(False)
    assert list(factors(model, base)) == ["layers.1.weight", "layers.2.weight"]
    model, base = pair(lambda n: nn.Sequential(nn.Linear(5, n), Raw(n, n)))
    model[1].w.requires_grad_(False)
    assert list(factors(model, base)) == ["0.weight", "0.bias"], "also if the role cannot be told"


def test_wrong_arguments():
    mlp = lambda n, **kwargs: MLP(5, n, 3, **kwargs)
    model, base = pair(mlp)
    for message, arguments in {
        "unknown .* choose one of": dict(lr=1, perturb="bias"),
        "selects no trainable parameter": dict(lr=1, perturb="norm"),
        r"pass weight_decay to the optimizer: SAM\(groups, MuSGD, weight_decay": dict(lr=None, weight_decay=0.1),
    }.items():
        with pytest.raises(ValueError, match=message):
            param_groups(model, base, rho=1, **arguments)
    with pytest.raises(ValueError, match=r"base model has parameters that the model lacks: \['layers.3.weight'\]"):
        factors(model, mlp(BASE, hidden_layers=3))
    with pytest.raises(ValueError, match=r"'layers.3.weight'.* has no counterpart in the base model"):
        factors(mlp(WIDE, hidden_layers=3), base)


def test_report():
    model, base = pair(Block)
    groups = param_groups(model, base, lr=0.1, rho=0.2, perturb=lambda name, p: name != "position")
    lines = report(groups).splitlines()
    assert len(lines) == 1 + len(list(model.parameters()))
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["name"] == ["shape", "role", "lr", "rho", "gradnorm_scaling"]
    assert rows["head.weight"] == ["3x32", "output", "0.025", "0.05", "0.5"]
    assert rows["position"] == ["1x4x32", "input", "0.4", "-", "-"]
    for way, said in (
        (dict(), "SAM in every step, 2 passes per step"),
        (dict(interval=4), "SAM in 1 of 4 steps, 1.25 passes per step"),
        (dict(ascent="momentum", momentum=0.9), "SAM by momentum in every step, 1 pass per step"),
    ):
        assert report(SAM(groups, **way)).splitlines() == [*lines, said]
    with pytest.raises(KeyError, match="names"):
        report(SAM(model.parameters()))


def test_initial_scale_of_layers_that_grow_unevenly():
    """sqrt(1 / fan_in) min(1, sqrt(fan_out / fan_in)), all relative to the base, which may be the wider model."""
    for (fan_out, fan_in), expected in {(64, 256): 16**-0.5 * (4 / 16) ** 0.5, (256, 64): 4**-0.5}.items():
        model = init_(nn.Linear(fan_in, fan_out), nn.Linear(16, 16), gain=3.0)
        assert model.weight.std().item() == pytest.approx(3 / 4 * expected, rel=0.05)
        model = init_(nn.Linear(fan_in, fan_out), nn.Linear(16, 16), exponents("sp"), gain=3.0)
        assert model.weight.std().item() == pytest.approx(3 / 4 * (fan_in / 16) ** -0.5, rel=0.05)
    model = init_(nn.Linear(64, 2000), nn.Linear(256, 2000), gain=1.0)
    assert model.weight.std().item() == pytest.approx(256**-0.5 * 4, rel=0.05)
    model = init_(nn.Linear(2000, 64), nn.Linear(2000, 256), gain=1.0)
    assert model.weight.std().item() == pytest.approx(2000**-0.5, rel=0.05), "and input weights like the base's"


def test_initialising_twice_is_the_same_as_once_and_keeps_the_tensors():
    model, base = Block(WIDE), Block(BASE)
    addresses = [p.data_ptr() for p in model.parameters()]
    torch.manual_seed(1)
    assert init_(model, base) is model
    once = [p.clone() for p in model.parameters()]
    init_(model, base)
    assert not torch.equal(model.head.weight, once[-2])
    torch.manual_seed(1)
    init_(model, base)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), once))
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_init_of_convolutions_biases_and_norms():
    def build(n):
        return nn.Sequential(
            nn.Conv2d(3, n, 5), nn.BatchNorm2d(n), nn.ConvTranspose2d(n, n, 3), nn.Embedding(9, n), nn.Linear(n, 2)
        )

    model = build(WIDE)
    embedding = model[3].weight.detach().clone()
    model[1].weight.data.fill_(3.0)
    init_(model, pair(build)[1])
    assert model[0].weight.std().item() == pytest.approx((2 / 75) ** 0.5, rel=0.1)
    assert model[2].weight.std().item() == pytest.approx((2 / (WIDE * 9)) ** 0.5, rel=0.1)
    assert all(not model[i].bias.any() for i in (0, 2, 4))
    assert torch.equal(model[3].weight, embedding) and (model[1].weight == 3).all()


def test_zero_output():
    model, base = Block(WIDE), Block(BASE)
    init_(model, base, zero_output=True)
    assert [name for name, p in model.named_parameters() if p.ndim == 2 and not p.any()] == ["head.weight"]
    with pytest.raises(ValueError, match=r"roles=\{'head.weight': 'output'\}"):
        init_(Block(BASE), base, zero_output=True)
    model = init_(Block(BASE), base, zero_output=True, roles={"head.weight": "output"})
    assert not model.head.weight.any() and model.embed.weight.any()

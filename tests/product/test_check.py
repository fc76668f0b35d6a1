"""The perturbation check passes what is right, finds and names mistakes, and refuses what cannot be measured."""

import functools
import math
import runpy

import pytest
import torch
from small_problems import closure_of
from torch import nn
from torch.nn import functional as F

from experiments import networks
from mup2_fused import MLP, SAM, exponents, init_, param_groups
from mup2_fused.check import WHOLE, check, command, data, measure
from mup2_fused.check.counterpart import Counterpart, settings_of
from mup2_fused.check.measure import effect

SLOW = pytest.mark.slow
WIDTHS = [32, 64, 128, 256]
LR, RHO = 0.02, 0.02


class Net(nn.Module):
    """An MLP with biases and a normalization."""

    def __init__(self, n):
        super().__init__()
        self.first, self.norm = nn.Linear(20, n), nn.LayerNorm(n)
        self.hidden, self.head = nn.Linear(n, n), nn.Linear(n, 10)

    def forward(self, x):
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.first(x))))))


def initialised(model):
    return init_(model, Net(WIDTHS[0]))


def correct(scaling=exponents(), change=lambda group: group, **kwargs):  # noqa: B008 (immutable)
    """A user's function that makes groups: right ones, but for the change."""

    def groups(model):
        initialised(model)
        return [change(group) for group in param_groups(model, Net(WIDTHS[0]), scaling, lr=LR, rho=RHO, **kwargs)]

    return groups


class GPT(nn.Module):
    """Decoder with learned positions and an untied readout: tokens (B, T) -> logits (B, T, 30)."""

    def __init__(self, n, heads=2):
        super().__init__()
        self.tokens, self.position = nn.Embedding(30, n), nn.Parameter(0.1 * torch.randn(1, 16, n))
        self.norms = nn.ModuleList(nn.LayerNorm(n) for _ in range(3))
        self.qkv, self.out, self.heads = nn.Linear(n, 3 * n), nn.Linear(n, n), heads
        self.up, self.down, self.head = nn.Linear(n, 4 * n), nn.Linear(4 * n, n), nn.Linear(n, 30, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.position
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=2))
        scale = (WIDTHS[0] // self.heads) ** 0.5 / q.shape[-1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def vit(n, depth=2):
    return networks.ViT(n, depth, 4, image=8, patch=2, classes=10, base_head_dim=WIDTHS[0] // 4)


CORRECT = {
    "mlp": (lambda n: MLP(20, n, 10), {}),
    "net": (Net, {}),
    "resnet": (lambda n: networks.ResNet18(n // 4, 10), dict(input_shape=(3, 8, 8), seeds=2)),
    "vit": (vit, dict(input_shape=(3, 8, 8), seeds=2)),
    "deep vit": (functools.partial(vit, depth=6), dict(input_shape=(3, 8, 8), seeds=1, batch=8)),
    "gpt": (GPT, dict(seeds=2)),
}


QUICK = [("mlp", "sgd"), ("net", "sgd"), ("net", "adam"), ("gpt", "adam")]
THOROUGH = [(network, base) for network in CORRECT for base in ("sgd", "adam") if (network, base) not in QUICK]


@pytest.mark.parametrize("network, base_optimizer", [*QUICK, *(pytest.param(*x, marks=SLOW) for x in THOROUGH)])
def test_correct_models_pass(network, base_optimizer):
    factory, options = CORRECT[network]
    widths = WIDTHS[:3] if network == "resnet" else WIDTHS
    report = check(factory, widths, base_optimizer=base_optimizer, **options)
    assert report.passed, str(report)
    model = factory(WIDTHS[0])
    assert [r.name for r in report.rows] == [*dict(model.named_parameters()), WHOLE]
    measurable = [r for r in report.rows if not math.isnan(r.slopes["perturbation"].value)]
    keys = sum(name.endswith("key.bias") for name, _ in model.named_parameters())
    assert len(measurable) == len(report.rows) - keys, "all but the keys' biases, which have no gradient"
    assert f"Passed: {len(report.rows) - 1} parameters" in str(report)


@pytest.mark.parametrize("variant", ["elementwise", "layerwise"])
def test_adaptive_variants_pass(variant):
    assert check(Net, WIDTHS, variant=variant, rho=0.2).passed
    assert check(Net, WIDTHS, groups=correct(exponents(variant=variant))).passed, "the groups tell the variant"


@pytest.mark.parametrize("base_optimizer", ["sgd", "adam"])
def test_ascent_by_momentum_passes(base_optimizer):
    """The factors that are right for the gradient are right for the moments, which are sums of gradients."""
    options = dict(base_optimizer=base_optimizer, seeds=2)
    report = check(lambda n: MLP(20, n, 10), WIDTHS, ascent="momentum", **options)
    assert report.passed, str(report)
    powers = [r.slopes["perturbation"].value for r in report.rows]
    assert powers == pytest.approx([0.0] * 4, abs=0.2), str(report)
    along_gradients = check(lambda n: MLP(20, n, 10), WIDTHS, **options)
    assert report.rows[1].values["perturbation"] != along_gradients.rows[1].values["perturbation"]
    own = check(Net, WIDTHS, groups=correct(exponents(base_optimizer=base_optimizer)), ascent="momentum", **options)
    assert own.passed, str(own)


def default_biases(model):
    """torch's, which are harmless."""
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 1}
    made = correct()(model)
    for n, b in biases.items():
        model.get_parameter(n).data.copy_(b)
    return made


def test_own_groups_that_are_right_pass():
    for groups in (correct(weight_decay=0.1), default_biases):
        assert check(Net, WIDTHS, groups=groups).passed
    adam = correct(exponents(base_optimizer="adam"))
    assert check(Net, WIDTHS, groups=adam, base_optimizer="adam", seeds=2).passed
    mine = check(Net, WIDTHS, groups=correct(perturb=lambda name, p: p.ndim > 1), seeds=2)
    assert mine.passed and math.isnan(next(r for r in mine.rows if r.name == "first.bias").slopes["perturbation"].value)


@pytest.mark.parametrize("network", ["gpt", *(pytest.param(name, marks=SLOW) for name in ("vit", "resnet"))])
@pytest.mark.parametrize("scaling", ["lost", "r instead of its root"])
def test_wrong_gradnorm_scaling_is_found_before_it_shows(network, scaling):
    """In these networks the layer that will dominate the norm does not dominate it yet."""
    factory, options = CORRECT[network]
    widths = [8, 16, 32, 64] if network == "gpt" else WIDTHS[:3]

    def groups(model):
        init_(model, factory(widths[0]), gain=1.0)
        made = param_groups(model, factory(widths[0]), lr=LR, rho=RHO)
        return [g | dict(gradnorm_scaling=1.0 if scaling == "lost" else g["gradnorm_scaling"] ** 2) for g in made]

    report = check(factory, widths, groups=groups, **options)
    wrong = {r.name for r in report.rows if "norm share" in r.wrong}
    assert not report.passed and ("head.weight" in wrong) == (scaling == "lost"), str(report)
    assert "all perturbations vanish once it dominates: multiply gradnorm_scaling by n^(-1/2)" in str(report)


def test_right_groups_pass_whatever_their_base_and_values():
    """Wider or narrower than the models; the joint norm of Definition 4, too, whose other parts fall."""
    for build, widths, base, kwargs in (
        (Net, WIDTHS, 16, {}),
        (Net, WIDTHS, 512, {}),
        (lambda n: MLP(20, n, 10), [64, 128, 256, 512], 1, dict(scaling=exponents(norm="joint"))),
    ):

        def groups(model, build=build, base=base, kwargs=kwargs):
            init_(model, build(base))
            return param_groups(model, build(base), lr=0.07, rho=0.05, **kwargs)

        report = check(build, widths, groups=groups, seeds=2)
        assert report.passed, str(report)


def test_a_common_factor_of_radii_and_norm_cancels():
    """e = rho g / norm: a norm that grows beyond muP²'s is right if all radii grow with it."""

    def groups(model):
        keys, width = ("rho", "gradnorm_scaling"), model.head.in_features
        return [g | {k: g[k] * width / WIDTHS[0] for k in keys} for g in correct()(model)]

    report = check(Net, WIDTHS, groups=groups, seeds=1)
    assert report.passed, str(report)


def test_the_counterpart_starts_from_the_users_groups_and_grows_as_mup2():
    """The base model may be narrower than the narrowest one: at that width, it is the user's values that count."""
    narrow, wide = Net(WIDTHS[0]), Net(4 * WIDTHS[0])
    mine = [dict(params=[p], lr=3.0, rho=5.0, gradnorm_scaling=7.0, perturb=p.ndim > 1) for p in narrow.parameters()]
    default = dict(lr=1.0, rho=1.0, gradnorm_scaling=1.0, perturb=1.0)
    counterpart = Counterpart(narrow, Net(8), exponents(), None, settings_of(narrow, mine), default)
    for model, m in ((narrow, 1), (wide, 4)):
        made = settings_of(model, counterpart.groups(model))
        assert made["first.weight"] == dict(lr=3 * m, rho=5 * m, gradnorm_scaling=7 * m**0.5, perturb=1)
        assert made["head.weight"] == dict(lr=3 / m, rho=5 / m, gradnorm_scaling=7 / m**0.5, perturb=1)
        assert made["norm.bias"]["perturb"] == made["head.bias"]["perturb"] == 0


def test_a_plain_readout_with_a_division_takes_a_word():
    class Divides(Net):
        def forward(self, x):
            x = F.relu(self.hidden(F.relu(self.norm(self.first(x)))))
            return self.head(x * WIDTHS[0] / x.shape[1])

    def groups(model):
        m = model.head.in_features / WIDTHS[0]
        initialised(model)
        model.head.weight.data *= m
        mine = dict(lr=LR * m, rho=RHO * m, gradnorm_scaling=m**0.5)
        made = param_groups(model, Net(WIDTHS[0]), lr=LR, rho=RHO)
        return [g | (mine if "head.weight" in g["names"] else {}) for g in made]

    without_word = check(Divides, WIDTHS, groups=groups)
    assert not without_word.passed and "or a role in the table is wrong: roles={name: role}" in str(without_word)
    assert check(Divides, WIDTHS, groups=groups, roles={"head.weight": "input"}).passed


class Tied(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.e, self.hidden, self.norm = nn.Embedding(30, n), nn.Linear(n, n), nn.LayerNorm(n)
        self.head = nn.Linear(n, 30, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x):
        return self.head(self.norm(self.hidden(self.e(x))))


def test_a_readout_tied_to_the_embedding_blows_up():
    with pytest.raises(ValueError, match=r"'input' is for models that divide their logits"):
        check(Tied, WIDTHS)
    report = check(Tied, WIDTHS, roles={"e.weight": "input"}, base_optimizer="adam")
    assert not report.passed and report.rows[-1].wrong and "MuSharedReadout" in str(report)


def test_a_tied_output_does_not_start_at_zero():
    """With it the embedding would be 0, and nothing would learn."""
    report = check(Tied, WIDTHS[:3], roles={"e.weight": "output"}, seeds=1)
    assert report.rows[0].slopes["init"].value == pytest.approx(-1, abs=0.1)
    assert all(row.values["update"] for row in report.rows)


@pytest.mark.parametrize("tokens", [None, 30])
def test_random_data_of_large_inputs_can_be_learned(tokens, monkeypatch):
    """The teacher sees a part of the values, or of the tokens."""
    monkeypatch.setattr(data, "SEEN", 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(30, 5)) if tokens is None else nn.Embedding(tokens, 5)
    loss = data.random_data(model, (2, 15) if tokens is None else (7,), tokens, batch=64, seed=0)
    opt = torch.optim.SGD(model.parameters(), lr=2.0)
    losses = [opt.step(closure_of(opt, model, loss)) for _ in range(60)]
    assert losses[0] > 1.5 and losses[-1] < 0.3 * losses[0]


def test_nothing_to_measure_is_no_success():
    with pytest.raises(ValueError, match="same shapes at widths 32 and 64"):
        check(lambda n: Net(32), [32, 64])
    with pytest.raises(ValueError, match="random data are for classifiers"):
        check(lambda n: MLP(20, n, 1), [32, 64])
    with pytest.raises(ValueError, match="pass --input, or let the factory return"):
        check(nn.LayerNorm, [8, 16])
    x = torch.randn(8, 20)

    def factory(n):
        return Net(n), lambda model: model(x).square().mean()

    with pytest.raises(ValueError, match="no parameter has a gradient.*own_init"):
        check(factory, [32, 64])
    assert len(check(factory, [32, 64], own_init=True).rows) == 9
    with pytest.raises(ValueError, match="one seed"):
        check(Net, [32, 64], seeds=0)
    with pytest.raises(ValueError, match=r"moments must form in 2 steps or more first, not in 1"):
        check(Net, [32, 64], ascent="momentum", steps=1)
    with pytest.raises(ValueError, match="unknown name 'moment'"):
        check(Net, [32, 64], ascent="moment")
    for bad in (lambda model: None, lambda model: torch.optim.SGD(model.parameters())):
        with pytest.raises(TypeError, match="groups.model. returns parameter groups"):
            check(Net, [32, 64], groups=bad)


class Outputs(Net):
    """Returns a dictionary; trains through a method, so that the module itself is never called."""

    def forward(self, x):
        return {"out": super().forward(x)}

    def training_step(self, x):
        return self.head(F.dropout(F.relu(self.first(x)), 0.5)).logsumexp(1).mean()


def test_models_that_return_or_train_in_their_own_way():
    x, state = torch.randn(32, 20), torch.get_rng_state()
    losses = lambda m: m(x)["out"].square().mean() + m(x)["out"].mean(), lambda m: m.training_step(x)
    for loss, whole_is_measured in zip(losses, (True, False)):
        report = check(lambda n, loss=loss: (Outputs(n), loss), [16, 32, 64], own_init=True)
        rows = {r.name: r for r in report.rows}
        assert torch.equal(torch.get_rng_state(), state)
        assert not math.isnan(rows["head.weight"].slopes["update"].value)
        assert math.isnan(rows[WHOLE].slopes["update"].value) != whole_is_measured


def test_a_wrong_role_is_found_without_own_groups():
    class Raw(nn.Module):  # a matrix of which only its author knows the side
        def __init__(self, n):
            super().__init__()
            self.first, self.readout = nn.Linear(20, n), nn.Parameter(torch.randn(n, 10) / n)

        def forward(self, x):
            return F.relu(self.first(x)) @ self.readout

    assert check(Raw, WIDTHS, roles={"readout": "output"}).passed
    report = check(Raw, WIDTHS, roles={"readout": "input"})
    assert not report.passed and report.rows[0].wrong[0] == "init" and "first.bias" in str(report).partition("* ")[2]
    assert "a role in the table is wrong" in str(report)


def test_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_model.py").write_text(
        "import mup2_fused as mup2, torch\n"
        "def factory(n):\n"
        "    return mup2.MLP(6, n, 3)\n"
        "def with_loss(n):\n"
        "    x = torch.randn(8, 6)\n"
        "    return mup2.MLP(6, n, 3), lambda model: model(x).square().mean()\n"
        "def broken(n):\n"
        "    raise RuntimeError('no such layer')\n"
        "def groups(model):\n"
        "    return [dict(params=list(model.parameters()), lr=0.1, rho=0.1)]\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--widths", "16,32,64", "--seeds", "2"]
    assert command.main(["my_model:factory", *options, "--picture", "check.png"]) == 0
    printed = capsys.readouterr().out
    assert "layers.1.weight" in printed and "Passed: 3 parameters" in printed
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"
    assert command.main(["my_model:with_loss", *options]) == 2
    assert "no parameter has a gradient" in capsys.readouterr().err
    assert command.main(["my_model:with_loss", *options, "--own-init"]) == 1  # torch's default weights
    assert command.main(["my_model:factory", *options, "--ascent", "momentum"]) == 0
    assert command.main(["my_model:factory", *options, "--ascent", "momentum", "--steps", "0"]) == 2
    assert "with ascent='momentum', moments must form" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["check", "my_model:factory", *options, "--groups", "my_model:groups"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("mup2_fused.check")  # as python -m mup2_fused.check
    assert "FAILED" in capsys.readouterr().out
    assert command.main(["my_model:factory", "--widths", "16"]) == 2
    assert "at least two widths" in capsys.readouterr().err
    assert command.main(["my_model:factory", *options, "--lr", "1e9"]) == 2
    assert "lower lr or rho" in capsys.readouterr().err
    assert command.main(["my_model:broken", *options]) == 2
    assert "Traceback" in (said := capsys.readouterr().err) and "no such layer" in said
    for name, words in {"my_model": "expected module:name", "my_model:model": "must be importable from here"}.items():
        with pytest.raises(SystemExit, match="2"):
            command.main([name])
        assert words in capsys.readouterr().err


def test_a_raw_vector_of_a_larger_module_counts_by_itself():
    """A class token is added to activations, but its owner's output is that of the whole network."""
    model = vit(32)
    name = next(n for n, p in model.named_parameters() if p.ndim == 3)
    after = model.get_parameter(name).detach() + 0.5
    inputs = {"": ((torch.randn(2, 3, 8, 8),), {})}
    assert effect(model, name, "input", after, inputs) == pytest.approx(0.5)
    assert effect(model, name, "hidden", after, inputs) != pytest.approx(0.5)


def test_the_model_is_left_as_it_is_found():
    """Buffers are not updated by the probes of single modules, and hooks are gone."""
    model, x = networks.ResNet18(4, 10), torch.randn(4, 3, 8, 8)
    roles = dict.fromkeys(dict(model.named_parameters()), "hidden")
    measure(model, lambda m: m(x).square().mean(), SAM(model.parameters(), lr=0.0), roles, steps=0)
    assert model.norm.num_batches_tracked == 5  # two passes, and the network's output at w, w + e and after the update
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

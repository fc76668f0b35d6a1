"""What init_ draws, keeps and refuses, beyond the layers of torch.nn in test_roles_and_groups.py; and assumed roles."""

import warnings

import pytest
import torch
from small_problems import Tied
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from mup2_fused import init_, param_groups
from mup2_fused.check import check
from mup2_fused.roles import describe

BASE, WIDE, M = 8, 64, 8


class Raw(nn.Module):
    """Hidden layers of other kinds between linear layers."""

    def __init__(self, n, **parameters):
        super().__init__()
        self.first, self.head = nn.Linear(20, n), nn.Linear(n, 10)
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_an_embedding_that_is_said_to_be_the_output_is_drawn_as_one():
    for n in (BASE, WIDE):
        model = init_(Tied(n), Tied(BASE), gain=1.0, roles={"embed.weight": "output"})
        assert model.embed.weight.std().item() == pytest.approx(BASE**-0.5 * BASE / n, rel=0.05)
    model = init_(Tied(WIDE), Tied(BASE), roles={"embed.weight": "input"})
    assert model.embed.weight.std().item() == pytest.approx(1, rel=0.05), "and the embedding keeps its values"


def test_an_unknown_fan_in_is_refused_before_anything_is_drawn():
    """At the base width the role alone does not tell on which side of a raw matrix the width is."""
    model, base = Raw(BASE, w=(BASE, 500)), Raw(BASE, w=(BASE, 500))
    before = weights(model)
    with pytest.raises(ValueError, match=r"cannot tell the fan_in of 'w' \(shape \(8, 500\)\): .*\{'w': 'in out'\}"):
        init_(model, base, roles={"w": "output"})
    assert not changed(model, before)
    assert init_(model, base, roles={"w": "in out"}, gain=1.0).w.std().item() == pytest.approx(BASE**-0.5, rel=0.05)
    assert not init_(model, base, roles={"w": "output"}, zero_output=True).w.any()
    assert init_(Raw(9, w=(9, 9)), Raw(9, w=(9, 9)), gain=1.0, roles={"w": "output"}).w.std() < 0.5, "a square tells"


def test_frozen_parameters_are_kept():
    model, base = Raw(WIDE), Raw(BASE)
    model.first.requires_grad_(False)
    before = weights(model)
    assert changed(init_(model, base), before) == {"head.weight", "head.bias"}
    model.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable tensor has the role 'output'"):
        init_(model, base, zero_output=True)


def test_only_biases_of_a_linear_layer_become_zero():
    class Scaled(nn.Linear):
        def __init__(self, n):
            super().__init__(n, n)
            self.scale = nn.Parameter(torch.ones(n))

    model = init_(Scaled(WIDE), Scaled(BASE), roles={"bias": "output"})
    assert not model.bias.any() and (model.scale == 1).all()


class DoraLayer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))


class Adapter(nn.Module):
    """As peft wraps a linear layer and an embedding; their names of modules and tensors, and their zeros."""

    def __init__(self, n, r=4):
        super().__init__()
        self.base_layer, self.embed = nn.Linear(n, n).requires_grad_(False), nn.Embedding(50, n).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, n, bias=False)})
        self.lora_B["default"].weight.data.zero_()
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(r, 50))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.ones(n, r))})
        self.lora_magnitude_vector = DoraLayer(n)
        self.head = nn.Linear(n, 3)

    def forward(self, tokens):
        x = self.embed(tokens) + (self.lora_embedding_B["default"] @ self.lora_embedding_A["default"][:, tokens]).T
        return self.head(self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)))


class LoraEmbedding(nn.Embedding):
    """loralib's, whose raw tensors are in a module of a known type."""

    __module__ = "loralib.layers"

    def __init__(self, n, r=4):
        super().__init__(50, n)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(r, 50)), nn.Parameter(torch.ones(n, r))


@pytest.mark.parametrize("zero_output", [False, True])
def test_adapters_change_nothing_at_first_and_learn(zero_output):
    model, base, tokens = Adapter(WIDE), Adapter(BASE), torch.arange(50)
    before = weights(model)
    init_(model, base, zero_output=zero_output)
    drawn = {"lora_A.default.weight", "lora_embedding_B.default", "head.weight", "head.bias"}
    assert changed(model, before) == drawn
    hidden = model.base_layer(model.embed(tokens))
    torch.testing.assert_close(model(tokens), model.head(hidden))
    assert model.lora_A["default"].weight.any(), "or its gradient would stay 0"
    model.lora_B["default"].weight.data.fill_(1.0)
    assert changed(init_(model, base), before) == drawn | {"lora_B.default.weight"}, "B has no zeros to keep"


def test_roles_of_adapters():
    expected = {"input": ["lora_B.default.weight", "lora_embedding_B.default"], "output": ["lora_A.default.weight"]}
    found = describe(Adapter(WIDE), Adapter(BASE))
    assert all(
        found[name].role == role and found[name].growth == ((M, 1) if role == "input" else (1, M))
        for role, names in expected.items()
        for name in names
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # DoRA's vector scales, as its name tells
        param_groups(Adapter(WIDE), Adapter(BASE), lr=1, rho=1)
    model, base = LoraEmbedding(WIDE), LoraEmbedding(BASE)
    assert describe(model, base)["lora_B"].growth == (M, 1)
    own = lambda n: nn.ParameterDict({"lora_A": torch.ones(n, 4), "lora_B": torch.zeros(4, n)})  # used as x @ A @ B
    with pytest.raises(ValueError, match="cannot tell the role of 'lora_A'"):
        describe(own(WIDE), own(BASE))


# ------------------------------------------------------------------------------------------ weights that are normalized


def with_norm(norm):
    def build(n):
        model = Raw(n)
        norm(model.first)
        return model

    return build


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_old_hooks_that_normalize_weights_are_refused(norm):
    build, name = with_norm(norm), norm.__name__
    for call in (
        lambda: param_groups(build(WIDE), build(BASE), lr=1, rho=1),
        lambda: init_(build(BASE), build(BASE), zero_output=True, roles={"head.weight": "output"}),
        lambda: check(build, [8, 16]),
    ):
        with pytest.raises(ValueError, match=rf"'first.weight' is .* by torch.nn.utils.{name}.*remove_{name}"):
            call()
    model, base = build(WIDE), build(BASE)
    for m in (model, base):
        m.first.requires_grad_(False)
    assert len(param_groups(model, base, lr=1, rho=1)) == 2, "frozen layers may have them"


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_that_normalize_weights_are_refused(norm):
    build = with_norm(getattr(parametrizations, norm))
    original = "'first.parametrizations.weight.original"
    with pytest.raises(ValueError, match=rf"{original}.* normalizes .*remove_parametrizations"):
        param_groups(build(WIDE), build(BASE), lr=1, rho=1)


class Plus(nn.Module):
    def __init__(self, n, r=2):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(r, n)), nn.Parameter(torch.zeros(n, r))

    def forward(self, w):
        return w + self.lora_B @ self.lora_A


def test_a_parametrization_that_adds_takes_the_role_of_the_weight():
    def build(n):
        return nn.Sequential(nn.Linear(20, n), parametrize.register_parametrization(nn.Linear(n, n), "weight", Plus(n)))

    original = "1.parametrizations.weight.original"
    with pytest.raises(ValueError, match=rf"'{original}'.* as LoRA does, the role is the weight's own"):
        param_groups(build(WIDE), build(BASE), lr=1, rho=1)
    parts = {f"1.parametrizations.weight.0.lora_{side}": "out in" for side in "AB"}
    found = describe(build(WIDE), build(BASE), {original: "hidden"} | parts)
    assert [found[n].growth for n in (original, "1.parametrizations.weight.0.lora_A")] == [(M, M), (1, M)]
    model = init_(build(WIDE), build(BASE), gain=1.0, roles={original: "hidden"} | parts)
    assert model[1].weight.std().item() == pytest.approx(WIDE**-0.5, rel=0.05)


# ------------------------------------------------------------------------------------------ roles that are assumed


def attention(n):
    """Vectors of both kinds."""
    vectors = dict(v=(n,), att_src=(1, 2, n), bias=(n,), gamma=(n, 1, 1), cls_token=(1, 1, n), pos_embed=(1, 5, n))
    return Raw(n, **vectors, a=(5,))


def test_vectors_that_may_be_contracted_are_listed_once():
    model, base = attention(WIDE), attention(BASE)
    with pytest.warns(UserWarning, match=r"count as 'input'.*: v, att_src\. .* roles=\{'v': 'output'\}") as record:
        param_groups(model, base, lr=1, rho=1)
    assert len(record) == 1 and record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, base, lr=1, rho=1, roles={"v": "output", "att_src": "input"})
        init_(model, base)
        param_groups(base, base, lr=1, rho=1)
        model.v.requires_grad_(False), model.att_src.requires_grad_(False)
        param_groups(model, base, lr=1, rho=1)
    many = [Raw(n, **{f"v{i}": (n,) for i in range(7)}) for n in (WIDE, BASE)]
    with pytest.warns(UserWarning, match="v0, v1, v2, v3, v4 and 2 more"):
        param_groups(*many, lr=1, rho=1)


def test_vectors_in_lists_and_in_modules_that_scale():
    class LayerScale(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.weight, self.tokens = nn.Parameter(torch.ones(n)), nn.ParameterList([torch.ones(n)])
            self.parts = nn.ParameterDict({"u": torch.ones(n)})

    with pytest.warns(UserWarning, match=r"biases do: parts\.u\. "):
        param_groups(LayerScale(WIDE), LayerScale(BASE), lr=1, rho=1)

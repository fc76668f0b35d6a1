"""Calls in any order, bad arguments, errors in the middle, closures, schedulers and options."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from small_problems import backward, classification, closure_of, equal, parameters, set_gradients, two_steps, weights
from torch import nn

import mup2_fused as mup2


def test_phases(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"call first_step\(\) after the first backward"):
        opt.second_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        opt.step()
    set_gradients(params)
    before = weights(params)
    opt.first_step()
    climbed = weights(params)
    for call in (opt.first_step, lambda: opt.step(lambda: 0.0), opt.state_dict, lambda: opt.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"second_step\(\)"):
            call()
        assert equal(params, climbed)
    opt.restore()
    assert equal(params, before)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.second_step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_with_perturbed_is_a_step(SAM, base):
    model, x, y = classification(mup2.MLP(5, 8, 3))
    other = copy.deepcopy(model)
    a, b = (SAM(m.parameters(), base, lr=0.1, rho=0.1) for m in (model, other))
    for _ in range(3):
        backward(model, x, y)
        before = weights(model)
        with a.perturbed():
            climbed = weights(model)
            backward(model, x, y)
        assert equal(weights(model), before) and not equal(climbed, before)
        a.second_step()
        backward(other, x, y)
        b.first_step()
        assert equal(weights(other), climbed)
        backward(other, x, y)
        b.second_step()
        assert equal(weights(model), weights(other))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_perturbed_restores_whatever_happens(SAM, error):
    params = parameters()
    opt = SAM(params, lr=0.1, rho=0.1)
    before = weights(params)
    set_gradients(params)
    with pytest.raises(error), opt.perturbed():
        assert not equal(params, before)
        with pytest.raises(RuntimeError, match="weights are perturbed"):
            opt.state_dict()
        raise error
    assert equal(params, before)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.second_step()
    with opt.perturbed():
        pass
    opt.load_state_dict(opt.state_dict())  # at w, although an update may follow
    with opt.perturbed():
        opt.second_step()
        after = weights(params)
    assert equal(params, after) and not equal(params, before)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):  # the update inside is not repeated
        opt.second_step()


@pytest.mark.parametrize("through", ["closure", "train_epoch"])
@pytest.mark.parametrize("which", [1, 2])
def test_an_error_in_a_pass_leaves_the_weights_as_they_were(SAM, which, through):
    model, x, y = classification(mup2.MLP(5, 8, 3))
    opt = SAM(model.parameters(), lr=0.1, rho=0.5)
    before, calls = weights(model), []

    def loss_function(f, y):
        calls.append(1)
        if len(calls) == which:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(f, y)

    def train():
        if through == "train_epoch":
            return mup2.train_epoch(model, opt, [(x, y)], loss_function=loss_function)
        return opt.step(closure_of(opt, model, lambda model: loss_function(model(x), y)))

    with pytest.raises(KeyboardInterrupt):
        train()
    assert equal(weights(model), before)
    train()
    assert not equal(weights(model), before)


def test_groups_that_change_between_the_passes(SAM):
    params = parameters()
    before = weights(params)
    opt = SAM(params, rho=0.1, lr=0.0)
    set_gradients(params)
    opt.first_step()
    opt.param_groups[0]["params"] = params[::-1]
    opt.add_param_group({"params": [nn.Parameter(torch.randn(4))]})
    opt.second_step()
    assert equal(params, before)


def test_sparse_and_complex_gradients(SAM):
    """An error where they would perturb, and no problem where they would not."""
    embedding, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    w = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    for params, advice in ((embedding.parameters(), "sparse=False"), ([w], "view_as_real")):
        opt = SAM(params, rho=0.1, lr=0.1)
        before = weights([embedding.weight, w])
        (embedding(torch.tensor([1, 2])).sum() + w.abs().sum()).backward()
        with pytest.raises(RuntimeError, match=advice):
            opt.first_step()
        assert equal([embedding.weight, w], before)
    groups = [{"params": [embedding.weight, w], "perturb": False}, {"params": head.parameters()}]
    opt = SAM(groups, rho=0.1, lr=0.1)
    loss = lambda _: head(embedding(torch.tensor([1, 2]))).square().sum() + w.abs().square().sum()
    opt.step(closure_of(opt, None, loss))
    assert not equal([embedding.weight], before[:1])
    torch.testing.assert_close(w.detach(), before[1] * 0.8)


def test_bad_arguments(SAM):
    params = parameters()
    for bad in (torch.optim.SGD(params, lr=0.1), nn.Linear, "SGD", None, dict, lambda groups: None):
        with pytest.raises(TypeError, match=r"base_optimizer is a class such as torch\.optim\.SGD"):
            SAM(params, bad)
    for base in (torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.SparseAdam):
        for given in (base, lambda groups, base=base: base(groups)):  # a function gives it away when it is called
            with pytest.raises(TypeError, match=f"{base.__name__} cannot be the base"):
                SAM(params, given)
    with pytest.raises(ValueError, match="must make its optimizer from the groups"):
        SAM(params, lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]]))
    for message, kwargs in (
        ("differentiable", dict(differentiable=True)),
        ("unknown name 'asam'", dict(variant="asam")),
        ("learning rate", dict(lr=-1.0)),
        ("rho must be finite", dict(rho=-0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            SAM(params, **kwargs)
    with pytest.raises(ValueError, match="leave out differentiable=True"):
        SAM([{"params": params, "differentiable": True}])
    with pytest.raises(ValueError, match="unknown name 'fast'"):
        mup2.SAM(params, backend="fast", lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], lr=0.1)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        SAM(params[0], lr=0.1)
    opt = SAM(params, lr=0.1)
    for key, values in (("rho", (-0.1, math.nan, math.inf)), ("gradnorm_scaling", (-0.1, math.nan, math.inf, 0))):
        for value in values:  # a gradnorm_scaling of 0 would make 0 / 0
            for bad in (lambda group: SAM([group], lr=0.1), opt.add_param_group):
                with pytest.raises(ValueError, match=f"{key} must be finite"):
                    bad({"params": parameters(), key: value})
    assert len(opt.param_groups) == 1
    with pytest.raises(TypeError, match="param_group must be a dict"):
        opt.add_param_group(parameters())


def test_groups_that_are_scaled_already(SAM):
    """A base optimizer that scales learning rates, as those of the mup package, gets groups without any."""

    def scales(groups, lr=0.1):
        return torch.optim.SGD([group | {"lr": 2 * group.get("lr", lr)} for group in groups])

    group = {"params": parameters(), "role": "hidden"}
    with pytest.raises(ValueError, match=r"param_groups\(lr=None\)"):
        SAM([group | {"lr": 0.1}], scales)
    assert SAM([group], scales, lr=0.3).param_groups[0]["lr"] == 0.6
    assert set(group) == {"params", "role"}, "groups of the caller are not changed"


def test_the_variant_comes_from_groups_or_argument(SAM):
    params = parameters()
    adaptive = lambda **more: {"params": params[:1], "variant": "elementwise"} | more
    assert SAM([adaptive(), {"params": params[1:], "variant": "elementwise"}]).variant == "elementwise"
    assert SAM([adaptive(), {"params": params[1:]}], variant="elementwise").variant == "elementwise"
    assert SAM(params).variant == "sam" and SAM(params, variant="layerwise").variant == "layerwise"
    two = [adaptive(), {"params": params[1:]}]
    for groups, variant in (([adaptive()], "sam"), (two, None), (two[::-1], None)):
        with pytest.raises(ValueError, match="different variants of SAM, 'elementwise' and 'sam'"):
            SAM(groups, variant=variant)
    opt = SAM(params[1:])
    with pytest.raises(ValueError, match="different variants"):
        opt.add_param_group(adaptive())
    with pytest.raises(ValueError, match="different variants"):
        SAM(params, lr=0.1).load_state_dict(SAM(parameters(), variant="elementwise", lr=0.1).state_dict())


def test_closure_runs_twice_and_the_first_loss_is_returned(SAM):
    params = parameters()
    opt, losses = SAM(params, rho=0.1, lr=0.1), []

    def closure():
        assert torch.is_grad_enabled()
        losses.append(closure_of(opt, params)().item())
        return losses[-1]

    with torch.no_grad():
        returned = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert len(losses) == 2 and losses[0] != losses[1] and returned == losses[0]
    before = weights(params)
    zero = lambda: closure_of(opt, params)() and 0.0
    assert opt.step(zero) == 0.0 and not equal(params, before), "a loss of 0 is a loss"


@pytest.mark.parametrize("kind, kwargs", [("StepLR", dict(step_size=1)), ("OneCycleLR", dict(max_lr=1, total_steps=9))])
@pytest.mark.parametrize("two_step", [False, True])
def test_schedulers_without_warnings(SAM, kind, kwargs, two_step):
    params = parameters()
    opt = SAM([{"params": params[:1], "lr": 0.2}, {"params": params[1:]}], rho=0.1, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = getattr(torch.optim.lr_scheduler, kind)(opt, **kwargs)
        for _ in range(3):
            two_steps(opt, params) if two_step else opt.step(closure_of(opt, params))
            scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert opt.param_groups[0]["lr"] != 0.2
    before = weights(params)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure_of(opt, params))
    assert equal(params, before), "the base optimizer must use the learning rate of opt.param_groups"


@pytest.mark.parametrize("lr", [torch.tensor(0.5), np.float32(0.5)], ids=["tensor", "numpy"])
def test_learning_rates_that_are_no_floats(SAM, lr):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    opt.param_groups[0]["lr"] = lr
    before = weights(params)
    two_steps(opt, params)
    torch.testing.assert_close(params, [w - 0.5 * p.grad for p, w in zip(params, before)], rtol=1e-5, atol=1e-6)


def test_replaced_state_is_used(SAM):
    """A user may reset or replace moments; no pointer to an old one may survive."""
    params = parameters(shapes=[(9,)] * 3)
    opt = SAM(params, rho=0.1, lr=0.1, momentum=0.9)
    two_steps(opt, params)
    opt.state[params[1]]["momentum_buffer"] = torch.full((9,), 100.0)
    del opt.state[params[2]]
    before = weights(params)
    two_steps(opt, params)
    assert (before[1] - params[1] > 8.0).all()
    torch.testing.assert_close(params[2].detach(), before[2] - 0.1 * params[2].grad)


@pytest.mark.parametrize("same", [False, True])
def test_dropout_masks(SAM, same):
    """The same in both passes if asked for, new ones in every step; the generator ends where one pass takes it."""
    dropout = nn.Dropout(0.5)
    model, x, y = classification(nn.Sequential(nn.Linear(5, 64), dropout, nn.Linear(64, 3)))
    masks, losses = [], []
    dropout.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    opt = copy.deepcopy(SAM(model.parameters(), lr=0.0, rho=0.0, same_randomness=same))
    torch.manual_seed(3)
    for _ in range(3):
        opt.step(lambda: losses.append(backward(model, x, y)) or losses[-1])
    after_three = torch.get_rng_state()
    mup2.train_epoch(model, opt, [(x, y)] * 2)
    torch.set_rng_state(after_three)
    assert [torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2])] == [same] * 5
    assert not torch.equal(masks[0], masks[2]) and (losses[0] == losses[1]) == same
    after = torch.rand(1)
    torch.manual_seed(3)
    for _ in range(3 if same else 6):
        backward(model, x, y)
    assert torch.equal(torch.rand(1), after)

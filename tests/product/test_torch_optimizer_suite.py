"""What torch's own test suite asks of an optimizer, asked of SAM around each of them, with the options of that suite.

The suite comes with torch, but imports the package expecttest.
"""

import copy
import io
import pickle
from functools import cache, partial
from unittest import mock

import pytest
import torch
from small_problems import assert_close, closure_of, equal, step_by, twins, weights
from test_base_optimizers import TORCH
from torch import nn

import mup2_ref

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of torch, about schedulers, duplicates and missing options
]


@cache
def database():
    """name -> OptimizerInfo."""
    try:
        with mock.patch("torch.backends.disable_global_flags"):  # which would change all later tests
            from torch.testing._internal.common_optimizers import optim_db
    except ImportError as error:  # some builds of torch leave it out
        pytest.skip(f"torch's database of optimizers cannot be imported: {error}")
    return {info.optim_cls.__name__: info for info in optim_db}


@pytest.fixture(params=TORCH)
def info(request):
    if request.param not in database():
        pytest.skip("this torch has no options for it")
    return database()[request.param]


def inputs(info):
    """(options, how they are called) of that suite, each also with foreach and fused where the CPU has them."""
    plain = [(given.kwargs, given.desc) for given in info.optim_inputs_func(device="cpu")]
    flags = [{}] + [{flag: on} for flag in info.supported_impls if flag != "differentiable" for on in (True, False)]
    return [(copy.deepcopy(kwargs) | flag, f"{desc} {flag}") for kwargs, desc in plain for flag in flags]


def parameters(info):
    """Muon takes matrices only."""
    shapes = [(5, 3), (2, 4)] if info.optim_cls.__name__ == "Muon" else [(5, 3), (7,), (), (2, 3, 4)]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def loss_of(params):
    return sum((p.square() + p.sin()).abs().sum() for p in params)


def train(opt, params, form, steps=3, loss=loss_of, schedulers=()):
    """form: of step_by."""
    for _ in range(steps):
        value = step_by(form, opt, closure_of(opt, params, loss))
        for scheduler in schedulers:
            scheduler.step(*[value] * isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))


def same(xs, ys, info, SAM, rounded=False):
    """Bit for bit in torch operations. The kernels round as torch's SGD does, but not as its Adam and fused ones."""
    rounded = rounded or info.optim_cls in (torch.optim.Adam, torch.optim.AdamW)
    if rounded and SAM.keywords["backend"] == "compiled":
        assert_close(xs, ys, rtol=1e-5, atol=1e-7)
    else:
        assert equal(xs, ys)


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - whatever it is, SAM must raise it, too
        return type(error), str(error)


def test_every_option(SAM, info):
    """At rho=0 the bare optimizer, at rho=0.5 the reference; options that torch refuses raise its error."""
    for kwargs, about in inputs(info):
        start = parameters(info)
        refused = error_of(info.optim_cls, twins(start), **kwargs)
        if refused:
            assert error_of(SAM, twins(start), info.optim_cls, **kwargs) == refused, about
            continue
        runs = {}
        for form, make in {
            "bare": info.optim_cls,
            "closure": partial(SAM, base_optimizer=info.optim_cls, rho=0.0),
            "two steps": partial(SAM, base_optimizer=info.optim_cls, rho=0.0),
            "perturbed": partial(SAM, base_optimizer=info.optim_cls, rho=0.5),
            "reference": partial(mup2_ref.SAM, base_optimizer=info.optim_cls, rho=0.5),
        }.items():
            runs[form] = twins(start)
            opt = make(runs[form], **copy.deepcopy(kwargs))
            train(opt, runs[form], form if form in ("bare", "two steps") else "closure")
        assert not equal(runs["bare"], start), about
        for form in ("closure", "two steps"):
            same(runs[form], runs["bare"], info, SAM, rounded=kwargs.get("fused"))
        if not kwargs.get("maximize"):  # the reference climbs nevertheless
            same(runs["perturbed"], runs["reference"], info, SAM, rounded=True)


def test_options_that_are_refused(SAM, info):
    """By torch's words, at the same call."""
    for given in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        bad = given.optimizer_error_input
        params = parameters(info) if bad.params is None else bad.params
        expected = error_of(info.optim_cls, params, **bad.kwargs)
        if expected is not None:
            assert error_of(SAM, params, info.optim_cls, **bad.kwargs) == expected, bad.desc


def saved(opt, new):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))


def old_state(opt, new):
    """As an older torch saved it: without the newer options, and with steps as numbers."""
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        for key in ("foreach", "fused", "maximize", "capturable", "differentiable", "amsgrad", "nesterov"):
            if not group.get(key):
                group.pop(key, None)
    for own in state["state"].values():
        if torch.is_tensor(own.get("step")):
            own["step"] = own["step"].item()
    new.load_state_dict(state)


@pytest.mark.parametrize("how", [saved, old_state, "deepcopy", "pickle"])
def test_round_trips(SAM, info, how):
    """Training goes on with the same bits."""
    for kwargs, about in inputs(info):
        if kwargs.get("foreach") and torch.is_tensor(kwargs.get("lr")):
            continue  # refused
        params = parameters(info)
        make = partial(SAM, base_optimizer=info.optim_cls, rho=0.5, **kwargs)
        opt = make(params)
        train(opt, params, "closure")
        if how == "deepcopy":
            others, other = copy.deepcopy((params, opt))
        elif how == "pickle":
            others, other = pickle.loads(pickle.dumps((params, opt)))
        else:
            others = twins(params)
            other = make(others)
            how(opt, other)
        before = weights(params)
        train(opt, params, "closure")
        train(other, others, "two steps")
        assert equal(params, others) and not equal(params, before), about


def test_groups_and_schedulers(SAM, info):
    """Learning rates and decays of groups, with the schedulers of that suite."""
    for schedulers in info.scheduler_inputs:
        start = parameters(info)
        runs = [twins(start) for _ in range(2)]
        for params, form in zip(runs, ("bare", "closure")):
            groups = [{"params": params[:1], "lr": 0.02, "weight_decay": 0.3}, {"params": params[1:], "lr": 0.01}]
            if info.optim_cls is torch.optim.Rprop:
                del groups[0]["weight_decay"]
            make = info.optim_cls if form == "bare" else partial(SAM, base_optimizer=info.optim_cls, rho=0.0)
            opt = make(groups)
            train(opt, params, form, 6, schedulers=[scheduler(opt) for scheduler in schedulers])
        same(*runs, info, SAM)
        assert not equal(runs[0], start)


GRADIENTS = {  # the loss of the weights that get such a gradient
    "absent": lambda w: 0.0,
    "zero": lambda w: 0.0 * loss_of([w]),
    "complex": lambda w: loss_of([w]),
    "sparse": lambda w: nn.functional.embedding(torch.tensor([[0, 2], [1, 1]]), w, sparse=True).square().sum(),
}


def test_gradients_of_every_kind(SAM, info):
    """Complex and sparse ones in a group with perturb=False."""
    for kind in [kind for kind in GRADIENTS if getattr(info, f"supports_{kind}", True)]:
        special = torch.ones(4, 3, dtype=torch.cfloat if kind == "complex" else None)
        start = [*parameters(info), nn.Parameter(special)]
        loss = lambda params, kind=kind: loss_of(params[:-1]) + GRADIENTS[kind](params[-1])
        runs = [twins(start) for _ in range(2)]
        for params, form in zip(runs, ("bare", "two steps")):
            groups = [{"params": params[:-1]}, {"params": params[-1:], "perturb": kind in ("absent", "zero")}]
            make = info.optim_cls if form == "bare" else partial(SAM, base_optimizer=info.optim_cls, rho=0.0)
            train(make(groups), params, form, loss=loss)
        same(*runs, info, SAM)
        assert not equal(runs[0][:-1], start[:-1])


def test_gradients_are_not_changed(SAM, info):
    """Neither by the climb, nor by the update (with maximize and weight decay) where torch leaves them alone."""
    for kwargs, about in inputs(info):
        params = parameters(info)
        if error_of(info.optim_cls, twins(params), **kwargs):
            continue
        opt = SAM(params, info.optim_cls, rho=0.5, **kwargs)
        for step in (opt.first_step, opt.second_step):
            opt.zero_grad()
            loss_of(params).backward()
            before = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
            step()
            for p, (g, value, version) in zip(params, before):
                assert p.grad is g and equal([g], [value]) and g._version == version, about

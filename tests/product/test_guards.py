"""Mistakes in the loop around SAM: a warning or an error, and weights that are what they were."""

import copy
import functools
import math
import warnings

import pytest
import torch
from small_problems import closure_of, equal, ones_step, parameters, set_gradients, two_steps, weights
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import mup2_fused as mup2
from mup2_fused.compiled_passes import kernel_of

ERASED = "no longer in the proportions"


def scaled(SAM, lr=0.4):
    """SAM with three learning rates: 4, 1 and 1/4 times lr."""
    model, base = mup2.MLP(3, 32, 2), mup2.MLP(3, 8, 2)
    opt = SAM(mup2.param_groups(model, base, lr=lr, rho=0.1))
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([4 * lr, lr, lr / 4])
    return opt


def run(opt, scheduler=None, steps=10):
    """Take some steps; return the warnings about learning rates."""
    params = [p for group in opt.param_groups for p in group["params"]]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            two_steps(opt, params)
            if scheduler:
                scheduler.step()
    return [warning for warning in found if ERASED in str(warning.message)]


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20),
        lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=2),
        lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=5),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10, eta_min=0.01),
        lambda opt: opt.param_groups[0].update(lr=0.1),
    ],
)
def test_learning_rates_that_have_lost_their_factors(SAM, make):
    opt = scaled(SAM)
    assert not run(opt)
    found = run(opt, make(opt), steps=12)
    assert len(found) == 1, "one warning for all steps"
    assert found[0].filename.endswith("small_problems.py"), "the warning points to the line that called SAM"


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: lr_scheduler.OneCycleLR(opt, [group["lr"] for group in opt.param_groups], total_steps=20),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
        lambda opt: lr_scheduler.LinearLR(opt, 1e-9, 1.0, 10),
        lambda opt: lr_scheduler.PolynomialLR(opt, 10),
        lambda opt: opt.param_groups[0].update(lr=0.0),
        lambda opt: opt.param_groups.reverse(),
        lambda opt: [group.update(lr=group["lr"] * 1e-8 + 1e-12) for group in opt.param_groups] and None,
        lambda opt: lr_scheduler.SequentialLR(opt, [lr_scheduler.LinearLR(opt), lr_scheduler.StepLR(opt, 2)], [3]),
        lambda opt: opt.load_state_dict(opt.state_dict()),
    ],
)
def test_schedulers_that_keep_the_factors(SAM, make):
    opt = scaled(SAM)
    assert not run(opt, make(opt), steps=12)


def test_the_factors_of_groups_that_came_later(SAM):
    opt = SAM([{"params": parameters(), "lr": 0.1, "role": "input"}], lr=0.1)
    opt.add_param_group({"params": parameters(), "lr": 0.4, "role": "hidden"})
    assert not run(opt)
    opt = copy.deepcopy(opt)
    opt.param_groups[1]["lr"] = opt.param_groups[0]["lr"] = 0.2
    assert len(run(opt)) == 1


@pytest.mark.parametrize("two_step", [False, True])
def test_a_second_pass_that_adds_to_the_first(SAM, two_step):
    params = parameters()
    opt = SAM(params, lr=0.1)
    closure = closure_of(opt, params, zero=False)
    if two_step:
        closure(), opt.first_step(), closure()
    with pytest.warns(UserWarning, match="seems to have added its gradient"):
        opt.second_step() if two_step else opt.step(closure)


def test_a_closure_that_adds_to_gradients_from_before(SAM):
    """As in loops that call backward before step(closure). It is an error, and the weights stay."""
    params = parameters()
    opt, before = SAM(params, lr=0.1), [p.detach().clone() for p in params]
    closure = closure_of(opt, params, zero=False)
    closure()
    with pytest.raises(RuntimeError, match="call opt.zero_grad\\(\\) at its start"):
        opt.step(closure)
    assert all(map(torch.equal, params, before)) and opt.phase.backups is None
    opt.zero_grad()
    with pytest.warns(UserWarning, match="seems to have added its gradient"):  # in one pass only
        opt.step(closure)


def test_a_closure_without_a_backward_pass(SAM):
    """It is an error if it returns nothing: one that replays a graph changes gradients unseen, and returns a loss."""
    params = parameters()
    opt, before = SAM(params, lr=0.1), [p.detach().clone() for p in params]
    closure_of(opt, params)()
    with pytest.raises(RuntimeError, match="the closure computed no gradient at w \\+ e"):
        opt.step(lambda: None)
    assert all(map(torch.equal, params, before)) and opt.phase.backups is None
    assert opt.step(opt.zero_grad) is None and all(map(torch.equal, params, before)), "no gradient, no update"
    closure_of(opt, params)()
    assert opt.step(lambda: 1.5) == 1.5 and not all(map(torch.equal, params, before))


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_second_pass_that_does_not_add(SAM, set_to_none):
    params = parameters()
    opt = SAM(params, lr=0.1)

    def closure():
        opt.zero_grad(set_to_none)
        return closure_of(opt, params, zero=False)()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            opt.step(closure)
            closure(), opt.first_step(zero_grad=True), closure(), opt.second_step()
        with opt.perturbed():
            pass
        nn.utils.clip_grad_norm_(params, 1e-3)  # changes the gradients once
        opt.second_step()


def test_a_second_pass_without_some_gradients(SAM):
    """A gradient at one end that is not touched, or is clipped without being new, tells nothing."""
    params = parameters()
    opt = SAM(params, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in (params[1:], params[:-1]):
            closure_of(opt, params)()
            opt.first_step()
            sum((p * p).sum() for p in some).backward()  # adds, but not to all
            opt.second_step()
        closure_of(opt, params)()
        opt.first_step(zero_grad=True)
        closure_of(opt, params)()
        nn.utils.clip_grad_norm_(params, 1e-3)
        opt.second_step()
    for _ in range(3):
        closure_of(opt, params)(), opt.first_step()
        assert not opt.guard.gradients, "three looks are enough"
        opt.second_step()


def test_gradients_whose_changes_torch_does_not_count(SAM):
    params = parameters()
    opt, before = SAM(params, lr=0.1), weights(params)
    with torch.inference_mode():
        for p in params:
            p.grad = torch.ones_like(p)
    opt.first_step()
    opt.second_step()
    assert equal(params, [w - 0.1 for w in before])


def test_two_optimizers_on_the_same_weights(SAM):
    """The second one would restore the weights to where the first one has perturbed them."""
    params = parameters()
    a, b = SAM(params, lr=0.1), SAM(params[1:], lr=0.1)
    before = weights(params)
    set_gradients(params)
    a.first_step()
    with pytest.raises(RuntimeError, match="another SAM has perturbed these weights"):
        b.first_step()
    a.restore()
    assert equal(params, before)
    for opt in (b, a):
        opt.first_step()
        opt.second_step()
    params[1].grad.fill_(math.nan)
    a.first_step()  # perturbs nothing
    params[1].grad.fill_(1.0)
    apart = SAM(params[:1], lr=0.1)
    b.first_step()
    apart.first_step()
    apart.second_step()
    b.second_step()


@pytest.mark.parametrize("name", ["second_step", "restore"])
def test_a_closure_that_ends_the_step(SAM, name):
    params = parameters()
    opt, calls = SAM(params, lr=0.0), []
    before = weights(params)

    def closure():
        closure_of(opt, params)()
        calls.append(name)
        if len(calls) == 2:
            getattr(opt, name)()

    with pytest.raises(RuntimeError, match=r"the closure called second_step\(\) or restore\(\)"):
        opt.step(closure)
    assert equal(params, before) and opt.phase.backups is None
    two_steps(opt, params)


def test_after_a_first_gradient_that_is_not_finite(SAM):
    """Nothing is perturbed: a loop may drop the batch and begin the next step, or save."""
    params = parameters()
    opt, before = SAM(params, lr=0.1), weights(params)
    set_gradients(params, math.nan)
    opt.first_step()
    assert equal(params, before) and opt.state_dict()["param_groups"]
    opt.load_state_dict(opt.state_dict())
    ones_step_weights = [w - 0.1 for w in before]
    set_gradients(params)
    opt.first_step()
    with pytest.raises(RuntimeError, match="weights are perturbed"):
        opt.state_dict()
    opt.restore()
    assert equal(params, before)
    ones_step(opt, params)
    assert equal(params, ones_step_weights) and opt.skipped_steps == 0


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("own_hook", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_for_all_optimizers_are_called_once(SAM, base, own_hook, scheduled):
    params, calls = parameters(), []
    opt = SAM(params, base, lr=0.1)
    scheduler = lr_scheduler.ConstantLR(opt.base_optimizer) if scheduled else None
    if own_hook:
        opt.base_optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
        opt.base_optimizer.register_step_post_hook(lambda *_: calls.append("own"))
    hooks = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer)),
    ]
    before = weights(params)
    try:
        two_steps(opt, params)
        opt.step(closure_of(opt, params))
    finally:
        for hook in hooks:
            hook.remove()
    if scheduled:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the scheduler has seen a step
            scheduler.step()
    assert calls == [opt, *["own"] * 2 * own_hook, opt] * 2 and not equal(params, before)


def test_arguments_of_other_packages(SAM):
    params = parameters()
    with pytest.raises(TypeError, match=r"SAM\(model.parameters\(\), torch.optim.SGD, lr=...\)"):
        SAM(torch.optim.SGD(params, 0.1))
    with pytest.raises(TypeError, match="adaptive=True is variant='elementwise' here"):
        SAM(params, adaptive=True, lr=0.1)
    assert SAM([{"params": params, "adaptive": True}], lr=0.1).variant == "elementwise"


def test_a_checkpoint_of_another_package(SAM):
    """davda54/sam keeps a copy of the weights in each parameter's state, and says in its groups what is adaptive."""
    params = parameters()
    opt = SAM(params, torch.optim.Adam, lr=0.1)
    saved = opt.state_dict()
    saved["state"] = {i: {"old_p": p.detach().clone()} for i, p in enumerate(params)}
    opt.load_state_dict(saved)
    two_steps(opt, params)
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in opt.state.values())
    saved["param_groups"][0].update(adaptive=True, variant=None)
    with pytest.raises(ValueError, match="different variants of SAM, 'elementwise' and 'sam'"):
        opt.load_state_dict(saved)


class Counting(torch.optim.SGD):
    """A base optimizer that saves more than its groups and its state: its lr falls with the steps that it has made."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = 1 / self.steps
        super().step(closure)

    def state_dict(self):
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "steps"})


def test_a_base_that_saves_more_than_torchs_optimizers(SAM):
    params = parameters()
    opt = SAM(params, Counting, momentum=0.9)
    for _ in range(3):
        two_steps(opt, params)
    resumed = SAM(params, Counting, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    two_steps(resumed, params)
    assert resumed.base_optimizer.steps == 4 and resumed.param_groups[0]["lr"] == 1 / 4
    assert resumed.state is resumed.base_optimizer.state and len(resumed.state) == len(params)


@pytest.mark.parametrize("factors", [{"rho": math.nan}, {"rho": -1.0}, {"gradnorm_scaling": 0.0}], ids=str)
def test_factors_that_a_schedule_has_spoilt(SAM, factors):
    params = parameters()
    opt, before = SAM(params, lr=0.1), weights(params)
    opt.param_groups[0].update(factors)
    set_gradients(params)
    with pytest.raises(ValueError, match="rho must be finite and >= 0"):
        opt.first_step()
    assert equal(params, before)


def test_a_scheduler_of_the_base_optimizer_keeps_the_kernel():
    """Other packages advise it. The scheduler replaces base.step() to see whether it is called."""
    params = parameters()
    opt = mup2.SAM(params, lr=0.4, backend="compiled")
    scheduler = lr_scheduler.ExponentialLR(opt.base_optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_steps(opt, params)
        scheduler.step()
    assert kernel_of(opt.base_optimizer) == "sgd" and opt.param_groups[0]["lr"] == 0.2
    step, calls = opt.base_optimizer.step, []
    for changed in (functools.wraps(step)(lambda: calls.append(step())), lambda: calls.append("no step")):
        opt.base_optimizer.step = changed
        two_steps(opt, params)
    assert calls == [None, "no step"]

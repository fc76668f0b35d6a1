"""State: checkpoints, copies, pickles, groups that are added, and loss scaling.

States that one kind of SAM saves and another one loads are in tests/equivalence.
"""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from small_problems import (
    BASES,
    WAYS,
    assert_close,
    closure_of,
    equal,
    ones_step,
    parameters,
    quadratic,
    set_gradients,
    twins,
    two_steps,
    weights,
)
from torch import nn

import mup2_ref


def trained(SAM, steps=3, **kwargs):
    params = parameters()
    opt = SAM([{"params": params[:1], "rho": 0.2}, {"params": params[1:]}], rho=0.1, lr=0.01, **kwargs)
    for _ in range(steps):
        opt.step(closure_of(opt, params))
    return params, opt


def through_a_file(params, opt, SAM):
    params = twins(params)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new = SAM([{"params": params[:1]}, {"params": params[1:]}], lr=123.0)
    new.load_state_dict(torch.load(file, weights_only=True))
    return params, new


ROUND_TRIPS = {
    "state_dict": through_a_file,
    "deepcopy": lambda params, opt, SAM: copy.deepcopy((params, opt)),
    "pickle": lambda params, opt, SAM: pickle.loads(pickle.dumps((params, opt))),
}


@pytest.mark.parametrize("how", ROUND_TRIPS)
@pytest.mark.parametrize("way", [*(dict(base_optimizer=base, **kwargs) for base, kwargs in BASES), *WAYS], ids=str)
def test_training_goes_on_bit_for_bit(SAM, way, how):
    """From the middle of an interval, after five steps. The reference, too, loads the state of each way."""
    params, opt = trained(SAM, steps=5, **way)
    new_params, new = ROUND_TRIPS[how](params, opt, partial(SAM, **way))
    assert new.param_groups is new.base_optimizer.param_groups and new.state is new.base_optimizer.state
    assert [g["rho"] for g in new.param_groups] == [0.2, 0.1]
    before = weights(params)
    for _ in range(4):
        assert opt.climbs == new.climbs
        opt.step(closure_of(opt, params))
        new.step(closure_of(new, new_params))
    assert equal(params, new_params) and not equal(params, before)
    assert all("sam_steps" not in group for group in (*opt.param_groups, *new.param_groups))
    groups = [{"params": twins(group["params"])} for group in opt.param_groups]
    mup2_ref.SAM(groups, type(opt.base_optimizer)).load_state_dict(opt.state_dict())
    for p, q in zip(params, new_params):
        for key, value in opt.state[p].items():
            assert torch.equal(value, new.state[q][key]), key


def test_state_of_the_bare_base_optimizer_loads_and_keeps_the_factors(SAM):
    params = parameters()
    sgd = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.3, momentum=0.9)
    quadratic(params).backward()
    sgd.step()
    _, opt = trained(SAM, momentum=0.9)
    assert [own.keys() for own in opt.state_dict()["state"].values()] == [{"momentum_buffer"}] * 3, "and no backup"
    saved = sgd.state_dict()
    saved["param_groups"][0]["variant"] = None  # as a SAM whose groups have none may save it
    opt.load_state_dict(copy.deepcopy(saved))
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.1] and opt.param_groups[0]["lr"] == 0.3
    assert [g["variant"] for g in opt.param_groups] == ["sam"] * 2
    opt.load_state_dict(given := copy.deepcopy(saved))
    assert given["param_groups"] == saved["param_groups"], "a state of the caller is not changed"
    for p, q in zip(params, opt.param_groups[0]["params"] + opt.param_groups[1]["params"]):
        assert torch.equal(sgd.state[p]["momentum_buffer"], opt.state[q]["momentum_buffer"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("finite", [True, False])
def test_copies_between_the_passes_are_whole(SAM, how, finite):
    """The copy and the original each restore their own weights, and skip the update if the gradient was not finite."""
    params, opt = trained(SAM, momentum=0.9)
    before = weights(params)
    set_gradients(params)
    params[0].grad[0, 0] = 1.0 if finite else math.nan
    opt.first_step()
    new_params, new = ROUND_TRIPS[how](params, opt, SAM)
    assert equal(new_params, params) and equal(params, before) != finite
    assert new.skipped_steps == opt.skipped_steps == 0
    for p in (*params, *new_params):
        p.grad = torch.ones_like(p)
    new.second_step()
    assert equal(params, before) != finite, "the original is still perturbed"
    opt.second_step()
    for p, q, w in zip(params, new_params, before):
        torch.testing.assert_close(p, q)
        assert torch.equal(p, w) != finite
    copies = [copy.deepcopy(opt) for opt in (opt, new)]
    assert [o.skipped_steps for o in (opt, new, *copies)] == [not finite] * 4
    two_steps(new, new_params)
    set_gradients(new_params)
    new.first_step()
    new.restore()


def test_skipped_steps_add_up_and_survive_copies_and_new_groups(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    for count in range(1, 5):
        set_gradients(params)
        params[0].grad[0, 0] = math.nan
        opt.first_step()
        if count == 2:
            opt.add_param_group({"params": parameters(shapes=[(3,)])})
        opt.second_step()
        if count == 3:
            opt = copy.deepcopy(opt)
            params = opt.param_groups[0]["params"]
        assert opt.skipped_steps == count
    opt.skipped_steps = 7
    ones_step(opt, params, math.nan)
    assert opt.skipped_steps == 8, "it can be set"


@pytest.mark.parametrize("how", [None, "deepcopy", "pickle"])
@pytest.mark.parametrize("bare", [True, False])
def test_what_the_base_optimizer_loads_counts(SAM, how, bare):
    """Of a bare optimizer, or of the base of another SAM, whose rho it has, too."""
    params, opt = trained(SAM, momentum=0.9)
    kept = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.3, momentum=0.5)
    state = kept.state_dict() if bare else opt.base_optimizer.state_dict()
    params, new = trained(SAM, interval=2, momentum=0.7)
    if how:
        params, new = ROUND_TRIPS[how](params, new, SAM)
    for group in new.param_groups:
        group["rho"] = 0.8
    new.base_optimizer.load_state_dict(state)
    assert new.param_groups is new.base_optimizer.param_groups and new.state is new.base_optimizer.state
    found = [(group["lr"], group["momentum"], group["rho"]) for group in new.param_groups]
    assert found == ([(0.3, 0.5, 0.8)] * 2 if bare else [(0.01, 0.9, 0.2), (0.01, 0.9, 0.1)])
    assert len(new.state) == (0 if bare else 3)
    new.step(closure_of(new, params))
    new.load_state_dict(new.state_dict())
    assert new.phase.steps == 4 and len(new.state) == 3
    assert [group["lr"] for group in new.param_groups] == [found[0][0]] * 2


def test_the_next_step_uses_a_new_list_of_groups(SAM):
    params = parameters()
    opt, before = SAM(params, lr=0.5), weights(params)
    opt.param_groups = [group | {"lr": 0.0} for group in opt.param_groups]
    two_steps(opt, params)
    assert equal(params, before)


def test_add_param_group(SAM):
    params, opt = trained(SAM, momentum=0.9)
    extra = parameters()
    opt.add_param_group({"params": extra, "rho": 0.7})
    group = opt.base_optimizer.param_groups[2]
    assert (group["rho"], group["perturb"], group["lr"], group["momentum"]) == (0.7, True, 0.01, 0.9)
    before = weights(extra)
    opt.step(closure_of(opt, params + extra))
    assert not equal(extra, before) and "momentum_buffer" in opt.state[extra[0]]


def test_dampening_after_a_skipped_first_update(SAM, device):
    """The first momentum is the whole gradient, also if a step before it was skipped or a state was loaded."""
    params = [nn.Parameter(torch.zeros(5, device=device))]
    opt = SAM(params, rho=0.1, lr=1.0, momentum=0.9, dampening=0.5)
    empty = copy.deepcopy(opt.state_dict())
    for value in (math.nan, 1.0, 1.0):
        ones_step(opt, params, value)
        opt = copy.deepcopy(opt)
        params = opt.param_groups[0]["params"]
    assert opt.skipped_steps == 1
    torch.testing.assert_close(params[0].detach(), torch.full((5,), -1.0 - 1.4, device=device))
    opt.load_state_dict(empty)
    ones_step(opt, params)
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], torch.ones(5, device=device))


class Plain(torch.optim.Optimizer):
    """A base optimizer whose step is not under no_grad."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = torch.ones(())
                p.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("base, key", [(torch.optim.Adam, "exp_avg"), (Plain, "seen")])
def test_only_a_first_step_at_lr_0_with_gradients_0_may_lack_its_first_half(SAM, base, key):
    """So torch.distributed.checkpoint makes the state that it then loads."""
    params = parameters()
    opt = SAM(params, base, lr=0.0, rho=0.1)
    before = weights(params)
    for prepare in (lambda: None, lambda: quadratic(params).backward()):
        prepare()
        with pytest.raises(RuntimeError, match="nothing is perturbed"):
            opt.step()
    set_gradients(params, 0.0)
    opt.step()
    assert equal(params, before) and all(key in opt.state[p] for p in params)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()


def scaled_pass(scaler, opt, params):
    opt.zero_grad()
    scaler.scale(quadratic(params)).backward()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("overflow_in", [None, 1, 2])
@pytest.mark.parametrize("base, kwargs", BASES)
def test_grad_scaler(SAM, base, kwargs, overflow_in, clip):
    """scaler.step(opt) must restore the weights on overflow too, keep momentum, and let the scaler adapt."""
    params = parameters()
    unscaled = twins(params)
    opt, plain = (SAM(x, base, rho=0.1, lr=0.01, **kwargs) for x in (params, unscaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = weights(params)
        for n in (1, 2):
            scaled_pass(scaler, opt, params)
            if step == 1 and overflow_in == n:
                params[0].grad[0, 0] = math.inf
            if n == 1:
                opt.first_step()
        if clip:  # belongs to the second pass
            scaler.unscale_(opt)
            assert nn.utils.clip_grad_norm_(params, 0.5) > 1
        scaler.step(opt)
        scaler.update()
        if step == 1 and overflow_in:
            assert equal(params, before) and opt.skipped_steps == 1
            assert clip or (params[1].grad.abs() < 100).all(), "gradients are unscaled in skipped steps, too"
            continue
        quadratic(unscaled).backward()
        plain.first_step(zero_grad=True)
        quadratic(unscaled).backward()
        if clip:
            nn.utils.clip_grad_norm_(unscaled, 0.5)
        plain.second_step(zero_grad=True)
    assert scaler.get_scale() == (2.0**9 if overflow_in == 2 else 2.0**10)
    assert_close(params, unscaled, rtol=1e-6, atol=1e-7)


def test_calls_that_a_grad_scaler_cannot_make_leave_no_scale_behind(SAM):
    """A closure; a step without a first half; a closure between the passes. A step without scaler may follow."""
    params = parameters()
    opt, scaler = SAM(params, rho=0.0, lr=0.1), torch.amp.GradScaler("cpu")
    for closure, perturbed, error in ((True, False, "closure"), (False, False, "first_step"), (True, True, "restore")):
        scaled_pass(scaler, opt, params)
        if perturbed:
            opt.first_step()
        with pytest.raises(RuntimeError, match=error):
            scaler.step(opt, *[closure_of(opt, params)] * closure)
        opt.restore()
        scaler.update()
        set_gradients(params)
        expected = [p.detach() - 0.1 * p.grad for p in params]
        opt.first_step()
        opt.second_step()
        assert_close(params, expected, rtol=1e-6, atol=1e-6)

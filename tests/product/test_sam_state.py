"""State: checkpoints, copies, pickles, groups that are added, and loss scaling."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from small_problems import (
    backward,
    classification,
    closure_of,
    equal,
    parameters,
    quadratic,
    set_gradients,
    twins,
    two_steps,
    weights,
)
from torch import nn

import mup2_fused as mup2
import mup2_ref

BASES = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]


def trained(SAM, base=torch.optim.SGD, steps=3, **kwargs):
    params = parameters()
    opt = SAM([{"params": params[:1], "rho": 0.2}, {"params": params[1:]}], base, rho=0.1, lr=0.01, **kwargs)
    for _ in range(steps):
        opt.step(closure_of(opt, params))
    return params, opt


def through_a_file(params, opt, SAM):
    params = twins(params)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new = SAM([{"params": params[:1]}, {"params": params[1:]}], type(opt.base_optimizer), lr=123.0)
    new.load_state_dict(torch.load(file, weights_only=True))
    return params, new


ROUND_TRIPS = {
    "state_dict": through_a_file,
    "deepcopy": lambda params, opt, SAM: copy.deepcopy((params, opt)),
    "pickle": lambda params, opt, SAM: pickle.loads(pickle.dumps((params, opt))),
}


@pytest.mark.parametrize("how", ROUND_TRIPS)
@pytest.mark.parametrize("base, kwargs", BASES)
def test_training_goes_on_bit_for_bit(SAM, base, kwargs, how):
    params, opt = trained(SAM, base, **kwargs)
    new_params, new = ROUND_TRIPS[how](params, opt, SAM)
    assert new.param_groups is new.base_optimizer.param_groups and new.state is new.base_optimizer.state
    assert [g["rho"] for g in new.param_groups] == [0.2, 0.1]
    for _ in range(3):
        opt.step(closure_of(opt, params))
        new.step(closure_of(new, new_params))
    assert equal(params, new_params)
    for p, q in zip(params, new_params):
        for key, value in opt.state[p].items():
            assert torch.equal(value, new.state[q][key]), key


KINDS = {
    "torch": partial(mup2.SAM, backend="torch"),
    "compiled": partial(mup2.SAM, backend="compiled"),
    "reference": mup2_ref.SAM,
}


@pytest.mark.parametrize("base, kwargs", BASES)
@pytest.mark.parametrize("source, target", [(a, b) for a in KINDS for b in KINDS if a != b])
def test_a_state_saved_by_one_loads_in_the_other(device, base, kwargs, source, target):
    if device == "cuda":
        base, kwargs = torch.optim.AdamW, {}  # whose step counts may be on the host or on the device
    params = [nn.Parameter(p.to(device)) for p in parameters()]
    opt = KINDS[source](params, base, rho=0.1, lr=0.01, **kwargs)
    for _ in range(3):
        opt.step(closure_of(opt, params))
    others = twins(params)
    other = KINDS[target](others, base, rho=0.9, lr=1.0)
    state = copy.deepcopy(opt.state_dict())
    for own in state["state"].values():
        assert own.get("step", torch.zeros(())).device.type == "cpu", "as torch saves it"
    other.load_state_dict(state)
    for _ in range(3):
        opt.step(closure_of(opt, params))
        other.step(closure_of(other, others))
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for key in opt.state[p]:
            torch.testing.assert_close(opt.state[p][key].cpu(), other.state[q][key].cpu(), rtol=1e-5, atol=1e-7)


def test_state_dict_has_momentum_names_and_no_backup(SAM):
    model = nn.Linear(3, 2)
    opt = SAM(model.named_parameters(), rho=0.1, lr=0.1, momentum=0.9)
    opt.step(closure_of(opt, list(model.parameters())))
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [set(s) for s in state["state"].values()] == [{"momentum_buffer"}] * 2
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_state_of_the_bare_base_optimizer_loads_and_keeps_the_factors(SAM):
    params = parameters()
    sgd = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.3, momentum=0.9)
    quadratic(params).backward()
    sgd.step()
    _, opt = trained(SAM, momentum=0.9)
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
    for p, q in zip(params, new_params):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
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
        params[0].grad = torch.full((5,), value, device=device)
        opt.first_step()
        opt.second_step()
        opt = copy.deepcopy(opt)
        params = opt.param_groups[0]["params"]
    assert opt.skipped_steps == 1
    torch.testing.assert_close(params[0].detach(), torch.full((5,), -1.0 - 1.4, device=device))
    opt.load_state_dict(empty)
    params[0].grad = torch.ones(5, device=device)
    opt.first_step()
    opt.second_step()
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], torch.ones(5, device=device))


# ------------------------------------------------------------------------------------ a step without a first half


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


# ------------------------------------------------------------------------------------ loss scaling


def scaled_pass(scaler, opt, params):
    opt.zero_grad()
    scaler.scale(quadratic(params)).backward()


@pytest.mark.parametrize("overflow_in", [None, 1, 2])
def test_grad_scaler(SAM, overflow_in):
    """scaler.step(opt) must restore the weights on overflow too, keep momentum, and let the scaler adapt."""
    params = parameters()
    unscaled = twins(params)
    opt, plain = (SAM(x, rho=0.1, lr=0.01, momentum=0.9) for x in (params, unscaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = weights(params)
        for n in (1, 2):
            scaled_pass(scaler, opt, params)
            if step == 1 and overflow_in == n:
                params[0].grad[0, 0] = math.inf
            if n == 1:
                opt.first_step()
        scaler.step(opt)
        scaler.update()
        if step == 1 and overflow_in:
            assert equal(params, before) and opt.skipped_steps == 1
            assert (params[1].grad.abs() < 100).all(), "gradients are unscaled in skipped steps, too"
        else:
            plain.step(closure_of(plain, unscaled))
    assert scaler.get_scale() == (2.0**9 if overflow_in == 2 else 2.0**10)
    for p, q in zip(params, unscaled):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


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
        for p, w in zip(params, expected):
            torch.testing.assert_close(p.detach(), w)


def test_clipping_with_a_grad_scaler_belongs_to_the_second_pass(SAM):
    """In float64, against SAM's equations with clipping at every step."""
    model, x, y = classification(mup2.MLP(5, 8, 3).double())
    x, scaler = 100 * x.double(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    params = list(copy.deepcopy(model).parameters())
    loss = lambda ps: nn.functional.cross_entropy(
        torch.func.functional_call(model, dict(zip([n for n, _ in model.named_parameters()], ps)), (x,)), y
    )
    opt = SAM(model.parameters(), lr=0.1, rho=0.2)
    for _ in range(4):
        for n in (1, 2):
            opt.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if n == 1:
                opt.first_step()
        scaler.unscale_(opt)
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
        scaler.step(opt)
        scaler.update()
        g = torch.autograd.grad(loss(params), params)
        norm = sum(v.square().sum() for v in g).sqrt()
        g = torch.autograd.grad(loss([p + 0.2 * v / norm for p, v in zip(params, g)]), params)
        norm = sum(v.square().sum() for v in g).sqrt()
        params = [(p - 0.1 * v / norm).detach().requires_grad_() for p, v in zip(params, g)]
    for p, q in zip(model.parameters(), params):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)  # clipping divides by float32 numbers


def float16_step(model, opt, scaler, x, y):
    for n in (1, 2):
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if n == 1:
            opt.first_step()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("base, kwargs", BASES)
def test_training_in_float16_from_a_scale_that_overflows(SAM, base, kwargs):
    """Steps that overflow, in either pass, change nothing but the scale; the other ones train."""
    model, x, y = classification(mup2.MLP(5, 8, 3))
    start, first = weights(model), backward(model, x, y)
    opt, scaler = SAM(model.parameters(), base, lr=0.05, rho=0.05, **kwargs), torch.amp.GradScaler("cpu", 2.0**26)
    float16_step(model, opt, scaler, x, y)
    assert scaler.get_scale() == 2.0**25 and opt.skipped_steps == 1 and equal(weights(model), start)
    assert not any(value.any() for state in opt.state.values() for value in state.values())
    for _ in range(60):
        float16_step(model, opt, scaler, x, y)
    assert 2 <= opt.skipped_steps < 30 and nn.functional.cross_entropy(model(x), y) < 0.6 * first

    for where in (1, 2):
        before, state, skipped = weights(model), copy.deepcopy(opt.state_dict()["state"]), opt.skipped_steps
        passes, scale = [], scaler.get_scale()

        def overflow(g, where=where, passes=passes):
            passes.append(g)
            return g * torch.inf if len(passes) == where else g

        hook = model.layers[1].weight.register_hook(overflow)
        float16_step(model, opt, scaler, x, y)
        hook.remove()
        assert equal(weights(model), before) and opt.skipped_steps == skipped + 1 and len(passes) == 2
        assert scaler.get_scale() == (scale if where == 1 else scale / 2)  # the second pass was not at fault
        torch.testing.assert_close(opt.state_dict()["state"], state, rtol=0, atol=0)
        float16_step(model, opt, scaler, x, y)
        assert not equal(weights(model), before)


def test_bfloat16_weights_lose_most_of_a_small_perturbation(SAM):
    """A limit of the number format, which seen_perturbation measures."""
    w = nn.Parameter((0.02 * torch.randn(1000, 1000)).bfloat16())
    w.grad = torch.randn(1000, 1000).bfloat16()
    before = w.detach().clone()
    SAM([w], rho=0.05, lr=0.1).first_step()
    assert 0 < (w != before).float().mean() < 0.5

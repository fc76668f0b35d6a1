"""A step against torch.optim and another package, weights that come back to the bit, gradients that are not finite.

Random shapes, strides, types and orders of calls are in tests/kernels/test_fuzz.py.
"""

import math

import pytest
import torch
from small_problems import DTYPES, VARIANTS, closure_of, equal, parameters, set_gradients, twins, two_steps, weights
from torch import nn

BASES = [
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, dampening=0.5, maximize=True)),
    (torch.optim.Adam, dict(lr=0.01, amsgrad=True, weight_decay=0.1)),
    (torch.optim.AdamW, dict(lr=0.01, foreach=False)),
    (torch.optim.ASGD, dict(lr=0.01)),
]


@pytest.mark.parametrize("base, kwargs", BASES, ids=lambda x: getattr(x, "__name__", None))
def test_rho_0_is_the_base_optimizer_bit_for_bit(SAM, backend, base, kwargs):
    mine = parameters()
    theirs = twins(mine)
    a, b = SAM(mine, base, rho=0.0, **kwargs), base(theirs, **kwargs)
    for _ in range(5):
        a.step(closure_of(a, mine))
        b.step(closure_of(b, theirs))
    if base is torch.optim.AdamW and backend == "compiled":
        # torch's sqrt on the CPU (MKL's) is not correctly rounded, ours is; the moments below are equal to the bit
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    else:
        assert equal(mine, theirs)
    for p, q in zip(mine, theirs):
        for key, value in b.state[q].items():
            assert not torch.is_tensor(value) or torch.equal(a.state[p][key], value)


def test_the_closure_and_the_steps_without_one_are_the_same(SAM):
    """step() is second_step(); zero_grad=True leaves no gradient behind."""
    start = parameters()
    runs = [twins(start) for _ in range(3)]
    closure, steps, last = (SAM(params, rho=0.1, lr=0.01, momentum=0.9) for params in runs)
    for _ in range(3):
        closure.step(closure_of(closure, runs[0]))
        for opt, params in ((steps, runs[1]), (last, runs[2])):
            closure_of(opt, params)()
            opt.first_step(zero_grad=True)
            assert all(p.grad is None for p in params)
            closure_of(opt, params)()
            opt.second_step(zero_grad=True) if opt is steps else opt.step()
            assert all((p.grad is None) == (opt is steps) for p in params)
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2]) and not equal(runs[0], start)


def test_maximize_climbs_in_what_is_minimized(SAM):
    w = nn.Parameter(torch.tensor([1.0]))
    opt = SAM([w], rho=0.1, lr=0.0, maximize=True)
    (-((w - 3) ** 2)).sum().backward()
    opt.first_step()
    assert w.item() == pytest.approx(0.9)  # the objective's worst point nearby is away from its maximum at 3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_is_exact_and_in_place(SAM, dtype, variant):
    """And gradients of zero perturb nothing."""
    params = parameters(dtype)
    with torch.no_grad():  # values that w + e - e would not bring back
        params[0][0] = torch.tensor([-0.0, 1e-7, 30.0], dtype=dtype)
    params[2].data = params[2].data.transpose(0, 2)  # not contiguous
    opt = SAM(params, rho=0.5, variant=variant, lr=0.1)
    set_gradients(params)
    before, addresses, gradients = weights(params), [p.data_ptr() for p in params], [p.grad.clone() for p in params]
    versions = [p._version for p in params]
    opt.first_step()
    assert not any(equal([p], [q]) for p, q in zip(params, before))
    assert equal([p.grad for p in params], gradients)
    assert all(p._version > v for p, v in zip(params, versions)), "autograd must see the change"
    for _ in range(2):
        opt.restore()
        assert equal(params, before)
    for p in params:
        p.grad.zero_()
    opt.first_step()
    assert all(map(torch.equal, params, before))
    opt.second_step()
    assert equal(params, before)
    two_steps(opt, params)
    assert [p.data_ptr() for p in params] == addresses


def test_gradients_in_one_pass_only(SAM):
    """At lr 0 nothing moves. Other packages leave such a weight perturbed for good, or restore a stale copy."""
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.0)
    before = weights(params)
    for _ in range(2):
        set_gradients(params)
        opt.first_step(zero_grad=True)
        set_gradients(params[:1])
        opt.second_step(zero_grad=True)
        assert equal(params, before)
    opt.param_groups[0]["lr"] = 0.5
    set_gradients(params[1:])
    opt.first_step(zero_grad=True)
    assert equal(params[:1], before[:1])
    set_gradients(params[:1])
    g = params[0].grad.clone()
    opt.second_step(zero_grad=True)
    assert equal(params, [before[0] - 0.5 * g, *before[1:]])
    opt.first_step()
    opt.second_step()  # without any gradient
    assert equal(params, [before[0] - 0.5 * g, *before[1:]]) and opt.skipped_steps == 0


def test_unperturbed_groups_stay_out_of_norm_and_perturbation(SAM):
    a, b = parameters(torch.float64, [(6,), (5,)])
    opt = SAM([{"params": [a]}, {"params": [b], "perturb": False}], rho=0.1, lr=0.1)
    set_gradients([a, b])
    b.grad *= 1e6
    b.grad[0] = math.nan
    before = weights([a, b])
    opt.first_step()
    assert equal([b], before[1:])
    torch.testing.assert_close(a - before[0], 0.1 * a.grad / a.grad.norm())
    opt.second_step()
    assert not equal([b], before[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_first_gradient(SAM, dtype, value):
    params = parameters(dtype)
    opt = SAM(params, rho=0.1, lr=0.1, momentum=0.9)
    two_steps(opt, params)
    before, momentum = weights(params), [opt.state[p]["momentum_buffer"].clone() for p in params]
    set_gradients(params)
    params[1].grad[3] = value
    opt.first_step(zero_grad=True)
    assert equal(params, before)
    set_gradients(params)
    opt.second_step()
    assert equal(params, before) and equal([opt.state[p]["momentum_buffer"] for p in params], momentum)
    two_steps(opt, params)
    assert not equal(params, before) and all(p.isfinite().all() for p in params)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("shape", [(3,), (0, 3)])
def test_a_skipped_step_counts_without_a_second_gradient(SAM, shape, restored):
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(shape))
    opt = SAM([p, q], lr=0.1, momentum=0.9)
    p.grad = torch.full((4,), torch.nan)
    if restored:
        with opt.perturbed():
            opt.zero_grad()
    else:
        opt.first_step(zero_grad=True)
    if shape == (0, 3):
        q.grad = torch.ones(0, 3)
    opt.second_step()
    assert opt.skipped_steps == 1 and torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("kind", ["plain", "complex", "sparse"])
@pytest.mark.parametrize("skip", [False, True])
def test_non_finite_second_gradient(SAM, kind, skip):
    """skip_nonfinite looks at all gradients, also those that cannot be perturbed by."""
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, dtype=torch.cfloat if kind == "complex" else None))
    opt = SAM([{"params": [p]}, {"params": [q], "perturb": kind == "plain"}], lr=0.1, rho=0.1, skip_nonfinite=skip)
    for value, skipped in ((1.0, 0), (complex(1, math.inf) if kind == "complex" else math.inf, int(skip))):
        before = q.detach().clone()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        if kind == "sparse":
            q.grad = q.grad.to_sparse()
        opt.first_step()
        q.grad = torch.full_like(q, value)
        if kind == "sparse":
            q.grad = q.grad.to_sparse()
        opt.second_step()
        assert opt.skipped_steps == skipped and torch.equal(q, before) == bool(skipped)

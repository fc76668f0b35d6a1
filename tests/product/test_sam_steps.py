"""A step of the optimizer against a numpy loop, torch.optim and another package; weights that come back to the bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import (
    DTYPES,
    VARIANTS,
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

# ---------------------------------------------------------------------------------------- the formula


def numpy_sam(ws, gradient, variant, rhos, scalings, perturbed, update):
    """One step written from the formulas, on numpy float64 arrays: returns the new weights."""
    g = [gradient(w) for w in ws]
    T = {
        "sam": [np.ones_like(w) for w in ws],
        "elementwise": [np.abs(w) for w in ws],
        "layerwise": [np.full_like(w, np.sqrt((w**2).sum())) for w in ws],
    }[variant]
    total = 0.0
    for i in perturbed:
        for t, x in zip(T[i].ravel(), g[i].ravel()):
            total += (scalings[i] * t * x) ** 2
    climbed = [w.copy() for w in ws]
    for i in perturbed:
        climbed[i] += rhos[i] * T[i] ** 2 * g[i] / math.sqrt(total)
    return [update(i, w, gradient(c)) for i, (w, c) in enumerate(zip(ws, climbed))]


class NumpySGD:
    def __init__(self, lr, momentum, weight_decay):
        self.lr, self.momentum, self.weight_decay, self.buffers = lr, momentum, weight_decay, {}

    def __call__(self, i, w, g):
        g = g + self.weight_decay * w
        self.buffers[i] = self.momentum * self.buffers[i] + g if i in self.buffers else g
        return w - self.lr * self.buffers[i]


class NumpyAdamW:
    def __init__(self, lr, weight_decay):
        self.lr, self.weight_decay, self.state = lr, weight_decay, {}

    def __call__(self, i, w, g):
        m, v, t = self.state.get(i, (0.0, 0.0, 0))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
        self.state[i] = m, v, t
        w = w * (1 - self.lr * self.weight_decay)
        return w - self.lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_matches_a_numpy_loop(SAM, variant, base):
    params = parameters(torch.float64)
    rhos, scalings, perturb = (0.1, 0.03, 0.5), (1.0, 2.5, 0.4), (True, True, False)
    groups = [
        {"params": [p], "rho": r, "gradnorm_scaling": s, "perturb": x}
        for p, r, s, x in zip(params, rhos, scalings, perturb)
    ]
    if base == "sgd":
        opt = SAM(groups, torch.optim.SGD, variant=variant, lr=0.01, momentum=0.9, weight_decay=0.1)
        update = NumpySGD(0.01, 0.9, 0.1)
    else:
        opt = SAM(groups, torch.optim.AdamW, variant=variant, lr=0.01, weight_decay=0.1)
        update = NumpyAdamW(0.01, 0.1)
    expected = [p.detach().numpy().copy() for p in params]
    for _ in range(10):
        opt.step(closure_of(opt, params))
        gradient = lambda w: 4 * (w - 0.3) ** 3 + np.cos(w)
        expected = numpy_sam(expected, gradient, variant, rhos, scalings, (0, 1), update)
    for p, w in zip(params, expected):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11)


def test_agrees_with_pytorch_optimizer(SAM):
    """With all factors 1 it is plain SAM, as another package has it."""
    peer = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer to compare with its SAM")
    for adaptive, variant in ((False, "sam"), (True, "elementwise")):
        mine = parameters(torch.float64)
        theirs = twins(mine)
        a = SAM(mine, torch.optim.SGD, rho=0.05, variant=variant, lr=0.01, momentum=0.9)
        b = peer.SAM(theirs, torch.optim.SGD, rho=0.05, adaptive=adaptive, lr=0.01, momentum=0.9)
        for _ in range(5):
            a.step(closure_of(a, mine))
            quadratic(theirs).backward()
            b.first_step(zero_grad=True)
            quadratic(theirs).backward()
            b.second_step(zero_grad=True)
        for p, q in zip(mine, theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # the peer keeps its norm in float32


BASES = [
    (torch.optim.SGD, dict(lr=0.01)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, dampening=0.5, maximize=True)),
    (torch.optim.Adam, dict(lr=0.01, amsgrad=True, weight_decay=0.1)),
    (torch.optim.AdamW, dict(lr=0.01, foreach=False)),
    (torch.optim.RMSprop, dict(lr=0.01, centered=True)),
    (torch.optim.Adagrad, dict(lr=0.01)),
    (torch.optim.NAdam, dict(lr=0.01)),
    (torch.optim.Rprop, dict(lr=0.01)),
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
        for p, q in zip(mine, theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
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
            quadratic(params).backward()
            opt.first_step(zero_grad=True)
            assert all(p.grad is None for p in params)
            quadratic(params).backward()
            opt.second_step(zero_grad=True) if opt is steps else opt.step()
            assert all((p.grad is None) == (opt is steps) for p in params)
            opt.zero_grad()
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2]) and not equal(runs[0], start)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=0, max_size=3),  # shape, empty and scalar ones too
            st.sampled_from(DTYPES),
            st.sampled_from(["both", "first", "second", "none"]),
            st.floats(0, 3),  # rho
            st.floats(0.1, 3),  # gradnorm_scaling
            st.booleans(),  # perturb
        ),
        min_size=1,
        max_size=5,
    ),
    variant=st.sampled_from(VARIANTS),
    backend=st.sampled_from(["torch", "compiled"]),
    seed=st.integers(0, 1000),
)
def test_any_shapes_dtypes_and_missing_gradients(tensors, variant, backend, seed):
    """The perturbation as in the formula, computed in float64 from the stored values; then exact restoration."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape, dtype, *_ in tensors]
    groups = [
        {"params": [p], "rho": rho, "gradnorm_scaling": scaling, "perturb": perturb}
        for p, (_, _, _, rho, scaling, perturb) in zip(params, tensors)
    ]
    opt = mup2.SAM(groups, variant=variant, backend=backend, lr=0.0)
    before = weights(params)
    set_gradients([p for p, t in zip(params, tensors) if t[2] in ("both", "first")])
    T = [
        {"sam": torch.ones_like(w), "elementwise": w.abs(), "layerwise": w.norm()}[variant]
        for w in map(torch.Tensor.double, before)
    ]
    active = [i for i, t in enumerate(tensors) if t[5] and params[i].grad is not None]
    norm = math.sqrt(sum((tensors[i][4] * T[i] * params[i].grad.double()).square().sum().item() for i in active))
    gradients = {i: params[i].grad.double() for i in active}
    opt.first_step(zero_grad=True)
    for i, (p, w) in enumerate(zip(params, before)):
        e = tensors[i][3] * T[i] ** 2 * gradients[i] / (norm + 1e-12) if i in active else torch.zeros_like(w.double())
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[p.dtype]
        expected = (w.double() + e).to(p.dtype)
        finite = expected.isfinite()
        torch.testing.assert_close(p[finite].double(), expected[finite].double(), rtol=tolerance, atol=tolerance)
    set_gradients([p for p, t in zip(params, tensors) if t[2] in ("both", "second")])
    opt.second_step()
    assert equal(params, before)


# -------------------------------------------------------------------------------- weights come back


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_is_exact_and_in_place(SAM, dtype, variant):
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
    for _ in range(3):
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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_perturb_nothing(SAM, dtype, variant):
    params = parameters(dtype)
    opt = SAM(params, rho=0.1, variant=variant, lr=0.5)
    before = weights(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.first_step()
    assert equal(params, before)
    opt.second_step()
    assert equal(params, before)


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


def test_maximize_climbs_in_what_is_minimized(SAM):
    w = nn.Parameter(torch.tensor([1.0]))
    opt = SAM([w], rho=0.1, lr=0.0, maximize=True)
    (-((w - 3) ** 2)).sum().backward()
    opt.first_step()
    assert w.item() == pytest.approx(0.9)  # the objective's worst point nearby is away from its maximum at 3


# -------------------------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_first_gradient(SAM, dtype, variant):
    params = parameters(dtype)
    opt = SAM(params, rho=0.1, variant=variant, lr=0.1, momentum=0.9)
    two_steps(opt, params)
    for count, value in enumerate((math.nan, math.inf, -math.inf), 1):
        before, momentum = weights(params), [opt.state[p]["momentum_buffer"].clone() for p in params]
        set_gradients(params)
        params[1].grad[3] = value
        opt.first_step(zero_grad=True)
        assert equal(params, before)
        set_gradients(params)
        opt.second_step()
        assert equal(params, before) and equal([opt.state[p]["momentum_buffer"] for p in params], momentum)
        assert opt.skipped_steps == count
        two_steps(opt, params)
        assert not equal(params, before) and all(p.isfinite().all() for p in params)
        assert opt.skipped_steps == count


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (0, 3)])
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


def test_non_finite_second_gradient(SAM):
    for skip, moved in ((False, True), (True, False)):
        params = parameters()
        opt = SAM(params, rho=0.1, lr=0.1, skip_nonfinite=skip)
        before = weights(params)
        set_gradients(params)
        opt.first_step()
        set_gradients(params)
        params[1].grad[0] = math.inf
        opt.second_step()
        assert (not equal(params, before)) == moved
        assert opt.skipped_steps == int(skip)


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_skip_nonfinite_sees_gradients_that_cannot_be_perturbed_by(SAM, kind):
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, dtype=torch.cfloat if kind == "complex" else None))
    opt = SAM([{"params": [p]}, {"params": [q], "perturb": False}], lr=0.1, rho=0.1, skip_nonfinite=True)
    for value, skipped in ((1.0, 0), (torch.inf, 1)):
        before = q.detach().clone()
        p.grad, q.grad = torch.ones_like(p), torch.full_like(q, value)
        if kind == "sparse":
            q.grad = q.grad.to_sparse()
        opt.first_step()
        opt.second_step()
        assert opt.skipped_steps == skipped and torch.equal(q, before) == bool(skipped)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, scale", [(torch.float16, 6e4), (torch.float16, 1e-6), (torch.float32, 1e30)], ids=str)
def test_norm_neither_overflows_nor_underflows(SAM, dtype, scale, variant):
    params = [nn.Parameter(torch.ones(1000, dtype=dtype))]
    opt = SAM(params, rho=10.0, variant=variant, lr=0.1)
    params[0].grad = torch.full((1000,), scale, dtype=dtype)
    opt.first_step()
    T2 = 1000 if variant == "layerwise" else 1
    expected = 1 + 10.0 * T2 / math.sqrt(T2) / math.sqrt(1000)
    torch.testing.assert_close(params[0].double(), torch.full((1000,), expected).double(), rtol=2e-3, atol=0)

"""The optimizer: against an independent numpy loop, against torch.optim, and every defect known from other packages."""

import contextlib
import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import IMPLEMENTATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

VARIANTS = ("sam", "elementwise", "layerwise")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def parameters(dtype=torch.float32, shapes=((5, 3), (7,), (2, 3, 4))):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_gradients(params, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape, dtype=torch.float64) * scale).to(p.dtype)


def snapshot(params):
    return [p.detach().clone() for p in params]


def equal(params, others):
    """Bit for bit: tells -0.0 from 0.0 and takes NaN as equal to itself."""
    as_bytes = lambda t: t.detach().reshape(-1).contiguous().view(torch.uint8)
    return all(torch.equal(as_bytes(p), as_bytes(q)) for p, q in zip(params, others))


def quadratic(params):
    """A loss whose gradient depends on w, so that the two passes differ."""
    return sum(((p - 0.3) ** 4).sum() + p.sin().sum() for p in params)


def closure_of(opt, params, loss=quadratic):
    def closure():
        opt.zero_grad()
        value = loss(params)
        value.backward()
        return value

    return closure


# ---------------------------------------------------------------------------------------- the formula


def numpy_sam(weights, gradient, variant, rhos, scalings, perturbed, update):
    """One step written from the formulas, on numpy float64 arrays: returns the new weights."""
    g = [gradient(w) for w in weights]
    T = {
        "sam": [np.ones_like(w) for w in weights],
        "elementwise": [np.abs(w) for w in weights],
        "layerwise": [np.full_like(w, np.sqrt((w**2).sum())) for w in weights],
    }[variant]
    total = 0.0
    for i in perturbed:
        for t, x in zip(T[i].ravel(), g[i].ravel()):
            total += (scalings[i] * t * x) ** 2
    climbed = [w.copy() for w in weights]
    for i in perturbed:
        climbed[i] += rhos[i] * T[i] ** 2 * g[i] / math.sqrt(total)
    return [update(i, w, gradient(c)) for i, (w, c) in enumerate(zip(weights, climbed))]


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
    weights = [p.detach().numpy().copy() for p in params]
    for _ in range(10):
        opt.step(closure_of(opt, params))
        gradient = lambda w: 4 * (w - 0.3) ** 3 + np.cos(w)
        weights = numpy_sam(weights, gradient, variant, rhos, scalings, (0, 1), update)
    for p, w in zip(params, weights):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturbation_has_length_rho(SAM, dtype):
    params = parameters(dtype, [(64, 65)])
    set_gradients(params)
    before = snapshot(params)
    SAM(params, rho=8.0, lr=0.1).first_step()
    length = (params[0].double() - before[0].double()).norm().item()
    assert length == pytest.approx(8.0, rel={torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5))


def test_agrees_with_pytorch_optimizer(SAM):
    """With all factors 1 it is plain SAM, as another package has it."""
    peer = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer to compare with its SAM")
    for adaptive, variant in ((False, "sam"), (True, "elementwise")):
        mine, theirs = parameters(torch.float64), None
        theirs = [nn.Parameter(p.detach().clone()) for p in mine]
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
def test_rho_0_is_the_base_optimizer_bit_for_bit(SAM, base, kwargs):
    mine = parameters()
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    a, b = SAM(mine, base, rho=0.0, **kwargs), base(theirs, **kwargs)
    for _ in range(5):
        a.step(closure_of(a, mine))
        b.step(closure_of(b, theirs))
    if base is torch.optim.AdamW and SAM is IMPLEMENTATIONS["mup2_fused"]:
        # torch's sqrt on the CPU (MKL's) is not correctly rounded, ours is; the moments below are equal to the bit
        for p, q in zip(mine, theirs):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    else:
        assert equal(mine, theirs)
    for p, q in zip(mine, theirs):
        for key, value in b.state[q].items():
            assert not torch.is_tensor(value) or torch.equal(a.state[p][key], value)


def test_two_step_api_equals_closure(SAM):
    mine = parameters()
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    a, b = (SAM(x, rho=0.1, lr=0.01, momentum=0.9) for x in (mine, theirs))
    for _ in range(3):
        a.step(closure_of(a, mine))
        quadratic(theirs).backward()
        b.first_step(zero_grad=True)
        quadratic(theirs).backward()
        b.second_step(zero_grad=True)
        assert all(p.grad is None for p in theirs)
    assert equal(mine, theirs)


def test_step_without_closure_is_second_step(SAM):
    mine = parameters()
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    a, b = (SAM(x, rho=0.1, lr=0.01) for x in (mine, theirs))
    for opt, params, second in ((a, mine, a.step), (b, theirs, b.second_step)):
        quadratic(params).backward()
        opt.first_step(zero_grad=True)
        quadratic(params).backward()
        second()
    assert equal(mine, theirs)


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
    before, addresses, gradients = snapshot(params), [p.data_ptr() for p in params], [p.grad.clone() for p in params]
    versions = [p._version for p in params]
    opt.first_step()
    assert not any(equal([p], [q]) for p, q in zip(params, before))
    assert equal([p.grad for p in params], gradients)
    assert all(p._version > v for p, v in zip(params, versions)), "autograd must see the change"
    opt.restore()
    assert equal(params, before)
    assert [p.data_ptr() for p in params] == addresses
    opt.restore()
    assert equal(params, before)
    for _ in range(3):
        set_gradients(params)
        opt.first_step()
        opt.second_step()
    assert [p.data_ptr() for p in params] == addresses


def test_gradient_in_the_first_pass_only(SAM):
    """At lr 0 nothing may move; other packages leave the weight perturbed for good, or restore a stale copy."""
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.0)
    before = snapshot(params)
    for _ in range(2):
        set_gradients(params)
        opt.first_step(zero_grad=True)
        set_gradients(params[:1])
        opt.second_step(zero_grad=True)
        assert equal(params, before)


def test_gradient_in_the_second_pass_only(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.5)
    set_gradients(params[1:])
    before = snapshot(params)
    opt.first_step(zero_grad=True)
    assert equal(params[:1], before[:1])
    set_gradients(params[:1])
    g = params[0].grad.clone()
    opt.second_step()
    assert equal(params, [before[0] - 0.5 * g, *before[1:]])


def test_no_gradients_at_all(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.5)
    before = snapshot(params)
    opt.first_step()
    opt.second_step()
    assert equal(params, before) and opt.skipped_steps == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_perturb_nothing(SAM, dtype, variant):
    params = parameters(dtype)
    opt = SAM(params, rho=0.1, variant=variant, lr=0.5)
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.first_step()
    assert equal(params, before)
    opt.second_step()
    assert equal(params, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_first_gradient(SAM, dtype, variant, value):
    params = parameters(dtype)
    opt = SAM(params, rho=0.1, variant=variant, lr=0.1, momentum=0.9)
    set_gradients(params)
    opt.first_step()
    opt.second_step()
    before, momentum = snapshot(params), [opt.state[p]["momentum_buffer"].clone() for p in params]
    set_gradients(params)
    params[1].grad[3] = value
    opt.first_step(zero_grad=True)
    assert equal(params, before)
    set_gradients(params)
    opt.second_step()
    assert equal(params, before) and equal([opt.state[p]["momentum_buffer"] for p in params], momentum)
    assert opt.skipped_steps == 1
    set_gradients(params)
    opt.first_step()
    opt.second_step()
    assert not equal(params, before) and all(p.isfinite().all() for p in params) and opt.skipped_steps == 1


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (0, 3)])
def test_a_skipped_step_counts_without_a_second_gradient(SAM, shape, restored):
    p, q = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(shape))
    opt = SAM([p, q], lr=0.1, momentum=0.9)
    p.grad = torch.full((4,), torch.nan)
    with opt.perturbed() if restored else contextlib.nullcontext(opt.first_step()):
        opt.zero_grad()
    if shape == (0, 3):
        q.grad = torch.ones(0, 3)
    opt.second_step()
    assert opt.skipped_steps == 1 and torch.equal(p, torch.ones(4))


def test_non_finite_gradient_of_a_tensor_that_is_not_perturbed(SAM):
    a, b = parameters(shapes=[(3,), (3,)])
    opt = SAM([{"params": [a]}, {"params": [b], "perturb": False}], rho=0.1, lr=0.1)
    set_gradients([a, b])
    b.grad[0] = math.nan
    before = snapshot([a])
    opt.first_step()
    assert not equal([a], before), "it does not enter the norm"


def test_non_finite_second_gradient(SAM):
    for skip, moved in ((False, True), (True, False)):
        params = parameters()
        opt = SAM(params, rho=0.1, lr=0.1, skip_nonfinite=skip)
        before = snapshot(params)
        set_gradients(params)
        opt.first_step()
        set_gradients(params)
        params[1].grad[0] = math.inf
        opt.second_step()
        assert (not equal(params, before)) == moved
        assert opt.skipped_steps == int(skip)


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


def test_bf16_norm_is_accumulated_in_high_precision():
    import mup2_ref

    g = torch.randn(100_003).bfloat16()
    norm = mup2_ref.joint_norm([(torch.ones_like(g), g, 1.0)], "sam")
    assert norm.item() == pytest.approx(g.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("which", [1, 2])
def test_exception_in_a_pass_leaves_the_weights_as_they_were(SAM, which):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    before, calls = snapshot(params), []

    def closure():
        calls.append(1)
        if len(calls) == which:
            raise KeyboardInterrupt
        opt.zero_grad()
        loss = quadratic(params)
        loss.backward()
        return loss

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert equal(params, before)
    calls.append(1)
    opt.step(closure)
    assert not equal(params, before)


def test_skipped_steps_add_up_and_survive_copies(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    for _ in range(3):
        set_gradients(params)
        params[0].grad[0, 0] = math.nan
        opt.first_step()
        opt.second_step()
    assert opt.skipped_steps == copy.deepcopy(opt).skipped_steps == 3


def test_unperturbed_groups_stay_out_of_norm_and_perturbation(SAM):
    a, b = parameters(torch.float64, [(6,), (5,)])
    opt = SAM([{"params": [a]}, {"params": [b], "perturb": False}], rho=0.1, lr=0.1)
    set_gradients([a, b])
    b.grad *= 1e6
    before = snapshot([a, b])
    opt.first_step()
    assert equal([b], before[1:])
    torch.testing.assert_close(a - before[0], 0.1 * a.grad / a.grad.norm())
    opt.second_step()
    assert not equal([b], before[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
    seed=st.integers(0, 1000),
)
def test_any_shapes_dtypes_and_missing_gradients(implementation, tensors, variant, seed):
    """Perturbation as in the formula, computed in float64 from the stored values; then exact restoration."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape, dtype, *_ in tensors]
    groups = [
        {"params": [p], "rho": rho, "gradnorm_scaling": scaling, "perturb": perturb}
        for p, (_, _, _, rho, scaling, perturb) in zip(params, tensors)
    ]
    opt = IMPLEMENTATIONS[implementation](groups, variant=variant, lr=0.0)
    before = snapshot(params)
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


# ---------------------------------------------------------------------------- phases and bad input


def test_phases(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"call first_step\(\) after the first backward"):
        opt.second_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        opt.step()
    set_gradients(params)
    before = snapshot(params)
    opt.first_step()
    climbed = snapshot(params)
    for call in (opt.first_step, lambda: opt.step(lambda: 0.0), opt.state_dict, lambda: opt.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"second_step\(\)"):
            call()
        assert equal(params, climbed)
    opt.restore()
    assert equal(params, before)
    with pytest.raises(RuntimeError):
        opt.second_step()


def test_maximize_climbs_in_what_is_minimized(SAM):
    w = nn.Parameter(torch.tensor([1.0]))
    opt = SAM([w], rho=0.1, lr=0.0, maximize=True)
    (-((w - 3) ** 2)).sum().backward()
    opt.first_step()
    assert w.item() == pytest.approx(0.9)  # the objective's worst point nearby is away from its maximum at 3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("option", [{"foreach": True}, {"fused": True}])
def test_options_of_the_base_optimizer_pass_through(SAM, base, option):
    mine = parameters()
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    a, b = SAM(mine, base, rho=0.1, lr=0.01, **option), SAM(theirs, base, rho=0.1, lr=0.01)
    for _ in range(3):
        a.step(closure_of(a, mine))
        b.step(closure_of(b, theirs))
    assert next(iter(option)) in a.base_optimizer.defaults
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)


def test_a_learning_rate_that_is_a_tensor(SAM):
    params = parameters()
    opt = SAM(params, torch.optim.AdamW, rho=0.1, lr=torch.tensor(0.01))
    before = snapshot(params)
    opt.step(closure_of(opt, params))
    assert not equal(params, before)


def test_running_out_of_memory_while_climbing(monkeypatch):
    """An error in the middle of the perturbation leaves no weight perturbed. (The twin has its memory before.)"""
    import mup2_ref

    params = parameters()
    opt = mup2_ref.SAM(params, rho=0.1, lr=0.1)
    before, perturb_ = snapshot(params), mup2_ref.perturb_

    def fails_at_the_last(w, *args):
        if w is params[-1]:
            raise MemoryError
        perturb_(w, *args)

    set_gradients(params)
    monkeypatch.setattr(mup2_ref, "perturb_", fails_at_the_last)
    with pytest.raises(MemoryError):
        opt.first_step()
    assert equal(params, before)
    monkeypatch.undo()
    opt.first_step()
    assert not equal(params, before)


def test_sparse_gradients_are_fine_where_nothing_is_perturbed(SAM):
    embedding, head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    opt = SAM([{"params": embedding.parameters(), "perturb": False}, {"params": head.parameters()}], rho=0.1, lr=0.1)
    before = snapshot(embedding.parameters())

    def closure():
        opt.zero_grad()
        loss = head(embedding(torch.tensor([1, 2]))).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert not equal(embedding.parameters(), before)


def test_sparse_and_complex_gradients(SAM):
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = SAM(embedding.parameters(), rho=0.1, lr=0.1)
    before = snapshot(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        opt.first_step()
    assert equal(embedding.parameters(), before)
    w = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    opt = SAM([w], rho=0.1, lr=0.1)
    w.abs().sum().backward()
    with pytest.raises(RuntimeError, match="view_as_real"):
        opt.first_step()


@pytest.mark.parametrize("key", ["rho", "gradnorm_scaling"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_radius(SAM, key, value):
    with pytest.raises(ValueError, match=f"{key} must be finite"):
        SAM([{"params": parameters(), key: value}], lr=0.1)
    if key == "rho":
        with pytest.raises(ValueError, match=key):
            SAM(parameters(), rho=value, lr=0.1)
    opt = SAM(parameters(), lr=0.1)
    with pytest.raises(ValueError, match=key):
        opt.add_param_group({"params": parameters(), key: value})
    with pytest.raises(ValueError, match="gradnorm_scaling must be finite and > 0"):  # 0 / 0 in the norm
        opt.add_param_group({"params": parameters(), "gradnorm_scaling": 0})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        opt.add_param_group(parameters())
    assert len(opt.param_groups) == 1


def test_bad_constructor_arguments(SAM):
    params = parameters()
    with pytest.raises(TypeError, match="a class such as torch.optim.SGD"):
        SAM(params, torch.optim.SGD(params, lr=0.1))
    for base in (torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.SparseAdam):
        with pytest.raises(TypeError, match=f"{base.__name__} cannot be the base"):
            SAM(params, base)
    with pytest.raises(ValueError, match="differentiable"):
        SAM(params, lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="unknown variant 'asam'"):
        SAM(params, variant="asam", lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], lr=0.1)
    with pytest.raises(TypeError, match="iterable of Tensors"):
        SAM(params[0], lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):
        SAM(params, lr=-1.0)


def test_groups_and_optimizer_must_agree_on_the_variant(SAM):
    import mup2_ref

    groups = mup2_ref.param_groups(mup2_ref.MLP(4, 8, 2), mup2_ref.MLP(4, 4, 2), lr=1, rho=1, variant="elementwise")
    with pytest.raises(ValueError, match="scaled for variant 'elementwise', but the optimizer's is 'sam'"):
        SAM(groups)
    state = SAM(groups, variant="elementwise").state_dict()
    with pytest.raises(ValueError, match="scaled for variant 'elementwise'"):
        SAM([{"params": g["params"]} for g in groups], lr=0.1).load_state_dict(state)


def test_groups_of_the_caller_are_not_changed(SAM):
    group = {"params": parameters(), "rho": 0.1}
    SAM([group], torch.optim.SGD, lr=0.1)
    assert set(group) == {"params", "rho"}


# ------------------------------------------------------------------------------ closures, schedulers, hooks


def test_closure_runs_twice_and_the_first_loss_is_returned(SAM):
    params = parameters()
    opt, losses = SAM(params, rho=0.1, lr=0.1), []

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = quadratic(params)
        loss.backward()
        losses.append(loss.item())
        return loss

    with torch.no_grad():
        returned = opt.step(closure)
    assert len(losses) == 2 and losses[0] != losses[1] and returned.item() == losses[0]


def test_a_loss_of_zero_is_a_loss(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.1)
    before = snapshot(params)

    def closure():
        opt.zero_grad()
        loss = quadratic(params)
        (loss - loss.detach()).backward()
        return 0.0

    assert opt.step(closure) == 0.0
    assert not equal(params, before)


SCHEDULERS = {
    "StepLR": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.5),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("two_step", [False, True])
def test_schedulers_without_warnings(SAM, name, two_step):
    params = parameters()
    opt = SAM([{"params": params[:1], "lr": 0.2}, {"params": params[1:]}], rho=0.1, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](opt)
        for _ in range(3):
            if two_step:
                set_gradients(params)
                opt.first_step(zero_grad=True)
                set_gradients(params)
                opt.second_step()
            else:
                opt.step(closure_of(opt, params))
            scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert opt.param_groups[0]["lr"] != 0.2
    before = snapshot(params)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step(closure_of(opt, params))
    assert equal(params, before), "the base optimizer must use the learning rate of opt.param_groups"


def test_step_hooks_run_once_a_step(SAM):
    params, calls = parameters(), []
    opt = SAM(params, rho=0.1, lr=0.1)
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step(closure_of(opt, params))
    set_gradients(params)
    opt.first_step()
    opt.second_step()
    assert calls == ["pre", "post"] * 2


def test_named_parameters(SAM):
    model = nn.Linear(3, 2)
    opt = SAM(model.named_parameters(), rho=0.1, lr=0.1)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


# ----------------------------------------------------------------------------------- state


def trained(SAM, base=torch.optim.SGD, steps=3, **kwargs):
    params = parameters()
    opt = SAM([{"params": params[:1], "rho": 0.2}, {"params": params[1:]}], base, rho=0.1, lr=0.01, **kwargs)
    for _ in range(steps):
        opt.step(closure_of(opt, params))
    return params, opt


def round_trips():
    def through_state_dict(params, opt, SAM):
        params = [nn.Parameter(p.detach().clone()) for p in params]
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        new = SAM(groups, type(opt.base_optimizer), lr=123.0)
        new.load_state_dict(torch.load(file, weights_only=True))
        return params, new

    return {
        "state_dict": through_state_dict,
        "deepcopy": lambda params, opt, SAM: copy.deepcopy((params, opt)),
        "pickle": lambda params, opt, SAM: pickle.loads(pickle.dumps((params, opt))),
    }


@pytest.mark.parametrize("how", round_trips())
@pytest.mark.parametrize("base, kwargs", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_training_goes_on_bit_for_bit(SAM, base, kwargs, how):
    params, opt = trained(SAM, base, **kwargs)
    new_params, new = round_trips()[how](params, opt, SAM)
    assert new.param_groups is new.base_optimizer.param_groups and new.state is new.base_optimizer.state
    assert [g["rho"] for g in new.param_groups] == [0.2, 0.1]
    for _ in range(3):
        opt.step(closure_of(opt, params))
        new.step(closure_of(new, new_params))
    assert equal(params, new_params)
    for p, q in zip(params, new_params):
        for key, value in opt.state[p].items():
            assert torch.equal(value, new.state[q][key]), key


def test_state_dict_has_momentum_and_no_backup(SAM):
    _params, opt = trained(SAM, momentum=0.9)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert [set(s) for s in state["state"].values()] == [{"momentum_buffer"}] * 3


def test_state_of_the_bare_base_optimizer_loads_and_keeps_the_factors(SAM):
    params = parameters()
    sgd = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.3, momentum=0.9)
    quadratic(params).backward()
    sgd.step()
    _, opt = trained(SAM, momentum=0.9)
    opt.load_state_dict(sgd.state_dict())
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.1] and opt.param_groups[0]["lr"] == 0.3
    for p, q in zip(params, opt.param_groups[0]["params"] + opt.param_groups[1]["params"]):
        assert torch.equal(sgd.state[p]["momentum_buffer"], opt.state[q]["momentum_buffer"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_between_the_passes_are_whole(SAM, how):
    params, opt = trained(SAM, momentum=0.9)
    before = snapshot(params)
    set_gradients(params)
    opt.first_step()
    new_params, new = round_trips()[how](params, opt, SAM)
    assert equal(new_params, params)
    new.restore()
    assert equal(new_params, before) and not equal(params, before)


def test_add_param_group(SAM):
    params, opt = trained(SAM, momentum=0.9)
    extra = parameters()
    opt.add_param_group({"params": extra, "rho": 0.7})
    group = opt.base_optimizer.param_groups[2]
    assert (group["rho"], group["perturb"], group["lr"], group["momentum"]) == (0.7, True, 0.01, 0.9)
    before = snapshot(extra)
    opt.step(closure_of(opt, params + extra))
    assert not equal(extra, before) and "momentum_buffer" in opt.state[extra[0]]


# ------------------------------------------------------------------------------------ loss scaling


@pytest.mark.parametrize("overflow_in", [None, 1, 2])
def test_grad_scaler(SAM, overflow_in):
    """scaler.step(opt) must restore the weights on overflow too, keep momentum, and let the scaler adapt."""
    params = parameters()
    reference = [nn.Parameter(p.detach().clone()) for p in params]
    opt, plain = (SAM(x, rho=0.1, lr=0.01, momentum=0.9) for x in (params, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        before = snapshot(params)
        for n in (1, 2):
            opt.zero_grad()
            scaler.scale(quadratic(params)).backward()
            if step == 1 and overflow_in == n:
                params[0].grad[0, 0] = math.inf
            if n == 1:
                opt.first_step()
        scaler.step(opt)
        scaler.update()
        if step == 1 and overflow_in:
            assert equal(params, before) and opt.skipped_steps == 1
        else:
            plain.step(closure_of(plain, reference))
    assert scaler.get_scale() == (2.0**9 if overflow_in == 2 else 2.0**10)
    for p, q in zip(params, reference):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_only_a_first_step_at_lr_0_with_gradients_0_may_lack_its_first_half(SAM):
    """So torch.distributed.checkpoint makes the state that it then loads."""
    params = parameters()
    opt = SAM(params, torch.optim.Adam, lr=0.0, rho=0.1)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()
    quadratic(params).backward()
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()
    set_gradients(params, 0.0)
    opt.step()
    assert equal(params, before)
    assert all("exp_avg" in opt.state[p] for p in params)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()


def test_grad_scaler_with_a_closure_is_refused(SAM):
    params = parameters()
    opt = SAM(params, rho=0.1, lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(quadratic(params)).backward()
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(opt, closure_of(opt, params))
    opt.step(closure_of(opt, params))  # and leaves nothing behind


def test_grad_scaler_step_without_first_step_leaves_no_scale_behind(SAM):
    params = parameters()
    opt, scaler = SAM(params, rho=0.0, lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(quadratic(params)).backward()
    with pytest.raises(RuntimeError, match="first_step"):
        scaler.step(opt)
    before = snapshot(params)
    set_gradients(params)
    gradients = [p.grad.clone() for p in params]
    opt.first_step()
    opt.second_step()
    for p, w, g in zip(params, before, gradients):
        torch.testing.assert_close(p, w - 0.1 * g)


def test_clipping_with_a_grad_scaler_belongs_to_the_second_pass(SAM):
    params = parameters(torch.float64)
    reference = [nn.Parameter(p.detach().clone()) for p in params]
    opt, plain = (SAM(x, rho=0.1, lr=0.01) for x in (params, reference))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(quadratic(params)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(quadratic(params)).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(params, 0.5)
    scaler.step(opt)
    quadratic(reference).backward()
    plain.first_step(zero_grad=True)
    quadratic(reference).backward()
    nn.utils.clip_grad_norm_(reference, 0.5)
    plain.second_step()
    for p, q in zip(params, reference):
        torch.testing.assert_close(p, q)


def test_bfloat16_weights_lose_most_of_a_small_perturbation(SAM):
    """A limit that the README states."""
    w = nn.Parameter((0.02 * torch.randn(1000, 1000)).bfloat16())
    w.grad = torch.randn(1000, 1000).bfloat16()
    before = w.detach().clone()
    SAM([w], rho=0.05, lr=0.1).first_step()
    assert (w != before).float().mean() < 0.5


@pytest.mark.parametrize("kind", ["complex", "sparse"])
def test_skip_nonfinite_sees_gradients_that_cannot_be_perturbed_by(SAM, kind):
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, dtype=torch.cfloat if kind == "complex" else None))
    opt = SAM([{"params": [p]}, {"params": [q], "perturb": False}], lr=0.1, rho=0.1, skip_nonfinite=True)
    for value, skipped in ((1.0, 0), (torch.inf, 1)):
        before = q.detach().clone()
        for _ in range(2):
            p.grad, q.grad = torch.ones_like(p), torch.full_like(q, value)
            if kind == "sparse":
                q.grad = q.grad.to_sparse()
            if opt._backup is None:
                opt.first_step()
        opt.second_step()
        assert opt.skipped_steps == skipped and torch.equal(q, before) == bool(skipped)


def test_a_base_optimizer_without_no_grad_makes_its_state(SAM):
    """torch.distributed.checkpoint steps with gradients and learning rates of 0 before it loads."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["seen"] = torch.ones(())
                    p.add_(p.grad, alpha=-group["lr"])

    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], Plain, lr=0.0, rho=0.1)
    p.grad = torch.zeros(3)
    opt.step()
    assert opt.state[p]["seen"] == 1 and torch.equal(p, torch.ones(3))

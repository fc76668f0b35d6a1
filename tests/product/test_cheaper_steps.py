"""Steps with less than two passes: an interval between SAM steps, ascent by momentum, and on a part of a batch.

Each is compared in float64 with the loop written out.
"""

import copy
import math
from functools import partial

import pytest
import torch
from small_problems import WAYS, assert_close, backward, classification, closure_of, equal, parameters, twins, weights
from test_capture import capture
from torch import nn

import mup2_fused as mup2
import mup2_ref
from mup2_fused.loops import passes

MOMENTA = [
    (torch.optim.SGD, dict(lr=0.05, momentum=0.9), "momentum_buffer"),
    (torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1), "momentum_buffer"),
    (torch.optim.SGD, dict(lr=0.05, momentum=0.9, dampening=0.5), "momentum_buffer"),
    (torch.optim.SGD, dict(lr=0.05, momentum=0.9, maximize=True), "momentum_buffer"),
    (torch.optim.Adam, dict(lr=0.01), "exp_avg"),
    (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1), "exp_avg"),
]
PART = dict(momentum=0.7)


def bounded(params):
    """A loss whose gradient depends on w, and is bounded, so that maximizing it does not diverge."""
    return sum(((p - 0.3) ** 2).log1p().sum() + p.sin().sum() for p in params)


def gradients(params):
    loss = bounded(params)
    return loss.detach(), torch.autograd.grad(loss, params)


def climbed(params, directions, rho, variant):
    """Copies of w + rho T² v / norm, by the reference's formulas."""
    norm = mup2_ref.joint_norm([(p, v, 1.0) for p, v in zip(params, directions)], variant)
    moved = twins(params)
    with torch.no_grad():
        for p, v in zip(moved, directions):
            mup2_ref.perturb_(p, v, rho / (norm + mup2_ref.EPS), variant)
    return moved


def plain_step(opt, params, grads):
    for p, g in zip(params, grads):
        p.grad = g.clone()
    opt.step()


def loop_with(opt, params, form):
    """One step of a user's loop."""
    closure = closure_of(opt, params, bounded)
    if form == "closure":
        return opt.step(closure)
    loss = closure()
    if form == "asks":
        if opt.first_step():
            closure()
    elif form == "asks, zero_grad":
        if opt.first_step(zero_grad=True):
            closure()
    else:  # as loops were written before there was an interval
        opt.first_step(zero_grad=True)
        closure()
    opt.second_step(zero_grad=True)
    return loss


@pytest.mark.parametrize("form", ["closure", "asks", "asks, zero_grad", "always two passes"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_interval(SAM, form, base):
    params = parameters(torch.float64)
    expected = twins(params)
    opt, plain = SAM(params, base, rho=0.2, lr=0.01, interval=3), base(expected, lr=0.01)
    for step in range(8):
        assert opt.climbs == (step % 3 == 0)
        loss, g = gradients(expected)
        if step % 3 == 0:
            g = gradients(climbed(expected, g, 0.2, "sam"))[1]
        plain_step(plain, expected, g)
        assert loop_with(opt, params, form).item() == pytest.approx(loss.item())
        assert_close(params, expected)


@pytest.mark.parametrize("end", ["clip", "scaler"])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_gradients_stay_visible_in_a_step_without_sam(SAM, passes, end):
    """Between first_step(zero_grad=True) and the update. The gradients of passes that are not needed replace them."""
    params = parameters(torch.float64)
    expected = twins(params)
    opt, plain = SAM(params, rho=0.2, lr=0.01, interval=2), torch.optim.SGD(expected, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale = scaler.scale if end == "scaler" else lambda loss: loss

    for step in range(4):
        scale(bounded(params)).backward()
        climbs = opt.first_step(zero_grad=True)
        assert all((p.grad is None) == climbs for p in params)
        for _ in range(max(passes, climbs)):
            scale(bounded(params) / max(passes, 1)).backward()
        _, g = gradients(expected)
        if step % 2 == 0:
            g = gradients(climbed(expected, g, 0.2, "sam"))[1]
        norm = torch.linalg.vector_norm(torch.stack([x.norm() for x in g]))
        if end == "clip":
            assert torch.nn.utils.clip_grad_norm_(params, 0.1).item() == pytest.approx(norm.item())
            opt.second_step(zero_grad=True)
        else:
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        plain_step(plain, expected, [x * (0.1 / (norm + 1e-6)) for x in g] if end == "clip" else g)
        assert_close(params, expected)
    assert not any(p._backward_hooks for p in params)


def test_gradients_that_a_second_pass_does_not_reach(SAM):
    """In a step without SAM the second pass counts, if there is one; so does it after an interrupted step."""
    a, b = params = parameters(torch.float64)[:2]
    opt = SAM(params, rho=0.2, lr=0.01, interval=2)
    opt.step(closure_of(opt, params, bounded))
    before = weights(params)
    for _ in range(2):
        opt.zero_grad()
        bounded(params).backward()
        assert not opt.first_step(zero_grad=True)
    bounded([b]).backward()
    opt.second_step()
    assert equal([a], before[:1]) and a.grad is None and not equal([b], before[1:])


def test_a_scaler_without_gradients(SAM):
    params = parameters(torch.float64)
    opt, before = SAM(params, rho=0.2, lr=0.01), weights(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(bounded(params)).backward()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="GradScaler found no gradient"):
        scaler.step(opt)
    assert equal(params, before)


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
@pytest.mark.parametrize("base, kwargs, key", MOMENTA)
@pytest.mark.parametrize("form", ["closure", "two steps"])
def test_ascent_against_the_momentum(SAM, base, kwargs, key, variant, form):
    params = parameters(torch.float64)
    expected = twins(params)
    opt = SAM(params, base, rho=0.2, variant=variant, ascent="momentum", **kwargs)
    plain, calls = base(expected, **kwargs), []

    def closure():
        calls.append(weights(params))
        return closure_of(opt, params, bounded)()

    for step in range(6):
        moved = climbed(expected, [plain.state[p][key] for p in expected], -0.2, variant) if step else expected
        loss, g = gradients(moved)
        before = weights(params)
        if form == "closure":
            assert opt.step(closure).item() == pytest.approx(loss.item())
        else:
            assert opt.first_step() is True
            closure()
            opt.second_step()
        assert_close(calls[-1], moved)
        assert equal(calls[-1], before) == (step == 0), "there is no momentum before the first step"
        plain_step(plain, expected, g)
        assert_close(params, expected)
    assert len(calls) == 6, "one pass for each step"


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_first_pass_on_a_part_of_the_batch(SAM, two_step, interval):
    """train_epoch, step(closure, ascent_closure) and the loop written out take the same steps, batch norm's too."""
    net = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model, x, y = classification(net())
    batches = [(x[i : i + 6], y[i : i + 6]) for i in range(0, 12, 6)] * 2
    models = [model, copy.deepcopy(model)]
    opts = [SAM(m.parameters(), lr=0.05, rho=0.2, momentum=0.9, interval=interval) for m in models]
    mup2.train_epoch(models[0], opts[0], batches, ascent_samples=2)
    other, opt = models[1], opts[1]
    for step, (x, y) in enumerate(batches):
        closure = partial(backward, other, x, y)

        def ascent():
            with mup2.frozen_buffers(other):
                return backward(other, x[:2], y[:2])

        if not two_step:
            opt.step(closure, ascent)
            continue
        ascent() if step % interval == 0 else closure()
        if opt.first_step():
            closure()
        opt.second_step()
    assert equal(weights(models[0]), weights(models[1]))
    assert all(torch.equal(a, b) for a, b in zip(models[0].buffers(), models[1].buffers()))
    assert models[0][1].num_batches_tracked == len(batches), "the ascent leaves the statistics alone"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_train_epoch_and_its_failures(SAM, way):
    model, x, y = classification(mup2.MLP(5, 8, 3))
    opt, passes = SAM(model.parameters(), lr=0.05, rho=0.1, **way), []
    count = model.register_forward_hook(lambda *_: passes.append(1))
    mup2.train_epoch(model, opt, [(x, y)] * 6)
    assert len(passes) == 6 + (6 // way["interval"] if "interval" in way else 0)
    count.remove()
    before = weights(model)

    def fail(*_):
        raise KeyboardInterrupt

    model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        mup2.train_epoch(model, opt, [(x, y)])
    assert equal(weights(model), before)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_that_are_not_finite(SAM, way):
    """skip_nonfinite skips updates in every kind of step, and the phase goes on; a GradScaler's overflow, too."""
    params = parameters()
    opt = SAM(params, lr=0.01, rho=0.1, skip_nonfinite=True, **way)
    for step in range(6):
        before = weights(params)
        opt.first_step() if opt.moments else None
        closure_of(opt, params)()
        if step in (2, 3):
            params[1].grad[0] = math.nan
        if not opt.moments and opt.first_step():
            closure_of(opt, params)()
        opt.second_step()
        assert equal(params, before) == (step in (2, 3)), step
    assert opt.skipped_steps == 2 and opt.phase.steps == 6
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        before = weights(params)
        closure = closure_of(opt, params, lambda params: scaler.scale(bounded(params)))
        passes(opt, closure, closure)
        if step == 1:
            params[0].grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()
        assert equal(params, before) == (step == 1)
    assert scaler.get_scale() == 2.0**9


def training_step(model, opt, x, y):
    """With PART's momentum, the first pass takes a part of the batch."""

    def closure(samples=None):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[:samples]), y[:samples])
        loss.backward()
        return loss

    return opt.step(closure, partial(closure, 3) if opt.defaults.get("momentum") == PART["momentum"] else None)


def test_a_part_of_the_batch_with_a_scaled_loss(SAM):
    model, x, y = classification(mup2.MLP(5, 8, 3).double())
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        other = copy.deepcopy(model)
        opt = SAM(other.parameters(), lr=0.05, rho=0.1)
        mup2.train_epoch(other, opt, [(x.double(), y)] * 4, scaler=scaler, ascent_samples=3)
        runs.append(weights(other))
    assert_close(*runs)
    assert not equal(runs[0], weights(model))


@pytest.mark.parametrize("way", [*WAYS, PART], ids=str)
def test_captured_steps(device, way):
    """A graph for each kind of step; capturing leaves the phase where it was."""
    model, x, y = classification(mup2.MLP(5, 8, 3))
    model, x, y = model.to(device), x.to(device), y.to(device)
    other = copy.deepcopy(model)
    opts = [mup2.SAM(m.parameters(), lr=0.05, rho=0.1, backend="compiled", **way) for m in (model, other)]
    steps = [lambda x, y, m=m, o=o: training_step(m, o, x, y).detach() for m, o in zip((model, other), opts)]
    opts[0].param_groups[0]["lr"] = torch.tensor(0.05, device=device)
    for m_step in steps:
        m_step(x, y)
    kinds = 2 if "interval" in way else 1
    replay = capture(steps[1], other, opts[1], x, y, kinds=kinds)
    assert opts[1].phase.steps == 1
    for _ in range(5):
        steps[0](x, y)
        replay(x, y)
        assert equal(weights(model), weights(other)) and opts[0].climbs == opts[1].climbs


def test_what_cannot_be_combined(SAM):
    params = parameters()
    for kwargs, words in (
        (dict(ascent="momentum"), "needs SGD with momentum in every group"),
        (dict(ascent="momentum", base_optimizer=torch.optim.RMSprop), "not RMSprop"),
        (dict(ascent="momentum", momentum=0.9, interval=2), "leave out interval"),
        (dict(ascent="moment", momentum=0.9), "unknown name 'moment'"),
        (dict(interval=0), "it is 1 or more, not 0"),
        (dict(interval=1.5), "it is 1 or more, not 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            SAM(params, lr=0.1, **kwargs)
    opt = SAM(params, lr=0.1, momentum=0.9, ascent="momentum")
    before = weights(params)
    with pytest.raises(RuntimeError, match="leave out ascent_closure"):
        opt.step(closure_of(opt, params), closure_of(opt, params))
    opt.param_groups[0]["momentum"] = 0.0  # as load_state_dict of another SGD would do
    with pytest.raises(ValueError, match="needs SGD with momentum in every group"):
        opt.step(closure_of(opt, params))
    assert equal(params, before)
    model, x, y = classification(mup2.MLP(5, 8, 3))
    for wrong, samples in ((torch.optim.SGD(model.parameters()), 2), (SAM(model.parameters(), lr=0.1), 0)):
        with pytest.raises(ValueError, match="ascent_samples is 1 or more"):
            mup2.train_epoch(model, wrong, [(x, y)], ascent_samples=samples)


def test_the_loss_at_w_plus_e_in_a_step_without_sam(SAM):
    params = parameters()
    opt = SAM(params, lr=0.1, interval=2)
    opt.step(closure_of(opt, params))
    before = weights(params)
    closure_of(opt, params)()
    with opt.perturbed():
        assert not equal(params, before)
    assert equal(params, before)


def test_the_seen_perturbation_is_the_one_against_the_momentum(SAM):
    params = parameters()
    opt = SAM(params, lr=0.01, rho=0.1, momentum=0.9, ascent="momentum")
    opt.step(closure_of(opt, params))
    before = weights(params)
    (norm, cosine), _ = mup2.seen_perturbation(opt)
    assert norm == pytest.approx(1, abs=1e-3) and cosine == pytest.approx(1, abs=1e-3) and equal(params, before)


def test_graphs_need_no_sums_of_earlier_updates(monkeypatch):
    """Replays change the moments unseen. Here, each step does; from the first captured step on, no sum is used."""
    pytest.importorskip("mup2_fused._C")
    params = parameters()
    opt = mup2.SAM(params, lr=0.01, rho=0.1, momentum=0.9, ascent="momentum", backend="compiled")
    lengths = []
    for step in range(6):
        before = weights(params)
        with monkeypatch.context() as patch:
            if step == 3:
                patch.setattr(mup2.compiled_passes, "built_with_cuda", True)
                patch.setattr(torch.cuda, "is_initialized", lambda: True)
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            opt.first_step()
        e = [p.detach() - w for p, w in zip(params, before)]
        lengths.append(math.sqrt(sum((x.double() ** 2).sum().item() for x in e)))
        closure_of(opt, params)()
        opt.second_step()
        for p in params:
            moment = opt.state[p]["momentum_buffer"]
            torch.empty(0, dtype=moment.dtype).set_(moment.untyped_storage()).mul_(2)
    assert lengths == pytest.approx([0, 0.2, 0.2, 0.1, 0.1, 0.1], rel=1e-4)

"""Loops that were written for other packages' SAM: the same weights after changing the import, or an error.

pytorch_optimizer's SAM stands for all: it has the algorithm of davda54/sam and Composer. Its norm is in float32.
"""

import copy
from functools import partial

import pytest
import torch
from small_problems import BASES, assert_close, equal, weights
from torch import nn

peer = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer to compare with its SAM")
BATCHES = 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def data():
    torch.manual_seed(1)
    return [(torch.randn(12, 5).double(), torch.randint(3, (12,))) for _ in range(BATCHES)]


def smooth_cross_entropy(f, y, smoothing=0.1):
    """One loss per sample: the divergence from the smoothed targets."""
    targets = torch.full_like(f, smoothing / (f.shape[1] - 1)).scatter_(1, y[:, None], 1 - smoothing)
    return nn.functional.kl_div(f.log_softmax(1), targets, reduction="none").sum(-1)


def running_statistics(model, enabled):
    """As davda54/sam's example switches them off in the second pass: by a momentum of 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            if not hasattr(module, "kept"):
                module.kept = module.momentum
            module.momentum = module.kept if enabled else 0


def compare(SAM, loop, *, adaptive=False, statistics=True):
    """Both optimizers in the same loop, in float64: equal weights, and equal statistics of batch norm."""
    ends = []
    for make in (partial(peer.SAM, adaptive=adaptive), partial(SAM, variant="elementwise" if adaptive else "sam")):
        model = network()
        start = weights(model)
        opt = make(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.05, momentum=0.9, weight_decay=5e-4)
        loop(model, opt)
        ends.append([*model.parameters(), *[model[1].running_mean, model[1].running_var] * statistics])
        assert not equal(weights(model), start)
    assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adaptive", [False, True])
def test_two_passes_of_davda54_sam(SAM, adaptive):
    """As in its example: smoothed targets, statistics of the first pass only, rates set in the groups of the base."""

    def loop(model, opt):
        for _ in range(2):
            for x, y in data():
                running_statistics(model, True)
                smooth_cross_entropy(model(x), y).mean().backward()
                opt.first_step(zero_grad=True)
                running_statistics(model, False)
                smooth_cross_entropy(model(x), y).mean().backward()
                opt.second_step(zero_grad=True)
            for group in opt.base_optimizer.param_groups:
                group["lr"] *= 0.2

    compare(SAM, loop, adaptive=adaptive)


def closure_loop(model, opt, *, before, clip=None):
    """step(closure). before: there is a backward pass before it, as packages want it whose closure runs once."""
    for x, y in data():

        def closure(**_):  # Composer passes ddp_sync=False
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        if before or isinstance(opt, peer.SAM):
            closure()
        opt.step(closure)
        opt.zero_grad()


def test_closures_of_composer(SAM):
    """Its optimizer runs the closure twice, as ours does."""
    compare(SAM, partial(closure_loop, before=False, clip=0.1))


def test_closures_of_pytorch_optimizer(SAM):
    """A closure() before step(closure) is one pass too many here: weights are right, but batch norm sees it."""
    compare(SAM, partial(closure_loop, before=True), statistics=False)


def test_a_grad_scaler_that_unscales_before_both_steps(SAM):
    """Without scaler.step, as other packages' SAM cannot use it. The scale changes between the passes."""

    def loop(model, opt):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        for x, y in data():
            for step in (opt.first_step, opt.second_step):
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                step(zero_grad=True)
                scaler.update()
        assert scaler.get_scale() == 4.0 * 2 ** (2 * BATCHES)

    compare(SAM, loop)


@pytest.mark.parametrize("adaptive, variant", [(False, "sam"), (True, "elementwise")])
@pytest.mark.parametrize("base, kwargs", BASES)
def test_a_checkpoint_of_pytorch_optimizer(SAM, base, kwargs, adaptive, variant):
    """Training goes on with its momenta and its rho."""
    model = network()
    theirs = peer.SAM(model.parameters(), base, rho=0.5, adaptive=adaptive, lr=0.01, **kwargs)
    closure_loop(model, theirs, before=True)
    other = copy.deepcopy(model)
    mine = SAM(other.parameters(), base, variant=variant, lr=1.0)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    before = weights(model)
    closure_loop(model, theirs, before=True)
    closure_loop(other, mine, before=False)
    assert_close(model.parameters(), other.parameters(), rtol=1e-6, atol=1e-7)  # the peer's norm is in float32
    assert not equal(weights(model), before)

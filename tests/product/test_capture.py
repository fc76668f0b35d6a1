"""A whole iteration captured as one CUDA graph. Without a GPU, a stand-in replays the captured function itself."""

import contextlib
import copy
from functools import partial
from unittest import mock

import pytest
import torch
from small_problems import backward, equal, train_closure
from torch import nn

import mup2_fused as mup2
import mup2_ref

SAM = partial(mup2.SAM, backend="compiled")
BASES = [  # the first one with train_epoch
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    (torch.optim.AdamW, dict(weight_decay=0.1)),
]


def problem(device="cpu"):
    layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    x, y = torch.randn(60, 12, 5), torch.randint(3, (60, 12))
    return nn.Sequential(*layers).to(device), x.to(device), y.to(device)


def training_step(model, opt):
    return lambda x, y: opt.step(train_closure(opt, model, x, y))


def tensors(model, opt):
    state = [value for p in model.parameters() for value in opt.state[p].values()]
    return [t.detach().cpu().clone() for t in (*model.parameters(), *model.buffers(), *state)]


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True


class Replayed:
    """In place of torch.cuda, without a GPU: capturing runs the step, and replaying runs it on the same tensors."""

    def __init__(self, step):
        self.step, self.calls = step, []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        self.outputs = self.step(*inputs)
        return self.outputs

    def replay(self):
        steps = self.phase.steps
        self.outputs.copy_(self.step(*self.calls[-1]))
        self.phase.steps = steps  # no graph counts on the host

    def capture(self, model, opt, *inputs, **kwargs):
        self.phase = getattr(opt, "phase", None)  # the reference has none
        fakes = dict.fromkeys(["Stream", "current_stream"], mock.Mock())
        fakes |= dict.fromkeys(["stream", "graph"], lambda *args, **kwargs: contextlib.nullcontext())
        fakes |= {"CUDAGraph": lambda: self, "get_rng_state": lambda device: None}
        with mock.patch.multiple(torch.cuda, set_rng_state=lambda state, device: None, **fakes):
            return mup2.capture(self, model, opt, *(x.as_subclass(OnGPU) for x in inputs), **kwargs)


def capture(step, model, opt, *inputs, kinds=1):
    """mup2.capture, on a CPU too. kinds: of steps, each with a graph of its own."""
    if inputs[0].is_cuda:
        return mup2.capture(step, model, opt, *inputs)
    fake = Replayed(step)
    replay = fake.capture(model, opt, *inputs)
    assert len(fake.calls) == 4 * kinds
    return replay


@pytest.mark.parametrize("base, kwargs", BASES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_captured_step_is_the_step(device, base, kwargs, steps_before):
    """50 steps with new data and learning rates; a skipped one too; state that was there before capturing or not."""
    model, x, y = problem(device)
    x[30, 0, 0] = torch.nan
    other, runs = copy.deepcopy(model), []
    for m in (model, other):
        opt = SAM(m.parameters(), base, lr=0.125, rho=0.1, **kwargs)
        step = training_step(m, opt)
        if not kwargs:
            step = lambda x, y, m=m, opt=opt: mup2.train_epoch(m, opt, [(x, y)])
        for i in range(steps_before):
            step(x[i], y[i])
        if m is other:
            example = 30 if steps_before else 50  # skipped while it is captured, or not
            step = capture(step, m, opt, x[example], y[example])
        else:
            opt.param_groups[0]["lr"] = torch.tensor(0.125, device=device)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
        losses = []
        for i in range(steps_before, 50):
            losses.append(step(x[i], y[i]).cpu().clone())
            scheduler.step()
            m.train(kwargs != {})  # evaluation leaves it so; train_epoch goes back
        runs.append([torch.stack(losses).nan_to_num(), opt.param_groups[0]["lr"].cpu(), *tensors(m, opt)])
        assert opt.skipped_steps == 1 and losses[30 - steps_before].isnan()
    assert equal(*([t.nan_to_num() for t in run] for run in runs)) and runs[0][1] < 0.02


@pytest.mark.parametrize("fails_in", [1, 4])
def test_a_step_that_fails_while_it_is_captured_leaves_nothing_behind(fails_in):
    """In the first run for warming up, or while capturing; at w + e."""
    model, x, y = problem()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1, momentum=0.9)
    training_step(model, opt)(x[0], y[0])
    before, passes = tensors(model, opt), []

    def step(x, y):
        for take in (opt.first_step, opt.second_step):
            backward(model, x, y)
            passes.append(take)
            if len(passes) == 2 * fails_in:
                raise RuntimeError("operation not permitted when stream is capturing")
            take()

    with pytest.raises(RuntimeError, match="not permitted"):
        Replayed(step).capture(model, opt, x[1], y[1])
    assert len(passes) == 2 * fails_in and equal(tensors(model, opt), before)
    assert opt.param_groups[0]["lr"] == 0.1 and isinstance(opt.param_groups[0]["lr"], float)
    assert opt.phase.backups is None and all(p.grad is None for p in model.parameters())


def test_a_captured_step_refuses_what_it_does_not_read():
    """Other shapes, weights that are perturbed, and other groups or learning rates. A copied optimizer is captured."""
    model, x, y = problem()
    model, opt = copy.deepcopy((model, SAM(model.parameters(), lr=0.1, rho=0.1)))
    before = tensors(model, opt)
    replay = capture(training_step(model, opt), model, opt, x[0], y[0])
    assert equal(tensors(model, opt), before)
    replay(x[0], y[0])
    assert not torch.equal(tensors(model, opt)[0], before[0])
    with pytest.raises(ValueError, match=r"takes \(12, 5\) torch.float32, \(12,\) torch.int64"):
        replay(x[0, :7], y[0, :7])
    backward(model, x[0], y[0])
    with opt.perturbed(), pytest.raises(RuntimeError, match="before the captured step"):
        replay(x[0], y[0])
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(RuntimeError, match="groups have been added.*capture again"):
        replay(x[0], y[0])
    del opt.param_groups[1:]
    replay(x[0], y[0])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(RuntimeError, match="learning rates replaced.*capture again"):
        replay(x[0], y[0])


def test_what_cannot_be_captured():
    model, x, y = problem()
    for error, message, kind in (
        (ValueError, "without amsgrad", partial(SAM, base_optimizer=torch.optim.Adam, amsgrad=True)),
        (ValueError, "same_randomness", partial(SAM, same_randomness=True)),
        (ValueError, "RMSprop waits for the host", partial(SAM, base_optimizer=torch.optim.RMSprop)),
        (ValueError, "take one step before", partial(SAM, momentum=0.9, dampening=0.1)),
        (TypeError, "backend='compiled'", mup2_ref.SAM),
        (TypeError, "backend='compiled'", partial(mup2.SAM, backend="torch")),
    ):
        with pytest.raises(error, match=message):
            Replayed(None).capture(model, kind(model.parameters(), lr=0.1), x[0], y[0])
    opt = SAM(model.parameters())
    step = training_step(model, opt)
    with pytest.raises(ValueError, match="all of them on the GPU"):
        mup2.capture(step, model, opt, x[0], y[0])
    with pytest.raises(ValueError, match="one run of step for warming up"):
        Replayed(step).capture(model, opt, x[0], y[0], warmup=0)
    with pytest.raises(ValueError, match="at least one input"):
        mup2.capture(step, model, opt)
    backward(model, x[0], y[0])
    opt.first_step()
    with pytest.raises(RuntimeError, match="weights are perturbed"):
        mup2.capture(step, model, opt, x[0], y[0])
    opt.restore()
    assert opt.param_groups[0]["lr"] == 0.001 and not opt.state


@pytest.mark.cuda
@pytest.mark.parametrize("base, kwargs", BASES)
def test_nothing_waits_for_the_host(base, kwargs):
    """With loss scaling too: any synchronizing call raises an error."""
    model, x, y = problem("cuda")
    opt = SAM(model.parameters(), base, lr=0.1, rho=0.1, **kwargs)
    scaler = torch.amp.GradScaler("cuda")
    step = training_step(model, opt)

    def scaled(x, y):
        for number in (1, 2):
            opt.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if number == 1:
                opt.first_step()
        scaler.step(opt)
        scaler.update()

    step(x[0], y[0])
    scaled(x[0], y[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            step(x[i], y[i])
            scaled(x[i], y[i])
    finally:
        torch.cuda.set_sync_debug_mode("default")

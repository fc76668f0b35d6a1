"""The whole iteration as one graph: by torch.compile, and captured on a GPU."""

import contextlib
import copy
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import mup2_fused
import mup2_ref
from captured import training
from mup2_ref import MLP

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASES = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    (torch.optim.AdamW, dict(weight_decay=0.1)),
]


def problem(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    return (
        nn.Sequential(*layers).to(device),
        torch.randn(60, 12, 5, device=device),
        torch.randint(3, (60, 12)).to(device),
    )


def training_step(model, opt):
    def step(x, y):
        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        return opt.step(closure)

    return step


def tensors(model, opt):
    state = [value for p in model.parameters() for value in opt.state[p].values()]
    return [t.detach().cpu().clone() for t in (*model.parameters(), *model.buffers(), *state)]


# ------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture(autouse=True)
def _one_compilation_per_test():
    torch.compiler.reset()


@pytest.mark.parametrize("what", ["model", "training step"])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the inductor itself
def test_compiled_training_is_eager_training(SAM, what):
    """With the inductor. The second pass of a compiled model sees the perturbed weights."""
    model, x, y = problem()
    twin = copy.deepcopy(model)
    a, b = (SAM(m.parameters(), lr=0.1, rho=0.5, momentum=0.9) for m in (model, twin))
    eager = training_step(model, a)
    compiled = training_step(torch.compile(twin), b) if what == "model" else torch.compile(training_step(twin, b))
    for i in range(4):
        torch.testing.assert_close(compiled(x[i], y[i]), eager(x[i], y[i]))
    for p, q in zip(tensors(model, a), tensors(twin, b), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_recipe_for_one_compiled_function():
    """The README's: no graph break, muP²'s radii and learning rates, a skipped step; SAM's steps within rounding."""
    (recipe,) = (code for code in RECIPES if "fullgraph=True" in code)
    torch.manual_seed(0)
    model, base = MLP(5, 16, 3), MLP(5, 4, 3)
    twin, x, y = copy.deepcopy(model), torch.randn(6, 12, 5), torch.randint(3, (6, 12))
    x[2, 0, 0] = torch.nan
    names = dict(torch=torch, model=model, loss_function=nn.functional.cross_entropy)
    names |= dict(groups=mup2_ref.param_groups(model, base, lr=0.1, rho=0.5), loader=list(zip(x, y)))
    exec(recipe, names)
    opt = mup2_ref.SAM(mup2_ref.param_groups(twin, base, lr=0.1, rho=0.5), lr=0.1, momentum=0.9)
    for i in range(6):
        training_step(twin, opt)(x[i], y[i])
    assert opt.skipped_steps == 1 and not any(map(torch.equal, model.parameters(), MLP(5, 16, 3).parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ------------------------------------------------------------------------------------------ CUDA graphs


class Replayed:
    """In place of torch.cuda, without a GPU: capturing runs the step, and replaying runs it on the same tensors."""

    def __init__(self, step):
        self.step, self.calls = step, []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.step(*inputs)

    def replay(self):
        self.outputs.copy_(self.step(*self.calls[-1]))

    def patches(self):
        fakes = dict.fromkeys(["Stream", "current_stream"], mock.Mock())
        fakes |= dict.fromkeys(["stream", "graph"], lambda *args, **kwargs: contextlib.nullcontext())
        fakes |= {"CUDAGraph": lambda: self, "get_rng_state": lambda device: None}
        patches = contextlib.ExitStack()
        patches.enter_context(mock.patch.multiple(torch.cuda, set_rng_state=lambda state, device: None, **fakes))
        patches.enter_context(mock.patch("mup2_fused.graph._on_gpu", lambda x: True))
        return patches


def stand_in(step, model, opt, *inputs):
    """mup2_fused.capture, on a CPU too."""
    if inputs[0].is_cuda:
        return mup2_fused.graph.capture(step, model, opt, *inputs)
    fake = Replayed(step)
    with fake.patches():
        replay = mup2_fused.graph.capture(fake, model, opt, *inputs)
    assert len(fake.calls) == 4
    fake.outputs = replay.__closure__[[*replay.__code__.co_freevars].index("outputs")].cell_contents
    return replay


def captured(model, opt, x, y):
    return stand_in(training_step(model, opt), model, opt, x, y)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base, kwargs", BASES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_captured_step_is_the_step(device, base, kwargs, steps_before):
    """50 steps with new data and learning rates; a skipped one too; state that was there before capturing or not."""
    model, x, y = problem(device)
    x[30, 0, 0] = torch.nan
    twin = copy.deepcopy(model)
    runs = []
    for m in (model, twin):
        opt = mup2_fused.SAM(m.parameters(), base, lr=0.125, rho=0.1, **kwargs)
        step = training_step(m, opt)
        for i in range(steps_before):
            step(x[i], y[i])
        if m is twin:
            example = 30 if steps_before else 50  # skipped while it is captured, or not
            step = captured(m, opt, x[example], y[example])
        else:
            opt.param_groups[0]["lr"] = torch.tensor(0.125, device=device)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
        losses = []
        for i in range(steps_before, 50):
            losses.append(step(x[i], y[i]).cpu().clone())
            scheduler.step()
        runs.append([torch.stack(losses).nan_to_num(), opt.param_groups[0]["lr"].cpu(), *tensors(m, opt)])
        assert opt.skipped_steps == 1 and losses[30 - steps_before].isnan()
    assert len(runs[0]) == len(runs[1])
    for p, q in zip(*runs):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
    assert runs[0][1] < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("base, kwargs", BASES)
def test_training_with_a_captured_iteration_is_train_epoch(device, base, kwargs, monkeypatch):
    """Three epochs with a schedule, batch norm and a smaller last batch: losses, weights, buffers, state to the bit."""
    monkeypatch.setattr(mup2_fused, "capture", stand_in)
    model, x, y = problem(device)
    batches = [*zip(x[:4], y[:4]), (x[4, :7], y[4, :7])]
    runs = []
    for m in (model, copy.deepcopy(model)):
        opt = mup2_fused.SAM(m.parameters(), base, lr=0.125, rho=0.1, **kwargs)
        if m is model:
            opt.param_groups[0]["lr"] = torch.tensor(0.125, device=device)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 20)
        if m is model:
            train = partial(mup2_ref.train_epoch, m, opt, scheduler=scheduler)
        else:
            train = training(m, opt, batches[0], scheduler=scheduler)
        losses = []
        for _ in range(3):
            losses.append(train(batches).cpu())
            m.eval()  # as evaluation leaves it
        runs.append([torch.stack(losses), opt.param_groups[0]["lr"].cpu(), *tensors(m, opt)])
    assert len(runs[0]) == len(runs[1]) and all(map(torch.equal, *runs))
    assert runs[0][0][2] < runs[0][0][0] and runs[0][1] < 0.02


@pytest.mark.parametrize("fails_in", [1, 4])
def test_a_step_that_fails_while_it_is_captured_leaves_nothing_behind(fails_in):
    """In the first run for warming up, or while capturing; at w + e."""
    model, x, y = problem()
    opt = mup2_fused.SAM(model.parameters(), lr=0.1, rho=0.1, momentum=0.9)
    training_step(model, opt)(x[0], y[0])
    before, passes = tensors(model, opt), []

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[1]), y[1])
        loss.backward()
        passes.append(loss)
        if len(passes) == 2 * fails_in:
            raise RuntimeError("operation not permitted when stream is capturing")

    fake = Replayed(lambda x, y: opt.step(closure))
    with fake.patches(), pytest.raises(RuntimeError, match="not permitted"):
        mup2_fused.capture(fake, model, opt, x[1], y[1])
    assert len(passes) == 2 * fails_in and all(map(torch.equal, tensors(model, opt), before))
    assert opt.param_groups[0]["lr"] == 0.1 and isinstance(opt.param_groups[0]["lr"], float)
    assert opt._backup is None and all(p.grad is None for p in model.parameters())


def test_a_captured_step_refuses_learning_rates_that_it_does_not_read():
    model, x, y = problem()
    opt = mup2_fused.SAM(model.parameters(), lr=0.1, rho=0.1)
    replay = captured(model, opt, x[0], y[0])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    with pytest.raises(RuntimeError, match="capture again"):
        replay(x[0], y[0])


def test_a_copied_optimizer_can_be_captured():
    model, x, y = problem()
    model, opt = copy.deepcopy((model, mup2_fused.SAM(model.parameters(), lr=0.1, rho=0.1)))
    before = tensors(model, opt)
    captured(model, opt, x[0], y[0])(x[0], y[0])
    assert not torch.equal(tensors(model, opt)[0], before[0])


def test_what_cannot_be_captured():
    model, x, y = problem()

    def capture(opt, *inputs, **kwargs):
        with Replayed(None).patches():
            mup2_fused.capture(training_step(model, opt), model, opt, *(inputs or (x[0], y[0])), **kwargs)

    opt = mup2_fused.SAM(model.parameters())
    with pytest.raises(ValueError, match="all of them on the GPU"):
        mup2_fused.capture(training_step(model, opt), model, opt, x[0], y[0])
    with pytest.raises(ValueError, match="one run of step for warming up"):
        capture(opt, warmup=0)
    with pytest.raises(ValueError, match="at least one input"):
        mup2_fused.capture(training_step(model, opt), model, opt)
    assert opt.param_groups[0]["lr"] == 0.001 and not opt.state
    with pytest.raises(ValueError, match="without amsgrad"):
        capture(mup2_fused.SAM(model.parameters(), torch.optim.Adam, amsgrad=True))
    with pytest.raises(ValueError, match="same_randomness"):
        capture(mup2_fused.SAM(model.parameters(), same_randomness=True))

    with pytest.raises(TypeError, match=r"needs a mup2_fused.SAM"):
        capture(mup2_ref.SAM(model.parameters()))
    with pytest.raises(ValueError, match="RMSprop waits for the host"):
        capture(mup2_fused.SAM(model.parameters(), torch.optim.RMSprop))
    with pytest.raises(ValueError, match="take one step before"):
        capture(mup2_fused.SAM(model.parameters(), momentum=0.9, dampening=0.1))
    nn.functional.cross_entropy(model(x[0]), y[0]).backward()
    opt.first_step()
    with pytest.raises(RuntimeError, match="weights are perturbed"):
        capture(opt)
    opt.restore()
    replay = captured(model, opt, x[0], y[0])
    with pytest.raises(ValueError, match=r"takes \(12, 5\) torch.float32, \(12,\) torch.int64"):
        replay(x[0, :7], y[0, :7])


@pytest.mark.cuda
@pytest.mark.parametrize("base, kwargs", BASES)
def test_nothing_waits_for_the_host(base, kwargs):
    """With loss scaling too: any synchronizing call raises an error."""
    model, x, y = problem("cuda")
    opt = mup2_fused.SAM(model.parameters(), base, lr=0.1, rho=0.1, **kwargs)
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


@pytest.mark.cuda
def test_recipe_for_a_captured_step():
    (recipe,) = (code for code in RECIPES if "capture(" in code)
    torch.manual_seed(0)
    model = MLP(5, 16, 3).cuda()
    opt = mup2_fused.SAM(model.parameters(), lr=0.1, rho=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loader = [(torch.randn(12, 5), torch.randint(3, (12,))) for _ in range(3)]
    names = dict(torch=torch, mup2_fused=mup2_fused, model=model, opt=opt, loader=loader, device="cuda")
    exec(recipe, names | {"loss_function": nn.functional.cross_entropy})
    assert not any(map(torch.equal, model.parameters(), before))

"""Training loops: whatever happens between the passes, weights and statistics end as they should."""

import copy
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mup2_ref
from mup2_ref import MLP, accumulate, frozen_buffers, seen_perturbation


def problem(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = MLP(5, 8, 3)
    return model, torch.randn(12, 5), torch.randint(3, (12,))


def backward(model, x, y):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


# ------------------------------------------------------------------------------------------ perturbed()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_step_with_perturbed_is_a_step(SAM, base):
    model, x, y = problem()
    other = copy.deepcopy(model)
    a, b = SAM(model.parameters(), base, lr=0.1, rho=0.1), SAM(other.parameters(), base, lr=0.1, rho=0.1)
    for _ in range(3):
        backward(model, x, y)
        before = weights(model)
        with a.perturbed():
            climbed = weights(model)
            backward(model, x, y)
        assert equal(weights(model), before) and not equal(climbed, before)
        a.second_step()
        backward(other, x, y)
        b.first_step()
        assert equal(weights(other), climbed)
        backward(other, x, y)
        b.second_step()
        assert equal(weights(model), weights(other))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_perturbed_restores_whatever_happens(SAM, error):
    model, x, y = problem()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1)
    before = weights(model)
    backward(model, x, y)
    with pytest.raises(error), opt.perturbed():
        assert not equal(weights(model), before)
        raise error
    assert equal(weights(model), before)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.second_step()
    opt.state_dict()
    backward(model, x, y)
    opt.first_step()
    opt.second_step()


def test_perturbed_to_measure_sharpness(SAM):
    """Without an update: the optimizer is then where it was."""
    model, x, y = problem()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1)
    before, loss = weights(model), backward(model, x, y)
    for _ in range(2):
        with opt.perturbed(), torch.no_grad():
            with pytest.raises(RuntimeError, match="weights are perturbed"):
                opt.state_dict()
            assert nn.functional.cross_entropy(model(x), y) > loss
        opt.state_dict()
        opt.load_state_dict(opt.state_dict())
    opt.first_step()
    opt.restore()
    assert equal(weights(model), before) and opt.skipped_steps == 0


def test_an_update_inside_is_not_repeated(SAM):
    model, x, y = problem()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1)
    backward(model, x, y)
    with opt.perturbed():
        backward(model, x, y)
        opt.second_step()
        after = weights(model)
    assert equal(weights(model), after)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.second_step()


def test_perturbed_by_a_gradient_that_is_not_finite(SAM):
    model, x, y = problem()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1)
    before = weights(model)
    backward(model, x, y)
    model.layers[0].weight.grad[0, 0] = torch.nan
    with opt.perturbed():
        assert equal(weights(model), before)
        backward(model, x, y)
    opt.second_step()
    assert equal(weights(model), before) and opt.skipped_steps == 1


# ---------------------------------------------------------------------------------------- batch norm


class Assigns(nn.Module):
    """Running statistics of its own kind, in new tensors every time, and a counter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
            self.count += 1
        return x - self.average


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), Assigns(), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)
    )


def test_statistics_come_from_the_first_passes_only(SAM):
    """Equal to forward passes at the same weights w without SAM, counters included, for five steps."""
    model, x, y = network(), torch.randn(5, 12, 5), torch.randint(8, (5, 12))
    opt = SAM(model.parameters(), lr=0.1, rho=0.5)
    expected = network()
    addresses = [b.data_ptr() for b in model.buffers()]
    for i in range(5):
        expected.load_state_dict({n: p for n, p in model.named_parameters()}, strict=False)
        expected(x[i])
        backward(model, x[i], y[i])
        opt.first_step()
        with frozen_buffers(model), frozen_buffers(model):
            backward(model, x[i], y[i])
        opt.second_step()
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), expected.buffers())), i
    assert model[1].num_batches_tracked == 5 and model[3].count == 5 and model[3].nothing is None
    assert [b.data_ptr() for b in (model[1].running_mean, model[5].running_var)] == [addresses[0], addresses[6]]


def test_batches_are_still_normalized(SAM):
    model, x = network(), torch.randn(12, 5)
    with frozen_buffers(model):
        inside = model(x)
    assert torch.equal(inside, network()(x))


def test_buffers_come_back_after_an_error():
    model = network()
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(KeyboardInterrupt), frozen_buffers(model):
        model(torch.randn(12, 5))
        raise KeyboardInterrupt
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before))
    model(torch.randn(12, 5))
    assert not all(torch.equal(b, c) for b, c in zip(model.buffers(), before))


def test_synchronized_batch_norm_too():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert isinstance(model[1], nn.SyncBatchNorm)
    with frozen_buffers(model):
        model[1].running_mean += 1  # its forward needs a GPU
        model[1].num_batches_tracked += 1
    assert model[1].running_mean.abs().max() == 0 and model[1].num_batches_tracked == 0


# ------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [5, 7], [1] * 12, [12, 0], [3, 0, 9]], ids=str)
@pytest.mark.parametrize("base, kwargs", [(torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, {})])
def test_accumulation_equals_the_large_batch(SAM, sizes, base, kwargs):
    model, x, y = problem()
    model, x = model.double(), x.double()
    other = copy.deepcopy(model)
    a, b = (SAM(m.parameters(), base, lr=0.05, rho=0.1, **kwargs) for m in (model, other))
    micro_batches = list(zip(x.split(sizes), y.split(sizes)))
    passes = []

    def closure():
        a.zero_grad()
        passes.append(accumulate(model, micro_batches))
        return passes[-1]

    for _ in range(5):
        loss = a.step(closure)
        expected = backward(other, x, y)
        b.first_step()
        backward(other, x, y)
        b.second_step()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert len(passes) == 10 and passes[1] > passes[0]
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_nothing_to_accumulate():
    model, x, y = problem()
    for nothing in ([], [(x[:0], y[:0])]):
        with pytest.raises(ValueError, match="no micro-batches"):
            accumulate(model, nothing)


# ------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("same", [False, True])
def test_dropout_masks(SAM, same):
    """The same in both passes if asked for, new ones in every step; the generator ends where one pass takes it."""
    dropout = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(5, 64), dropout, nn.Linear(64, 3))
    x, y, masks = torch.randn(12, 5), torch.randint(3, (12,)), []
    dropout.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    opt = copy.deepcopy(SAM(model.parameters(), lr=0.0, rho=0.0, same_randomness=same))
    torch.manual_seed(3)
    losses = []
    for _ in range(3):
        opt.step(lambda: losses.append(backward(model, x, y)) or losses[-1])
    assert [torch.equal(a, b) for a, b in zip(masks[::2], masks[1::2])] == [same] * 3
    assert not torch.equal(masks[0], masks[2]) and (losses[0] == losses[1]) == same
    after = torch.rand(1)
    torch.manual_seed(3)
    for _ in range(3 if same else 6):
        backward(model, x, y)
    assert torch.equal(torch.rand(1), after)


# ------------------------------------------------------------------------------------------ two processes


def run_processes(number, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes():
    """DistributedDataParallel on gloo: see two_processes.py."""
    run_processes(2, "two_processes.py")


def test_parameters_spread_over_processes(tmp_path):
    """FSDP2, tensor parallelism, checkpoints of four processes read by three and by one: see sharded_processes.py."""
    run_processes(4, "sharded_processes.py", "save", tmp_path)
    for number in (3, 1):
        run_processes(number, "sharded_processes.py", "load", tmp_path)


# ------------------------------------------------------------------------------------------ mixed precision

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
(MIXED_PRECISION,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "autocast(" in code)
MAKE_SCALER, ONE_STEP = MIXED_PRECISION.split("\n\n\n", 1)


def mixed_precision(model, opt, x, y, scale):
    """Names for the README's recipe, whose scaler starts at scale."""
    names = dict(torch=torch, device="cpu", model=model, opt=opt, x=x, y=y, loss_function=nn.functional.cross_entropy)
    exec(MAKE_SCALER, names)
    names["scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
    return names


def test_mixed_precision_with_clipping_is_sam_with_clipping(SAM):
    """In float64, which autocast leaves alone: the recipe against the equations, with clipping at every step."""
    model, x, y = problem()
    model, x = model.double(), 100 * x.double()
    other = copy.deepcopy(model)
    opt = SAM(model.parameters(), lr=0.1, rho=0.2)
    names = mixed_precision(model, opt, x, y, 2.0**10)
    params = list(other.parameters())
    for _ in range(4):
        exec(ONE_STEP, names)
        backward(other, x, y)
        norm = sum(p.grad.square().sum() for p in params).sqrt()
        e = [0.2 * p.grad / norm for p in params]
        with torch.no_grad():
            [p.add_(v) for p, v in zip(params, e)]
        backward(other, x, y)
        norm = sum(p.grad.square().sum() for p in params).sqrt()
        assert norm > 1
        with torch.no_grad():
            [p.sub_(v + 0.1 * p.grad / norm) for p, v in zip(params, e)]
    for p, q in zip(model.parameters(), params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # the scaler and clipping divide with float32 numbers


@pytest.mark.parametrize("base, kwargs", [(torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, {})])
def test_training_in_float16_from_a_scale_that_overflows(SAM, base, kwargs):
    """Overflowing steps change nothing but the scale; then it trains, like the reference."""
    runs = []
    for kind in (SAM, mup2_ref.SAM):
        model, x, y = problem()
        opt = kind(model.parameters(), base, lr=0.05, rho=0.05, **kwargs)
        names = mixed_precision(model, opt, x, y, 2.0**26)
        first = nn.functional.cross_entropy(model(x), y)
        exec(ONE_STEP, names)
        assert (
            names["scaler"].get_scale() == 2.0**25
            and opt.skipped_steps == 1
            and equal(weights(model), problem()[0].parameters())
        )
        assert not any(value.any() for state in opt.state.values() for value in state.values())
        for _ in range(60):
            exec(ONE_STEP, names)
        before, state = weights(model), copy.deepcopy(opt.state_dict()["state"])
        model.layers[0].weight.register_hook(lambda g: g * torch.inf)
        exec(ONE_STEP, names)
        assert equal(weights(model), before)
        after = opt.state_dict()["state"]
        assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
        assert 2 <= opt.skipped_steps < 30 and nn.functional.cross_entropy(model(x), y) < 0.6 * first
        runs.append(before)
    for p, q in zip(*runs):
        torch.testing.assert_close(
            p, q, **(dict(rtol=0, atol=0) if base is torch.optim.SGD else dict(rtol=1e-4, atol=1e-5))
        )


@pytest.mark.parametrize("where", [1, 2])
def test_an_overflow_in_one_pass_of_float16(SAM, where):
    model, x, y = problem()
    opt = SAM(model.parameters(), torch.optim.AdamW, lr=0.05, rho=0.05)
    names = mixed_precision(model, opt, x, y, 2.0**8)
    exec(ONE_STEP, names)
    before, passes = weights(model), []
    state = copy.deepcopy(opt.state_dict()["state"])

    def overflow(g):
        passes.append(g)
        return g * torch.inf if len(passes) == where else g

    model.layers[1].weight.register_hook(overflow)
    exec(ONE_STEP, names)
    assert equal(weights(model), before) and opt.skipped_steps == 1 and len(passes) == 2
    assert names["scaler"].get_scale() == (2.0**8 if where == 1 else 2.0**7)  # the second pass was not at fault
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
    exec(ONE_STEP, names)
    assert not equal(weights(model), before)


@pytest.mark.parametrize("base, kwargs", [(torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, {})])
def test_training_in_bfloat16_without_scaler(SAM, base, kwargs):
    runs = []
    for kind in (SAM, mup2_ref.SAM):
        model, x, y = problem()
        opt = kind(model.parameters(), base, lr=0.05, rho=0.05, **kwargs)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        losses = [mup2_ref.train_epoch(model, opt, [(x, y)], autocast=autocast) for _ in range(60)]
        assert losses[-1] < 0.6 * losses[0] and opt.skipped_steps == 0
        runs.append(weights(model))
    for p, q in zip(*runs):
        torch.testing.assert_close(
            p, q, **(dict(rtol=0, atol=0) if base is torch.optim.SGD else dict(rtol=1e-4, atol=1e-5))
        )


# ------------------------------------------------------------------------------------------ what rounding leaves


def rounding_table():
    """The README's table: (weights, autocast) -> (norm, cosine) as printed."""
    rows = re.findall(r"^\| (float\w+|bfloat16) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    return {(w, autocast): numbers for w, autocast, *numbers in rows}


@pytest.mark.parametrize("kind, autocast", rounding_table())
def test_what_rounding_leaves_of_a_perturbation(SAM, kind, autocast):
    w = nn.Parameter((0.02 * torch.randn(11_000_000)).to(getattr(torch, kind)))
    w.grad = torch.randn_like(w)
    opt = SAM([w], lr=0.1, rho=0.05)
    total, (only,) = seen_perturbation(opt, getattr(torch, autocast, None))
    assert total == only
    assert [f"{total.norm:.2f}", f"{total.cosine:.2f}"] == rounding_table()[kind, autocast]
    if (kind, autocast) == ("float32", "none"):
        assert total == pytest.approx((1, 1), abs=1e-6)


def test_the_table_has_all_cases():
    assert len(rounding_table()) == 5


@pytest.mark.parametrize("variant", ["sam", "elementwise", "layerwise"])
@pytest.mark.parametrize("maximize", [False, True])
def test_seen_perturbation_of_several_tensors(SAM, variant, maximize):
    """Against a loop in float64; nothing changes, and a step may follow."""
    model, x, y = problem()
    first, *rest = model.parameters()
    groups = [{"params": [first], "rho": 0.03, "gradnorm_scaling": 2.0}, {"params": rest[:1], "perturb": False}]
    opt = SAM([*groups, {"params": rest[1:]}], lr=0.1, rho=0.01, variant=variant, maximize=maximize)
    with pytest.raises(RuntimeError, match="no gradients"):
        seen_perturbation(opt)
    backward(model, x, y)
    before, gradients = weights(model), [p.grad.clone() for p in model.parameters()]
    total, each = seen_perturbation(opt, torch.bfloat16)
    assert equal(weights(model), before) and equal([p.grad for p in model.parameters()], gradients)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()
    opt.first_step()
    with pytest.raises(RuntimeError, match="weights are perturbed"):
        seen_perturbation(opt)
    climbed = weights(model)
    backward(model, x, y)
    opt.second_step()

    expected, sums = [], torch.zeros(3).double()
    for w, v in ((before[0], climbed[0]), (before[2], climbed[2])):
        seen, intended = v.bfloat16().double() - w.bfloat16().double(), v.double() - w.double()
        inner = torch.stack([(seen * seen).sum(), (seen * intended).sum(), (intended * intended).sum()])
        sums += inner
        expected.append(inner)
    for (norm, cosine), (ss, si, ii) in zip([*each, total], [*expected, sums]):
        assert norm == pytest.approx(float((ss / ii) ** 0.5), rel=1e-4)
        assert cosine == pytest.approx(float(si / (ss * ii) ** 0.5), rel=1e-4)
    assert 0.3 < total.cosine < 0.999

"""Training loops: whatever happens between the passes, weights and statistics end as they should."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mup2_ref import MLP, accumulate, frozen_buffers


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

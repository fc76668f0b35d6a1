"""Loops: whatever happens between the passes, weights and statistics end as they should."""

import copy
from functools import partial

import pytest
import torch
from small_problems import BASES, VARIANTS, assert_close, backward, classification, equal, step_by, weights
from torch import nn

import mup2_fused as mup2
import mup2_ref


def test_train_epoch_is_a_plain_loop(SAM):
    """The same weights, learning rates and mean loss at w, with a scheduler and a smaller last batch."""
    model, x, y = classification(mup2.MLP(5, 8, 3))
    other = copy.deepcopy(model)
    a, b = (SAM(m.parameters(), lr=0.1, rho=0.1, momentum=0.9) for m in (model, other))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in (a, b)]
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    for _ in range(3):
        model.eval()
        loss = mup2.train_epoch(model, a, batches, scheduler=schedulers[0])
        losses = []
        for batch in batches:
            losses.append(step_by("two steps", b, partial(backward, other, *batch)))
            schedulers[1].step()
        assert model.training and torch.equal(loss, torch.stack(losses).mean())
    with pytest.raises(ValueError, match="no batches"):
        mup2.train_epoch(model, a, [])
    assert equal(weights(model), weights(other)) and a.param_groups[0]["lr"] == b.param_groups[0]["lr"] != 0.1


def test_train_epoch_takes_any_optimizer():
    """The reference's SAM gets two passes, others one."""
    start, x, y = classification(mup2.MLP(5, 8, 3))
    runs = []
    for kind in (partial(mup2.SAM, rho=0.5), partial(mup2_ref.SAM, rho=0.5), torch.optim.SGD):
        model, calls = copy.deepcopy(start), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        mup2.train_epoch(model, kind(model.parameters(), lr=0.1), [(x, y)] * 3)
        runs.append(weights(model))
        assert len(calls) == (3 if kind is torch.optim.SGD else 6)
    for p, q, r in zip(*runs):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, r)


@pytest.mark.parametrize("base, kwargs", BASES)
def test_training_in_16_bits(SAM, base, kwargs):
    """bfloat16 without scaler, and float16 with one that overflows at first; both train."""
    for dtype, scaler in ((torch.bfloat16, None), (torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**26))):
        model, x, y = classification(mup2.MLP(5, 8, 3))
        opt = SAM(model.parameters(), base, lr=0.05, rho=0.05, **kwargs)
        autocast = partial(torch.autocast, "cpu", dtype)
        losses = [mup2.train_epoch(model, opt, [(x, y)], autocast=autocast, scaler=scaler) for _ in range(60)]
        assert losses[-1] < 0.6 * losses[0] and (opt.skipped_steps > 0) == (scaler is not None)
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_evaluate_sums_over_samples():
    model, x, y = classification(nn.Sequential(mup2.MLP(5, 8, 3), nn.Dropout(0.5)))
    sums = mup2.evaluate(model, [(x[:8], y[:8]), (x[8:], y[8:])], partial(torch.autocast, "cpu", torch.bfloat16))
    assert not model.training and sums[2] == 12
    f = model(x)
    torch.testing.assert_close(sums[0].float(), nn.functional.cross_entropy(f, y, reduction="sum"), rtol=1e-2, atol=0)
    exact = mup2.evaluate(model, [(x, y)])
    torch.testing.assert_close(exact[0].float(), nn.functional.cross_entropy(f, y, reduction="sum"))
    assert exact[1] == (f.argmax(1) == y).sum()
    pixels, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(3, (2, 4, 4))
    dense = mup2.evaluate(nn.Sequential(nn.Conv2d(3, 3, 1).double()), [(pixels, labels)])
    assert dense[2] == 32 and dense[1] <= 32
    f = model.double()(x.double())
    exact = mup2.evaluate(model, [(x.double(), y)])
    torch.testing.assert_close(exact[0], nn.functional.cross_entropy(f, y, reduction="sum"), rtol=1e-14, atol=0)


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
        expected.load_state_dict(dict(model.named_parameters()), strict=False)
        expected(x[i])
        backward(model, x[i], y[i])
        opt.first_step()
        with mup2.frozen_buffers(model), mup2.frozen_buffers(model):
            backward(model, x[i], y[i])
        opt.second_step()
        assert all(torch.equal(b, c) for b, c in zip(model.buffers(), expected.buffers())), i
    assert model[1].num_batches_tracked == 5 and model[3].count == 5 and model[3].nothing is None
    assert [b.data_ptr() for b in (model[1].running_mean, model[5].running_var)] == [addresses[0], addresses[6]]


def test_frozen_buffers_of_every_kind():
    """Batches are normalized as without it; buffers come back after an error, and those of synchronized batch norm."""
    model, x = network(), torch.randn(12, 5)
    with mup2.frozen_buffers(model):
        inside = model(x)
    assert torch.equal(inside, network()(x))
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(KeyboardInterrupt), mup2.frozen_buffers(model):
        model(x)
        raise KeyboardInterrupt
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), before))
    model(x)
    assert not all(torch.equal(b, c) for b, c in zip(model.buffers(), before))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert isinstance(model[1], nn.SyncBatchNorm)
    with mup2.frozen_buffers(model):
        model[1].running_mean += 1  # its forward needs a GPU
        model[1].num_batches_tracked += 1
    assert model[1].running_mean.abs().max() == 0 and model[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_frozen_buffers_of_other_layouts():
    model = nn.Module()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    model.register_buffer("rows", torch.eye(3).to_sparse_csr())
    with mup2.frozen_buffers(model):
        model.adjacency.mul_(2)
        model.rows.values().mul_(2)
    assert all(torch.equal(buffer.to_dense(), torch.eye(3)) for buffer in model.buffers())


def test_frozen_buffers_that_share_memory():
    model = nn.Module()
    model.register_buffer("expanded", torch.zeros(3, 1, 2).expand(3, 5, 2))
    model.register_buffer("number", torch.zeros(()).expand(4))
    with mup2.frozen_buffers(model):
        model.expanded[:, :1] += 1  # the elements that share this memory change, too
        model.number[:1] += 1
    assert all(buffer.abs().max() == 0 for buffer in model.buffers())


@pytest.mark.parametrize("sizes", [[5, 7], [1] * 12, [3, 0, 9]], ids=str)
def test_accumulation_equals_the_large_batch(SAM, sizes):
    model, x, y = classification(mup2.MLP(5, 8, 3).double())
    x, other = x.double(), copy.deepcopy(model)
    a, b = (SAM(m.parameters(), lr=0.05, rho=0.1, momentum=0.9) for m in (model, other))
    micro_batches = list(zip(x.split(sizes), y.split(sizes)))
    passes = []

    def closure():
        a.zero_grad()
        passes.append(mup2.accumulate(model, micro_batches))
        return passes[-1]

    for _ in range(5):
        loss = a.step(closure)
        torch.testing.assert_close(loss, b.step(lambda: backward(other, x, y)), rtol=1e-12, atol=0)
    assert len(passes) == 10 and passes[1] > passes[0]
    assert_close(model.parameters(), other.parameters())
    used_up = iter([(x, y)])
    mup2.accumulate(model, used_up)
    for nothing in ([], [(x[:0], y[:0])], used_up):
        with pytest.raises(ValueError, match="no micro-batches"):
            mup2.accumulate(model, nothing)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("maximize", [False, True])
def test_seen_perturbation_of_several_tensors(SAM, variant, maximize):
    """Against a loop in float64; nothing changes, and a step may follow."""
    model, x, y = classification(mup2.MLP(5, 8, 3))
    first, *rest = model.parameters()
    groups = [{"params": [first], "rho": 0.03, "gradnorm_scaling": 2.0}, {"params": rest[:1], "perturb": False}]
    opt = SAM([*groups, {"params": rest[1:]}], lr=0.1, rho=0.01, variant=variant, maximize=maximize)
    with pytest.raises(RuntimeError, match="no gradients"):
        mup2.seen_perturbation(opt)
    backward(model, x, y)
    before, gradients = weights(model), [p.grad.clone() for p in model.parameters()]
    total, each = mup2.seen_perturbation(opt, torch.bfloat16)
    assert equal(weights(model), before) and equal([p.grad for p in model.parameters()], gradients)
    assert mup2.seen_perturbation(opt)[0] == pytest.approx((1, 1), abs=1e-3)
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        opt.step()
    opt.first_step()
    with pytest.raises(RuntimeError, match="weights are perturbed"):
        mup2.seen_perturbation(opt)
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

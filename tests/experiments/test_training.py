"""The training loop that all experiments share, plain and as a replayed graph, and how runs of a sweep use it."""

import copy
import time

import pytest
import torch
from torch import nn

import mup2_fused as mup2
from experiments import data, sweep
from experiments.sweep import Place, Run
from experiments.training import Training, device_name


class StandIn:
    """In place of mup2.capture on a CPU: learning rates become tensors, and every call overwrites the last result."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def __call__(self, step, model, optimizer, *example):
        self.captures += 1
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
        static = torch.zeros(())

        def replay(*inputs):
            assert [x.shape for x in inputs] == [x.shape for x in example]
            self.replays += 1
            return static.copy_(step(*inputs))

        return replay


def test_an_epoch_of_training(SAM):
    """Passes, modes, schedule, shuffling and sums; for SAM and for the base optimizer alone."""
    seen = []

    class Spy(mup2.MLP):
        def forward(self, x):
            seen.append((self.training, len(x), torch.is_grad_enabled()))
            return super().forward(x)

    split = torch.randn(10, 4), torch.randint(2, (10,))
    for kind, passes in ((torch.optim.SGD, 1), (SAM, 2)):
        model = Spy(4, 8, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        with torch.no_grad():
            before = nn.functional.cross_entropy(model(split[0]), split[1]).item()
        seen.clear()
        test = data.batches(split, 4, torch.Generator())
        epoch = Training(model, optimizer, scheduler=scheduler).epoch([split], test)
        assert seen == [(True, 10, True)] * passes + [(False, 4, False), (False, 4, False), (False, 2, False)]
        assert epoch.train_loss == before and optimizer.param_groups[0]["lr"] == 0.05 and epoch.seconds > 0
        f = model(split[0])
        assert epoch.test_accuracy == 10 * (f.argmax(1) == split[1]).sum().item()
        assert epoch.test_loss == pytest.approx(nn.functional.cross_entropy(f, split[1]).item(), rel=1e-5)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_replayed_training_is_the_training(device, base, monkeypatch):
    """Three epochs with a schedule, batch norm and a smaller last batch: losses, weights and buffers to the bit."""
    if device == "cpu":
        monkeypatch.setattr(mup2, "capture", stand_in := StandIn())
    layers = nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    model, x, y = nn.Sequential(*layers).to(device), torch.randn(55, 5).to(device), torch.randint(3, (55,)).to(device)
    runs = []
    for m, example in ((model, (x[:12], y[:12])), (copy.deepcopy(model), None)):
        optimizer = mup2.SAM(m.parameters(), base, lr=0.125, rho=0.1)
        if example is None:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.125, device=device)  # as in a graph
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        training = Training(m, optimizer, scheduler=scheduler, example=example)
        epochs = [training.epoch([*zip(x.split(12), y.split(12))], [(x, y)]) for _ in range(3)]
        runs.append([[e[:3] for e in epochs], optimizer.param_groups[0]["lr"].item(), *m.state_dict().values()])
    assert runs[0][:2] == runs[1][:2] and all(map(torch.equal, runs[0][2:], runs[1][2:]))
    assert runs[0][0][2][0] < runs[0][0][0][0] and runs[0][1] < 0.03
    if device == "cpu":
        assert (stand_in.captures, stand_in.replays) == (1, 12)
    with pytest.raises(ValueError, match="no batches"):
        training.train_epoch([])


def test_a_run_of_a_sweep_as_a_graph(monkeypatch):
    """SAM is captured, its base optimizer is not, and rows tell when and where. A run that diverges is recorded."""
    monkeypatch.setattr(mup2, "capture", stand_in := StandIn())
    for method, rho in (("muP²", 0.1), ("muP-SGD", 0.0)):
        run = Run("noisy-digits", method, 32, 0.25, rho, 3, 2)
        rows = [sweep.train(run, Place(graph=graph)) for graph in (False, True)]
        assert rows[0]["finished"] == 2 and rows[0]["date"] == time.strftime("%Y-%m-%d")
        assert rows[0]["device"] == device_name("cpu")
        for score in ("best", "last"):  # a learning rate as a tensor rounds differently
            assert rows[0][score] == pytest.approx(rows[1][score], abs=1)
    assert stand_in.captures == 1 and stand_in.replays == 2 * (1438 // 64)
    for graph in (False, True):
        row = sweep.train(Run("noisy-digits", "SP-naive", 64, 1e9, 0.1, 0, 3), Place(graph=graph))
        assert row["finished"] < 3 and row["best"] <= 20


def test_a_run_of_a_sweep_trains_what_it_says():
    """One epoch against a loop written here, for Definition 4's exponents."""
    (x, y), (x_test, y_test) = data.load("mnist1d")
    for method, rho_l in (("muP²", (16 * 0.1, 0.1, 0.1 / 16)), ("muP-global", (0.1 / 4,) * 3)):
        row = sweep.train(Run("mnist1d", method, 16, 0.2, 0.1, 3, 1), Place())
        torch.manual_seed(3)
        shapes = [torch.empty(16, 40), torch.empty(16, 16), torch.empty(10, 16)]
        for w in (*shapes, torch.empty(1, 40), torch.empty(1, 1), torch.empty(10, 1)):
            nn.init.kaiming_uniform_(w, a=5**0.5)  # what nn.Linear draws in the model and in the base model
        deviations = (2 / 40) ** 0.5, (2 / 16) ** 0.5, 2**0.5 / 16
        weights = [w.normal_(0, s).requires_grad_() for w, s in zip(shapes, deviations)]
        scaling = (4.0, 0.25, 1 / 64) if method == "muP²" else (1.0, 1.0, 1.0)  # n^(-d_l)

        def output(x, weights):
            h = (x @ weights[0].T).relu()
            return (h @ weights[1].T).relu() @ weights[2].T

        def gradients(batch, weights):
            return torch.autograd.grad(nn.functional.cross_entropy(output(x[batch], weights), y[batch]), weights)

        for batch in torch.randperm(4000, generator=torch.Generator().manual_seed(3)).split(64):
            g = gradients(batch, weights)
            norm = sum((s * v.double().norm()) ** 2 for s, v in zip(scaling, g)) ** 0.5
            climbed = [(w + r * v / norm).detach().requires_grad_() for w, r, v in zip(weights, rho_l, g)]
            rates = 16 * 0.2, 0.2, 0.2 / 16
            g = gradients(batch, climbed)
            weights = [(w - lr * v).detach().requires_grad_() for w, lr, v in zip(weights, rates, g)]
        accuracy = 100 * (output(x_test, weights).argmax(1) == y_test).float().mean().item()
        assert row["best"] == row["last"] == pytest.approx(accuracy, abs=0.3)  # rounding may flip a sample or two

"""The reference's optimizer: formulas written again in numpy, the defects of other packages, and the file itself."""

import ast
import copy
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_problems import closure_of, parameters, step_by
from torch import nn

import mup2_ref

FILE = Path(mup2_ref.__file__)


def numpy_step(weights, variant, rhos, scalings, perturbed):
    """e of every tensor, from the formulas, element by element."""
    gradient = [4 * (w - 0.3) ** 3 + np.cos(w) for w in weights]
    T = {
        "sam": [np.ones_like(w) for w in weights],
        "elementwise": [np.abs(w) for w in weights],
        "layerwise": [np.full_like(w, math.sqrt((w**2).sum())) for w in weights],
    }[variant]
    total = sum((scalings[i] * t * g) ** 2 for i in perturbed for t, g in zip(T[i].flat, gradient[i].flat, strict=True))
    return [rhos[i] * T[i] ** 2 * g / math.sqrt(total) if i in perturbed else 0 * g for i, g in enumerate(gradient)]


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
def test_matches_a_numpy_loop(variant):
    """Ten steps of SGD with momentum and weight decay, with factors of their own for each tensor."""
    params = parameters(torch.float64)
    rhos, scalings = (0.1, 0.03, 0.5), (1.0, 2.5, 0.4)
    groups = [
        {"params": [p], "rho": r, "gradnorm_scaling": s, "perturb": i < 2}
        for i, (p, r, s) in enumerate(zip(params, rhos, scalings))
    ]
    opt = mup2_ref.SAM(groups, torch.optim.SGD, variant=variant, lr=0.01, momentum=0.9, weight_decay=0.1)
    weights, buffers = [p.detach().numpy().copy() for p in params], [0.0] * 3
    for _ in range(10):
        opt.step(closure_of(opt, params))
        climbed = [w + e for w, e in zip(weights, numpy_step(weights, variant, rhos, scalings, (0, 1)))]
        for i, (w, c) in enumerate(zip(weights, climbed)):
            buffers[i] = 0.9 * buffers[i] + 4 * (c - 0.3) ** 3 + np.cos(c) + 0.1 * w
            weights[i] = w - 0.01 * buffers[i]
    for p, w in zip(params, weights):
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
def test_restores_every_bit_in_place(variant, dtype):
    """And gradients of zero perturb nothing."""
    params = parameters(dtype)
    opt = mup2_ref.SAM(params, rho=0.5, lr=0.0, variant=variant)
    before, addresses = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    opt.first_step()
    assert all(not torch.equal(p, w) for p, w in zip(params, before))
    opt.second_step()
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    opt.zero_grad(set_to_none=False)
    opt.first_step()
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    assert [p.data_ptr() for p in params] == addresses


def test_the_norm_neither_overflows_nor_underflows():
    for dtype, scale in ((torch.float16, 6e4), (torch.float16, 1e-6), (torch.float32, 1e30), (torch.float32, 1e-30)):
        p = nn.Parameter(torch.ones(100, dtype=dtype))
        p.grad = torch.full_like(p, scale)
        norm = mup2_ref.joint_norm([(p, p.grad, 1.0)], "sam")
        assert norm.item() == pytest.approx(10 * p.grad[0].item(), rel=1e-12)
    assert mup2_ref.joint_norm([], "sam") == 0


def test_gradients_missing_in_either_pass():
    """One in the first pass only must not leave w + e behind; one in the second only must not revive an old backup."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = mup2_ref.SAM([first, second], rho=1.0, lr=0.5)
    first.grad = torch.ones(3)
    opt.first_step()
    assert not torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(3))
    first.grad, second.grad = None, torch.ones(3)
    opt.second_step()
    assert torch.equal(first, torch.ones(3)) and torch.equal(second, torch.full((3,), 0.5))
    second.grad = None
    opt.first_step(), opt.second_step()  # no gradient at all
    assert torch.equal(second, torch.full((3,), 0.5))


def test_wrong_order_and_failing_closures():
    params = parameters()
    opt = mup2_ref.SAM(params, rho=0.1, lr=0.1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="in turn"):
        opt.second_step()
    closure_of(opt, params)()
    opt.first_step()
    with pytest.raises(RuntimeError, match="in turn"):
        opt.first_step()
    opt.param_groups[0]["lr"] = 0.0
    opt.second_step()

    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(opt, params)()

    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    assert all(torch.equal(p, w) for p, w in zip(params, before)), "no weight stays perturbed"
    opt.step(closure_of(opt, params))  # and training goes on


def test_the_first_loss_is_returned():
    p = nn.Parameter(torch.tensor(1.0))
    opt = mup2_ref.SAM([p], rho=0.5, lr=0.0)
    losses = []

    def closure():
        opt.zero_grad()
        losses.append(p**2)
        losses[-1].backward()
        return losses[-1]

    assert opt.step(closure) is losses[0] and losses[1].item() == pytest.approx(1.5**2)


def test_variants_come_from_the_groups():
    groups = [{"params": [p], "variant": "layerwise"} for p in parameters()]
    assert mup2_ref.SAM(copy.copy(groups), lr=0.1).variant == "layerwise"
    assert mup2_ref.SAM(parameters(), lr=0.1).variant == "sam"
    assert mup2_ref.SAM(parameters(), lr=0.1, variant="elementwise").variant == "elementwise"
    for bad in (lambda: mup2_ref.SAM(groups, lr=0.1, variant="sam"), lambda: mup2_ref.SAM(parameters(), variant="x")):
        with pytest.raises(ValueError):
            bad()


def test_schedulers_and_checkpoints_see_one_optimizer():
    params = parameters()
    opt = mup2_ref.SAM(params, torch.optim.AdamW, rho=0.1, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        step_by("two steps", opt, closure_of(opt, params))
        scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == 0.05
    opt.step(closure_of(opt, params))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = mup2_ref.SAM(copies, torch.optim.AdamW, rho=0.9, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.param_groups[0]["rho"] == 0.1
    for own, owner in ((params, opt), (copies, resumed)):
        for _ in range(3):
            owner.step(closure_of(owner, own))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.base_optimizer.param_groups[1]["rho"] == 0.1 and opt.param_groups[1]["lr"] == 0.1


def test_the_demonstration_shows_what_theory_predicts(capsys):
    mup2_ref.main((64, 256))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.count(" n^") == 2]
    assert [row[0] for row in rows] == ["input", "hidden", "output"] * 2
    found = [(float(row[1][2:]), float(row[2][2:])) for row in rows]
    assert [predicted for predicted, _ in found] == [-1.5, -0.5, 0.5, 0, 0, 0]
    assert max(abs(predicted - measured) for predicted, measured in found) < 0.35


def test_the_file_is_short_and_needs_torch_only():
    tree = ast.parse(FILE.read_text())
    assert len(FILE.read_text().splitlines()) <= 380
    imported = {
        name.partition(".")[0]
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in n.names] if isinstance(n, ast.Import) else [n.module])
    }
    assert imported - {"torch"} <= sys.stdlib_module_names

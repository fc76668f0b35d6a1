"""The same optimizer three times: mup2_ref, mup2_fused in torch operations, and mup2_fused with its kernels.

All three get the same parameters and gradients, on the CPU and on a GPU where there is one. Weights must be equal bit
for bit wherever all three round the same; elsewhere the error against float64 must not exceed verify's bound.
"""

import copy
from functools import partial

import pytest
import torch
from small_problems import assert_close, equal, step_by, train_closure
from torch import nn

import mup2_fused
import mup2_ref
from mup2_fused.verify import error_and_bound

THREE = {
    "reference": mup2_ref.SAM,
    "torch": partial(mup2_fused.SAM, backend="torch"),
    "compiled": partial(mup2_fused.SAM, backend="compiled"),
}
BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.005)),
    "momentum": (torch.optim.SGD, dict(lr=0.005, momentum=0.9, weight_decay=0.1)),
    "nesterov": (torch.optim.SGD, dict(lr=0.005, momentum=0.9, nesterov=True)),
    "dampening": (torch.optim.SGD, dict(lr=0.005, momentum=0.9, dampening=0.3)),
    "adam": (torch.optim.Adam, dict(lr=0.01, weight_decay=0.1)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    "rmsprop": (torch.optim.RMSprop, dict(lr=0.01)),  # which has no kernel
}
SHAPES = [(300, 40), (7,), (20_001,), (3, 5, 2), (50,), (), (0,)]


def optimizers(device, dtype, variant, base, **kwargs):
    """name -> (its parameters, its optimizer); two perturbed groups with factors of their own, and one that is not."""
    start = [(0.3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype) for shape in SHAPES]
    made = {}
    for kind, make in THREE.items():
        params = [nn.Parameter(w.clone()) for w in start]
        groups = [
            {"params": params[:2], "rho": 0.2, "lr": 2 * kwargs["lr"]},
            {"params": params[2:4] + params[5:], "gradnorm_scaling": 3.0},
            {"params": params[4:5], "perturb": False},
        ]
        made[kind] = params, make(groups, base, rho=0.1, variant=variant, **kwargs)
    return made


def set_gradients(made):
    """The same random gradients for all."""
    lists = [params for params, _ in made.values()]
    for tensors in zip(*lists):
        g = torch.randn(tensors[0].shape, dtype=torch.float64)
        for p in tensors:
            p.grad = g.to(p.device, p.dtype)


def backward(params, step=0):
    """A gradient that depends on the weights; every third step one of them is missing."""
    for p in params:
        p.grad = None
    sum(((p.double() - 0.3) ** 4).sum() + p.double().sin().sum() for p in params).backward()
    if step % 3 == 1:
        params[step % len(params)].grad = None


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_without_dimensions(device, dtype, variant):
    """Torch computes with numbers of no dimension in wider types than with tensors."""
    start, made = torch.randn(300, device=device).to(dtype), {}
    for kind, make in THREE.items():
        params = [nn.Parameter(w.clone()) for w in start]
        made[kind] = params, make(params, rho=0.1, lr=0.1, variant=variant)
    set_gradients(made)
    for _, opt in made.values():
        opt.first_step()
    assert all(equal(params, made["reference"][0]) for params, _ in made.values())
    assert not equal(made["reference"][0], start)


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_twenty_steps(device, dtype, variant, base):
    kind_of_base, kwargs = BASES[base]
    made = optimizers(device, dtype, variant, kind_of_base, **kwargs)
    exact_params = [nn.Parameter(p.detach().double().clone()) for p in made["reference"][0]]
    groups = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": [exact_params[i] for i in indices]}
        for g, indices in zip(made["reference"][1].param_groups, ([0, 1], [2, 3, 5, 6], [4]))
    ]
    made["float64"] = exact_params, mup2_ref.SAM(groups, kind_of_base, variant=variant, **kwargs)
    for step in range(20):
        for params, opt in made.values():
            step_by("two steps", opt, partial(backward, params, step))
    results = {kind: [p.detach() for p in params] + moments(params, opt) for kind, (params, opt) in made.items()}
    assert equal(results["torch"], results["reference"]), "the torch backend has the reference's operations"
    if base in ("sgd", "momentum", "nesterov", "rmsprop") and dtype == torch.float32 and device == "cpu":
        assert equal(results["compiled"], results["reference"])
    error, bound = error_and_bound(results["compiled"], results["reference"], results["float64"], steps=20)
    assert error <= max(bound, 1e-13)


def moments(params, opt):
    return [x.detach() for p in params for x in opt.state[p].values() if torch.is_tensor(x) and x.shape == p.shape]


@pytest.mark.parametrize("base", ["momentum", "adamw"])
@pytest.mark.parametrize("source", THREE)
def test_each_loads_the_state_of_the_others(device, base, source):
    kind_of_base, kwargs = BASES[base]
    made = optimizers(device, torch.float32, "sam", kind_of_base, **kwargs)
    params, opt = made.pop(source)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(opt.state_dict())
            at = [p.detach().clone() for p in params]
        step_by("two steps", opt, partial(backward, params))
    for own in state["state"].values():
        assert torch.as_tensor(own.get("step", 0)).device.type == "cpu", "as torch saves it"
    for kind, (others, other) in made.items():
        with torch.no_grad():
            for p, w in zip(others, at):
                p.copy_(w)
        for group in other.param_groups:
            group |= {"rho": 9.0, "lr": 9.0}
        other.load_state_dict(copy.deepcopy(state))
        for _ in range(2):
            step_by("two steps", other, partial(backward, others))
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=kind)


@pytest.mark.parametrize("base_optimizer", ["sgd", "adam"])
def test_mup2_training_of_an_mlp(device, base_optimizer):
    """The whole way, from param_groups and init_ to weights after ten steps."""
    scaling = mup2_ref.exponents(base_optimizer=base_optimizer)
    kind = torch.optim.SGD if base_optimizer == "sgd" else torch.optim.AdamW
    x, y = torch.randn(64, 20).to(device), torch.randint(5, (64,)).to(device)
    trained = {}
    for name, SAM in THREE.items():
        package = mup2_ref if name == "reference" else mup2_fused
        torch.manual_seed(0)
        model, base = package.MLP(20, 128, 5).to(device), package.MLP(20, 32, 5)
        package.init_(model, base, scaling)
        opt = SAM(package.param_groups(model, base, scaling, lr=0.01, rho=0.1), kind)
        losses = [opt.step(train_closure(opt, model, x, y)).item() for _ in range(10)]
        assert losses[-1] < losses[0]
        trained[name] = [p.detach() for p in model.parameters()]
    assert equal(trained["torch"], trained["reference"])
    assert_close(trained["compiled"], trained["reference"], rtol=1e-4, atol=1e-5)
    if base_optimizer == "sgd" and device == "cpu":
        assert equal(trained["compiled"], trained["reference"])

"""The plan: what it reads from an optimizer's objects, when it refuses, and what it leaves behind."""

import math
from collections import UserDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import F32, clones, tensors
from small_problems import equal
from torch import nn

import mup2_ref
from mup2_fused import _C
from mup2_fused.compiled_passes import create_state


class Optimizer:
    """A plan together with the objects that it is given: groups and state of a torch optimizer, and a phase."""

    def __init__(self, base, params, **options):
        self.params = params
        self.base = base([dict(params=params, rho=0.5, gradnorm_scaling=2.0, perturb=True)], lr=0.1, **options)
        self.phase, self.plan, self.backups = SimpleNamespace(backups=None), _C.Plan(), []

    def climb(self, variant="sam", reduce=None, moment=""):
        groups, state = self.base.param_groups, self.base.state if moment else None
        return self.plan.climb(groups, self.phase, variant, reduce, self.backups, state, moment)

    def descend(self, method="sgd", grad_scale=None, found_inf=None, skip_nonfinite=False, share=None):
        options = (method, partial(create_state, self.base.state), grad_scale, found_inf, skip_nonfinite, share)
        return self.plan.descend(self.base.param_groups, self.base.state, self.phase, *options)


def parameters(device, sizes=(3, 9000, 0, 7)):
    params = [nn.Parameter(x) for x in tensors(F32, device, sizes)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_climbing_against_moments(device):
    """Where there are some, and whatever the gradients are."""
    o = Optimizer(torch.optim.SGD, parameters(device), momentum=0.9)
    before, moments = clones(o.params), [torch.randn_like(p) for p in o.params[1:]]
    for p, moment in zip(o.params[1:], moments):
        o.base.state[p]["momentum_buffer"], p.grad = moment, None
    assert o.climb(moment="momentum_buffer") and [p for p, _ in o.phase.backups] == o.params[1:]
    joint = mup2_ref.joint_norm([(w, m, 2.0) for w, m in zip(before[1:], moments)], "sam")
    norm, each = o.plan.norms()
    assert norm == pytest.approx(joint.item()) and each == pytest.approx([2 * m.norm().item() for m in moments])
    expected = [before[0], *(w - 0.5 / joint.to(w) * m for w, m in zip(before[1:], moments))]
    torch.testing.assert_close([p.detach() for p in o.params], expected)
    o.base.state[o.params[1]]["momentum_buffer"] = moments[0].to_sparse()
    o.plan.restore(o.phase.backups)
    assert equal(o.params, before) and not o.climb(moment="momentum_buffer") and equal(o.params, before)


KINDS = [(torch.optim.SGD, dict(momentum=0.9), "sgd", "momentum_buffer"), (torch.optim.AdamW, {}, "adamw", "exp_avg")]


def norm_of_moments(o, key):
    """The climb's joint norm from the moments as they are, by a plan that has not seen an update."""
    other = Optimizer(type(o.base), [nn.Parameter(p.detach().clone()) for p in o.params])
    for p, q in zip(o.params, other.params):
        if key in o.base.state[p]:
            other.base.state[q][key] = o.base.state[p][key].clone()
    other.base.param_groups[0]["perturb"] = o.base.param_groups[0]["perturb"]
    assert other.climb(moment=key)
    return other.plan.norms()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base, options, method, key", KINDS, ids=["sgd", "adamw"])
def test_the_norm_of_moments_is_summed_by_the_update(device, base, options, method, key, dtype):
    """Its bits are those of a pass over the moments; and there is no such pass: it would see what torch cannot see."""
    params = [nn.Parameter(x) for x in tensors(dtype, device, (3, 20000, 0, 7))]
    params.append(nn.Parameter(tensors(dtype, device, (2 * 3 * 40 * 50,))[0].view(2, 3, 40, 50)))
    o = Optimizer(base, params, **options)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        params[-1].grad = params[-1].grad.to(memory_format=torch.channels_last)
        flag = torch.tensor(float(step == 2), device=device)  # a skipped step leaves the moments as they are
        assert o.climb(moment=key) and o.descend(method, found_inf=flag)
        expected = norm_of_moments(o, key)
        moment = o.base.state[params[1]][key]
        if step < 3:
            continue
        hidden = torch.empty(0, dtype=dtype, device=device).set_(moment.untyped_storage(), 0, moment.shape)
        hidden.zero_()  # has a version of its own
        assert o.climb(moment=key) and o.plan.norms() == expected != norm_of_moments(o, key)


def elementwise(o, key):
    """Its norm takes the weights, too, and its updates sum nothing."""
    assert o.climb("elementwise", moment=key) and o.descend("sgd" if key == "momentum_buffer" else "adamw")


def too_late(o, key):
    """An update of some parameters only, after a change of another one's moment."""
    o.params[0].grad = None
    o.base.state[o.params[1]][key].add_(1)
    assert o.climb(moment=key) and o.descend("sgd" if key == "momentum_buffer" else "adamw")


def another_plan(o, key):
    """As of a second optimizer whose load_state_dict() has taken over the moments."""
    other = Optimizer(type(o.base), [nn.Parameter(p.detach().clone()) for p in o.params], **KINDS_BY_KEY[key][1])
    for p, q in zip(o.params, other.params):
        q.grad, other.base.state[q] = torch.randn_like(q), o.base.state[p]
    assert other.climb(moment=key) and other.descend(KINDS_BY_KEY[key][2])


def operator(o, key):
    p, state = o.params[1], o.base.state[o.params[1]]
    lists, lr = [[p.detach()], [p.grad], [p.detach().clone()], [state[key]]], torch.tensor(0.1)
    if key == "momentum_buffer":
        torch.ops.mup2.sgd_(*lists, lr, momentum=0.9)
    else:
        torch.ops.mup2.adam_(*lists, [state["exp_avg_sq"]], [state["step"]], lr)


def step_without_kernels(o, key):
    """torch's fused step counts no change of the moments. A climb uses the sums up, so that the next one has none."""
    assert o.climb(moment=key)
    o.plan.restore(o.phase.backups)
    o.phase.backups = None
    type(o.base)(o.base.param_groups, fused=True, foreach=False).step()
    hidden = torch.empty(0, device=o.params[1].device).set_(o.base.state[o.params[1]][key].untyped_storage())
    hidden.mul_(2)


def fused_base(o, key):
    o.base.param_groups[0]["fused"] = True
    assert o.climb(moment=key) and o.descend(KINDS_BY_KEY[key][2])
    hidden = torch.empty(0, device=o.params[1].device).set_(o.base.state[o.params[1]][key].untyped_storage())
    hidden.mul_(2)


KINDS_BY_KEY = {kind[3]: kind for kind in KINDS}
CHANGES = {
    "add": lambda o, key: o.base.state[o.params[1]][key].add_(1),
    "replace": lambda o, key: o.base.state[o.params[1]].update({key: torch.ones_like(o.params[1])}),
    "exchange": lambda o, key: o.base.state[o.params[1]][key].__setattr__("data", torch.ones_like(o.params[1])),
    "remove": lambda o, key: o.base.state.pop(o.params[1]),
    "step alone": lambda o, key: o.base.step(),
}
CHANGES |= {f.__name__: f for f in (elementwise, too_late, another_plan, operator, step_without_kernels, fused_base)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("base, options, method, key", KINDS, ids=["sgd", "adamw"])
def test_sums_of_moments_that_have_changed_are_not_used(device, base, options, method, key, change):
    o = Optimizer(base, parameters(device), **options)
    assert o.climb(moment=key) and o.descend(method) and o.climb(moment=key) and o.descend(method)
    CHANGES[change](o, key)
    assert o.climb(moment=key)
    found, backups = o.plan.norms(), o.phase.backups
    o.plan.restore(backups)
    assert found == norm_of_moments(o, key)


def test_sums_of_a_part_of_the_moments(device):
    """Other parameters climb in every step."""
    o = Optimizer(torch.optim.SGD, parameters(device, (5, 20000, 3, 0, 9000)), momentum=0.9)
    common = {key: value for key, value in o.base.param_groups[0].items() if key != "params"}
    o.base.param_groups[:] = [common | {"params": [p]} for p in o.params]
    for chosen in ([0, 1, 2, 3, 4], [1, 4], [0, 4], [4], [0, 1, 2]):
        for i, group in enumerate(o.base.param_groups):
            group["perturb"] = i in chosen
        assert o.climb(moment="momentum_buffer")
        pairs = [(p, o.base.state[p].get("momentum_buffer")) for p in (o.params[i] for i in chosen)]
        joint = mup2_ref.joint_norm([(p, m, 2.0) for p, m in pairs if m is not None], "sam")
        assert o.plan.norms()[0] == pytest.approx(joint.item(), rel=1e-6) and o.descend()


def test_a_gradient_that_is_not_finite(device):
    o = Optimizer(torch.optim.Adam, parameters(device))
    before = clones(o.params)
    o.params[1].grad[5] = math.nan
    assert o.climb() and equal(o.params, before) and not o.plan.finite()
    assert o.descend("adam") and equal(o.params, before) and o.plan.skipped() == 1
    assert all(o.base.state[p]["step"] == 0 for p in o.params)
    o.params[1].grad[5] = 0
    assert o.climb() and o.plan.finite()
    o.params[1].grad[5] = math.inf
    assert o.descend("adam", skip_nonfinite=True) and equal(o.params, before) and o.plan.skipped() == 2


def test_scaled_losses(device):
    o = Optimizer(torch.optim.SGD, parameters(device))
    before, gradients = clones(o.params), clones([p.grad for p in o.params])
    number = lambda x: torch.tensor(x, device=device)
    assert o.climb() and o.descend(grad_scale=number(4.0), found_inf=number(1.0))
    assert equal(o.params, before) and equal([p.grad for p in o.params], [g / 4 for g in gradients])
    assert o.climb() and o.descend(grad_scale=number(4.0), found_inf=number(0.0))
    assert o.plan.skipped() == 1
    torch.testing.assert_close([p.detach() for p in o.params], [w - 0.1 * g / 16 for w, g in zip(before, gradients)])


def test_sums_over_processes(device):
    """Three more processes with equal parts of every tensor: the norm doubles. A process may hold an empty part."""
    alone, together = (Optimizer(torch.optim.SGD, parameters(device)) for _ in range(2))
    for p, q in zip(together.params, alone.params):
        p.data.copy_(q.data), p.grad.copy_(q.grad)
    rows = []
    assert alone.climb() and together.climb(reduce=lambda sums, index: (rows.extend(index), sums.mul_(4)))
    assert rows == [0, 1, 2, 3] and together.plan.norms()[0] == pytest.approx(2 * alone.plan.norms()[0])
    flags = []
    assert together.descend(skip_nonfinite=True, share=lambda flag: (flags.append(flag.clone()), flag.fill_(1)))
    assert [flag.item() for flag in flags] == [0] and together.plan.skipped() == 1


def test_it_refuses_and_changes_nothing():
    """Then torch's operations do the pass."""
    sparse, w, memory = (nn.Parameter(torch.randn(8, dtype=t)) for t in (F32, torch.cfloat, F32))
    twins = [nn.Parameter(memory.data[:5]), nn.Parameter(memory.data[4:])]
    for p in (sparse, w, *twins):
        p.grad = torch.ones_like(p)
    sparse.grad = sparse.grad.to_sparse()
    for params in ([sparse], [w], twins):
        o, before = Optimizer(torch.optim.SGD, params), clones(params)
        assert not o.climb() and o.phase.backups is None and all(map(torch.equal, params, before))
    for base, options, method in (
        (torch.optim.Adam, dict(amsgrad=True), "adam"),
        (torch.optim.SGD, dict(momentum=0.9, dampening=0.5), "sgd"),  # the first momentum is the whole gradient
    ):
        o = Optimizer(base, parameters("cpu"), **options)
        assert o.climb()
        moved, backups = clones(o.params), o.phase.backups
        assert not o.descend(method) and equal(o.params, moved) and not o.base.state
        o.plan.restore(backups)
        assert equal(o.params, [w for _, w in backups])


@pytest.mark.parametrize("how", ["leaves", "moves"])
def test_a_parameter_that_is_elsewhere_in_the_second_pass(how):
    """Its backup would be left over, and its weight perturbed."""
    o = Optimizer(torch.optim.SGD, parameters("cpu"))
    before = clones(o.params)
    assert o.climb()
    moved, backups = clones(o.params), o.phase.backups
    inside = o.base.param_groups[0]["params"]
    last = inside.pop()
    inside[:0] = [last] if how == "moves" else []
    assert not o.descend() and equal(o.params, moved)
    o.plan.restore(backups)
    assert equal(o.params, before) and not equal(moved, before)


@pytest.mark.parametrize("change", [lambda w: w.view(90, 100), lambda w: w[:5].clone(), torch.Tensor.double])
def test_a_parameter_that_changes_between_the_steps(change):
    """The backup of the last step does not fit."""
    o = Optimizer(torch.optim.SGD, parameters("cpu"))
    assert o.climb() and o.descend()
    p = o.params[1]
    p.grad, p.data = None, change(p.data)
    p.grad, before = torch.ones_like(p), clones(o.params)
    assert o.climb() and equal([w for _, w in o.phase.backups], before) and not equal(o.params, before)
    o.plan.restore(o.phase.backups)
    assert equal(o.params, before)


def test_what_no_dictionary_and_no_pair_is():
    o = Optimizer(torch.optim.SGD, parameters("cpu"), momentum=0.9)
    assert not o.plan.climb([UserDict(o.base.param_groups[0])], o.phase, "sam", None, [], None, "")
    assert o.climb()
    o.base.state[o.params[0]] = UserDict()
    assert not o.descend()
    for backups in ([o.params[0]], [(o.params[0],)], [(o.params[0], None)], [(None, o.params[0])]):
        with pytest.raises(TypeError):
            o.plan.restore(backups)


def test_unknown_devices_and_variants():
    p = nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match=r'for the CPU and for CUDA, not for meta: use SAM\(..., backend="torch"\)'):
        Optimizer(torch.optim.SGD, [p]).climb()
    with pytest.raises(ValueError, match="unknown variant asam"):
        Optimizer(torch.optim.SGD, parameters("cpu")).climb("asam")


def test_the_memory_of_captured_graphs(device):
    """Backups and workspaces keep their addresses from step to step."""
    o = Optimizer(torch.optim.SGD, parameters(device))
    assert o.climb() and o.descend(skip_nonfinite=True)
    addresses = lambda: [t.data_ptr() for t in (*(w for _, w in o.backups), *o.plan.memory())]
    first = addresses()
    assert len(o.backups) == len(o.params) and len(first) > len(o.params)
    assert o.climb() and o.phase.backups is o.backups
    assert o.descend(skip_nonfinite=True) and addresses() == first

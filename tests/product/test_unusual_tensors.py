"""Tensors, groups and state that no kernel takes as they are: what torch's operations can do, both backends do."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from small_problems import assert_close, equal, parameters, set_gradients, twins, two_steps, weights
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import mup2_fused as mup2

BASES = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {}), (torch.optim.AdamW, {})]


@pytest.fixture(scope="module")
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


KINDS = {
    "collective": lambda x: collectives.all_reduce(x, "sum", dist.group.WORLD),  # not yet waited for
    "two tensors": lambda x: TwoTensor(x, x.clone()),
    "negated view": lambda x: torch._neg_view(-x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
}


def trained(backend, make, base, options):
    """Weights after two steps in which make() makes the second parameter's gradients from plain ones."""
    torch.manual_seed(0)
    params = parameters()
    opt = mup2.SAM(params, base, lr=0.1, rho=0.5, backend=backend, **options)
    for half in (opt.first_step, opt.second_step) * 2:
        set_gradients(params)
        params[1].grad = make(params[1].grad)
        half()
    return weights(params)


@pytest.mark.parametrize("base, options", BASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(alone, kind, base, options):
    """Both backends agree. So does a step by plain gradients, but torch adds both halves of two tensors to a weight."""
    make, plain = KINDS[kind], torch.zeros_like if kind == "zeros without memory" else torch.clone
    ours = trained("compiled", make, base, options)
    assert_close(ours, trained("torch", make, base, options), rtol=1e-5, atol=1e-5)
    assert equal(ours, trained("compiled", plain, base, options)) == (kind != "two tensors")


@pytest.mark.parametrize("kind", list(KINDS)[:3])
@pytest.mark.parametrize("what", ["state", "learning rate", "loss scale"])
def test_state_and_settings(alone, what, kind):
    start, results = parameters(), []
    for backend in ("compiled", "torch"):
        torch.manual_seed(1)
        params = twins(start)
        opt = mup2.SAM(params, lr=0.1, rho=0.5, momentum=0.9, backend=backend)
        two_steps(opt, params)
        if what == "state":
            opt.state[params[1]]["momentum_buffer"] = KINDS[kind](opt.state[params[1]]["momentum_buffer"])
        elif what == "learning rate":
            opt.param_groups[0]["lr"] = KINDS[kind](torch.tensor(0.2))
        else:
            opt.grad_scale, opt.found_inf = KINDS[kind](torch.full((1,), 4.0)), KINDS[kind](torch.zeros(1))
        two_steps(opt, params)
        results.append(weights(params))
    assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [torch._to_functional_tensor, lambda x: torch.nested.nested_tensor([x]), torch.t])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_state_that_torch_cannot_use_is_an_error_and_nothing_stays_perturbed(SAM, wrap):
    params = parameters()
    opt = SAM(params, lr=0.1, rho=0.5, momentum=0.9)
    two_steps(opt, params)
    before = weights(params)
    opt.state[params[0]]["momentum_buffer"] = wrap(torch.ones(5, 3))
    set_gradients(params)
    opt.first_step()
    assert not equal(weights(params), before)
    with pytest.raises(RuntimeError):
        opt.second_step()
    assert opt.phase.backups is None and equal(weights(params), before)


# ------------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("key", ["rho", "gradnorm_scaling", "perturb", "params"])
def test_a_group_without_a_key_of_SAM(SAM, key):
    params = parameters()
    opt = SAM([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, rho=0.5)
    before = weights(params)
    set_gradients(params)
    del opt.param_groups[1][key]
    with pytest.raises(KeyError) as error:
        opt.first_step()
    lacks = f"a parameter group has no '{key}': add groups with add_param_group(), which fills in what is missing"
    assert key == "params" or error.value.args == (lacks,)
    assert equal(weights(params), before) and opt.phase.backups is None


@pytest.mark.parametrize("base, key", [(torch.optim.SGD, k) for k in ("lr", "momentum", "nesterov", "maximize")] + [
    (torch.optim.AdamW, k) for k in ("lr", "betas", "eps", "amsgrad", "weight_decay")
])  # fmt: skip
def test_a_group_without_a_key_of_the_base_optimizer(SAM, base, key):
    """The base optimizer's own error; weights are restored first."""
    params = parameters()
    opt = SAM(params, base, lr=0.1, rho=0.5)
    before = weights(params)
    set_gradients(params)
    opt.first_step()
    assert not equal(weights(params), before)
    del opt.param_groups[0][key]
    with pytest.raises(KeyError, match=key):
        opt.second_step()
    assert equal(weights(params), before)


@pytest.mark.parametrize("key", ["rho", "gradnorm_scaling"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1]], ids=str)
def test_a_factor_that_is_no_number(SAM, key, value):
    params = parameters()
    opt = SAM(params, lr=0.1, rho=0.5)
    before = weights(params)
    set_gradients(params)
    opt.param_groups[0][key] = value
    with pytest.raises(TypeError):
        opt.first_step()
    assert equal(weights(params), before)


# ------------------------------------------------------------------------------------------------ types


@pytest.mark.parametrize("base, options", [BASES[0], (torch.optim.AdamW, {"weight_decay": 0.0})], ids=str)
def test_state_of_another_type(SAM, base, options):
    """model.double() leaves the state of the base optimizer in float32."""
    model = nn.Linear(5, 3)
    opt = SAM(model.parameters(), base, lr=0.1, rho=0.5, foreach=False, **options)
    params = list(model.parameters())
    two_steps(opt, params)
    model.double()
    before = weights(params)
    if base is torch.optim.AdamW:  # torch's lerp_ takes no such state
        set_gradients(params)
        opt.first_step()
        with pytest.raises(RuntimeError):
            opt.second_step()
        assert equal(weights(params), before)
    else:
        momentum = [opt.state[p]["momentum_buffer"].clone() for p in params]
        two_steps(opt, params)
        expected = [w - 0.1 * (0.9 * m + p.grad) for w, m, p in zip(before, momentum, params)]
        assert_close(params, expected, rtol=1e-5, atol=1e-5)


def test_momentum_in_float32_of_weights_in_16_bits(SAM):
    params = parameters(torch.bfloat16)
    opt = SAM(params, lr=0.1, rho=0.5, momentum=0.9, foreach=False)
    for p in params:
        opt.state[p]["momentum_buffer"] = torch.ones(p.shape)
    before = weights(params)
    two_steps(opt, params)
    expected = [w.float() - 0.1 * (0.9 + p.grad.float()) for w, p in zip(before, params)]
    assert_close([p.float() for p in params], expected, rtol=1e-2, atol=1e-2)
    assert all(opt.state[p]["momentum_buffer"].dtype == torch.float32 for p in params)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the type of the weight")
def test_gradients_in_16_bits_of_weights_in_float32(SAM):
    params = parameters()
    opt = SAM(params, lr=0.1, rho=0.5)
    for p in params:
        p.grad_dtype = None
    before = weights(params)
    for half in (opt.first_step, opt.second_step):
        set_gradients(params)
        params[0].grad = params[0].grad.bfloat16()
        half()
    assert_close(params, [w - 0.1 * p.grad.float() for w, p in zip(before, params)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["double", "half", "bfloat16"])
@pytest.mark.parametrize("end", ["restore", "second_step"])
def test_another_type_between_the_passes(SAM, change, end):
    model = nn.Linear(5, 3)
    params = list(model.parameters())
    opt = SAM(params, lr=0.0, rho=0.5, momentum=0.9)
    before = weights(params)
    set_gradients(params)
    opt.first_step()
    assert not equal(weights(params), before)
    getattr(model, change)()
    set_gradients(params)
    getattr(opt, end)()
    assert equal(weights(params), [w.to(params[0].dtype) for w in before]) and opt.phase.backups is None
    two_steps(opt, params)


# ------------------------------------------------------------------------------------------------ memory


HOLDERS = {
    "attribute": lambda model, opt: setattr(model.weight, "optimizer", opt),
    "hook of the model": lambda model, opt: model.register_forward_hook(lambda *_: opt),
    "hook of a gradient": lambda model, opt: model.weight.register_hook(lambda _: opt and None),
    "hook of the optimizer": lambda model, opt: opt.register_step_pre_hook(lambda *_: opt and model and None),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("phase", ["after a step", "between the passes"])
def test_the_garbage_collector_frees_a_model_that_holds_its_optimizer(SAM, holder, phase):
    model = nn.Linear(5, 3)
    opt = SAM(model.parameters(), lr=0.1, rho=0.5)
    HOLDERS[holder](model, opt)
    for _ in range(2):
        two_steps(opt, list(model.parameters()))
    if phase == "between the passes":
        set_gradients(list(model.parameters()))
        opt.first_step()
    backups = getattr(opt.passes, "backups", None) or []
    gone = [weakref.ref(x) for x in (model, opt, model.weight, *(w for _, w in backups))]
    del model, opt, backups
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_a_plan_outlives_its_optimizer():
    params = parameters()
    opt = mup2.SAM(params, lr=0.1, rho=0.5, backend="compiled")
    two_steps(opt, params)
    plan = opt.passes.plan
    del opt, params
    gc.collect()
    assert plan.norms()[0] > 0 and plan.finite() and plan.skipped() == 0 and plan.memory()


def test_backups_are_freed_when_torch_climbs():
    params = parameters()
    opt = mup2.SAM(params, lr=0.1, rho=0.5, backend="compiled")
    two_steps(opt, params)
    assert len(opt.passes.backups) == 3
    set_gradients(params)
    params[2].grad = TwoTensor(params[2].grad, params[2].grad)
    opt.first_step()
    assert opt.passes.backups == [] and len(opt.phase.backups) == 3
    opt.restore()
    assert opt.phase.backups is None

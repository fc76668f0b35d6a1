"""Which backend runs, what it says when it cannot, and what only the compiled one must be careful about.

Strides of every kind are in tests/kernels.
"""

import contextlib
import copy
import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
from small_problems import ROOT, WAYS, assert_close, equal, ones_step, parameters, set_gradients, two_steps, weights
from test_capture import training_step
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import mup2_fused as mup2
from mup2_fused import compiled_passes, torch_passes
from mup2_fused.compiled_passes import CompiledPasses

FLOAT8 = torch.float8_e5m2


def test_the_backend_that_was_asked_for_runs():
    params = parameters()
    for backend, passes in (("auto", CompiledPasses), ("compiled", CompiledPasses), ("torch", type(torch_passes))):
        opt = mup2.SAM(params, backend=backend, lr=0.1)
        assert isinstance(opt.passes, passes) and isinstance(copy.deepcopy(opt).passes, passes)
    assert mup2.compiled and mup2.instruction_set in ("baseline", "avx2", "avx512")
    opt = mup2.SAM(params, backend="torch", lr=0.1)
    with mock.patch.multiple(CompiledPasses, climb=None, restore=None, descend=None):
        two_steps(opt, params)


BASES = [dict(base_optimizer=base) for base in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)]


@pytest.mark.parametrize("way", [*BASES, *WAYS], ids=str)
def test_sgd_and_adam_need_no_operations_of_torch(way):
    params = parameters()
    opt = mup2.SAM(params, lr=0.1, skip_nonfinite=True, backend="compiled", **way)
    before = weights(params)
    unused = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("climb", "restore", "descend")}
    with mock.patch.multiple(torch_passes, **unused):
        set_gradients(params)
        opt.first_step()
        opt.restore()
        for _ in range(4):  # of every kind that the way has
            two_steps(opt, params)
    assert not equal(params, before)


WITHOUT_EXTENSION = """
import importlib, sys, warnings
sys.meta_path = [f for f in sys.meta_path if "ditable" not in str(f)]  # which would find the module elsewhere
sys.modules["mup2_fused._C"] = None
import torch
import mup2_fused as mup2

assert not mup2.compiled and not mup2.built_with_cuda and mup2.instruction_set is None
assert "torch._dynamo" not in sys.modules, "importing it takes seconds"
torch.manual_seed(0)
model = mup2.MLP(5, 8, 3)
x, y = torch.randn(12, 5), torch.randint(3, (12,))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        opt = mup2.SAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.1)
    mup2.SAM(model.parameters(), backend="torch", lr=0.1)
(message,) = [str(w.message) for w in told]
assert "python setup.py build_ext --inplace" in message and "backend='torch'" in message, message
assert told[0].filename == "<string>", "the warning shows the line that made the optimizer"
losses = [mup2.train_epoch(model, opt, [(x, y)]).item() for _ in range(20)]
assert losses[-1] < 0.95 * losses[0], losses
try:
    mup2.SAM(model.parameters(), backend="compiled", lr=0.1)
except RuntimeError as error:
    assert "python setup.py build_ext --inplace" in str(error)
else:
    raise AssertionError("an error was due")
sys.platform = "darwin"
missing = importlib.reload(mup2.compiled_passes).missing
assert "is not built. It is for Linux, and this is darwin" in missing and "setup.py" not in missing, missing
"""


def test_without_the_compiled_part():
    """It trains, says once how to build, and refuses backend="compiled"."""
    command, environment = [sys.executable, "-c", WITHOUT_EXTENSION], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["float8", "subclass"])
def test_parameters_without_kernels(kind):
    """auto takes torch's operations and says why; a group that is added counts, too."""
    if kind == "float8":
        p, words = nn.Parameter(torch.zeros(3).to(FLOAT8)), "not for torch.float8_e5m2"
    else:
        p, words = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3))), "inside a TwoTensor"
    with pytest.raises(RuntimeError, match=f"{words}.*backend='torch'"):
        mup2.SAM([p], lr=0.1, backend="compiled")
    compiled_passes.warn_once.cache_clear()
    opt = mup2.SAM(parameters(), lr=0.1)
    assert isinstance(opt.passes, CompiledPasses)
    with pytest.warns(UserWarning, match=words):
        opt.add_param_group({"params": [p], "perturb": False})
    assert opt.passes is torch_passes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mup2.SAM([p], lr=0.1)


def test_float8_parameters_beside_others():
    """A frozen one does not keep the kernels away. A group that is refused is not added."""
    w, frozen = (nn.Parameter(torch.ones(4).to(dtype), dtype == torch.float32) for dtype in (torch.float32, FLOAT8))
    opt = mup2.SAM([w, frozen], lr=0.5, backend="compiled")
    with pytest.raises(RuntimeError, match="not for torch.float8_e5m2"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(4).to(FLOAT8))]})
    assert [len(x.param_groups) for x in (opt, opt.base_optimizer, copy.deepcopy(opt))] == [1, 1, 1]
    ones_step(opt, [w])
    assert opt.passes.norms()[0] == 2.0, "the kernels have computed the norm"
    assert torch.equal(w, torch.full((4,), 0.5)) and torch.equal(frozen.float(), torch.ones(4))


def test_devices_without_kernels(monkeypatch):
    monkeypatch.setattr(compiled_passes, "built_with_cuda", False)
    for device, words in (("cuda", "MUP2_CUDA=1"), ("mps", "not for mps"), ("meta", "")):
        assert words in compiled_passes.obstacle([{"params": [mock.Mock(device=torch.device(device))]}])


@pytest.mark.parametrize("how", ["the same memory", "twice in a group", "overlapping"])
def test_parameters_that_share_memory(SAM, how):
    """Every backup is of the weights before the first perturbation."""
    memory = torch.arange(1.0, 12.0)
    a = nn.Parameter(memory[:8])
    b = {"the same memory": nn.Parameter(a.data), "twice in a group": a, "overlapping": nn.Parameter(memory[5:])}[how]
    before = memory.clone()
    with pytest.warns() if a is b else contextlib.nullcontext():
        opt = SAM([a, b], rho=0.5, lr=0.1)
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        opt.first_step()
        assert not torch.equal(memory, before)
        opt.restore()
        assert torch.equal(memory, before)


@pytest.mark.parametrize("perturb", [True, False])
@pytest.mark.parametrize("at_first", ["apart", "overlapping"])
def test_parameters_that_move(SAM, at_first, perturb):
    """Whether they share memory is found again when they lie elsewhere, in both passes."""
    memory = torch.zeros(11)
    places = {"apart": (torch.zeros(8), torch.zeros(6)), "overlapping": (memory[:8], memory[5:])}
    a, b = map(nn.Parameter, places[at_first])
    opt = SAM([{"params": [a, b], "perturb": perturb}], rho=0.5, lr=1.0)
    for place in (at_first, *(places.keys() - {at_first})):
        a.data, b.data = places[place]
        before = weights([a, b])
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        opt.first_step()
        assert torch.equal(a, before[0]) != perturb
        opt.second_step()
        twice = torch.tensor([1.0] * 5 + [2.0] * 3) if place == "overlapping" else 1
        assert torch.equal(a, before[0] - twice), place


def test_elements_that_share_memory_are_refused_and_nothing_stays_perturbed(SAM):
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1).expand(3))
    before = weights([a, b])
    opt = SAM([a, b], rho=0.5, lr=0.1)
    set_gradients([a, b])
    with pytest.raises(RuntimeError):
        opt.first_step()
    assert equal([a, b], before)


@pytest.mark.parametrize("call", ["climb", "descend"])
def test_an_interrupt_in_a_step_leaves_the_weights_restored(call):
    """Python raises KeyboardInterrupt between two instructions: here, right after the compiled part."""
    params = parameters()
    before = weights(params)
    opt = mup2.SAM(params, rho=0.5, lr=0.0, backend="compiled")
    plan = opt.passes.plan

    def interrupted(*args):
        getattr(plan, call)(*args)
        raise KeyboardInterrupt

    opt.passes.plan = mock.Mock(wraps=plan, **{call: interrupted})
    with pytest.raises(KeyboardInterrupt):
        two_steps(opt, params)
    assert equal(params, before) and opt.phase.backups is None
    opt.passes.plan = plan
    two_steps(opt, params)


@pytest.mark.parametrize("what", ["model", "training step"])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the inductor itself
def test_compiled_training_is_eager_training(SAM, what, compiler):
    """The second pass of a compiled model sees the perturbed weights."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    other = copy.deepcopy(model)
    a, b = (SAM(m.parameters(), lr=0.1, rho=0.5, momentum=0.9) for m in (model, other))
    eager, start = training_step(model, a), weights(model)
    if what == "model":
        compiled = training_step(torch.compile(other, backend=compiler), b)
    else:
        compiled = torch.compile(training_step(other, b), backend=compiler)
    for _ in range(4):
        x, y = torch.randn(12, 5), torch.randint(3, (12,))
        torch.testing.assert_close(compiled(x, y), eager(x, y))
    results = [
        [*m.parameters(), *m.buffers(), *(opt.state[p]["momentum_buffer"] for p in m.parameters())]
        for m, opt in ((model, a), (other, b))
    ]
    assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not equal(weights(model), start)


def test_the_compiler_leaves_the_passes_alone(SAM):
    """Its code would round differently."""
    torch.compiler.reset()
    params, graphs = parameters(), []
    opt = SAM(params, rho=0.1, lr=0.1)
    set_gradients(params)
    calls = {
        "first_step": opt.first_step,
        "restore": opt.restore,
        "step(closure)": lambda: opt.step(lambda: 0.0),
        "step()": lambda: (opt.first_step(), opt.step()),
    }
    for name, call in calls.items():
        torch.compile(call, backend=lambda graph, _: graphs.append(graph) or graph.forward)()
        assert not graphs, name


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the type of the weight")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_float32_gradients_of_other_parameters(SAM, device, dtype):
    p = nn.Parameter(torch.randn(50, 30).to(device, dtype))
    p.grad_dtype = None
    p.grad, before = torch.randn(50, 30, device=device), p.detach().double().clone()
    opt = SAM([p], rho=5.0, lr=0.1)
    opt.first_step()
    g = p.grad.double()
    tolerance = dict(rtol=1e-2, atol=1e-3) if dtype != torch.float64 else dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.detach().double(), before + 5.0 * g / g.norm(), **tolerance)
    opt.second_step()
    torch.testing.assert_close(p.detach().double(), before - 0.1 * g, **tolerance)

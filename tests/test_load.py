"""Load: thousands of tensors, thousands of steps, threads, tensors beyond 2^31 elements; and the annotations."""

import ast
import ctypes
import gc
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import IMPLEMENTATIONS, ROOT
from torch import nn

import mup2_fused
import mup2_ref
from mup2_fused import verify

CHUNK = mup2_fused._C.chunk
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- many tensors

MANY = 5000


def many(dtypes, distinct, steps):
    """Weights, gradients of both passes of each step, and so many distinct settings of groups, of 5,000 tensors."""
    sizes = [(i * 37) % 301 for i in range(MANY)]  # 0 too
    sizes[::500] = [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5, 1, 2, 70_001, 0, 9 * CHUNK, 15]
    weights = [torch.randn(n).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    gradients = [[torch.randn(w.shape).to(w.dtype) for w in weights] for _ in range(2 * steps)]
    settings = [dict(lr=0.1 / (1 + k), rho=50.0 + k, gradnorm_scaling=1 + 0.1 * k) for k in range(distinct)]
    return weights, gradients, settings


def trajectory(SAM, base, options, weights, gradients, settings, dtype=None):
    """Weights at w + e and after each step, and the moments in the end."""
    params = [nn.Parameter(w.clone().to(dtype or w.dtype)) for w in weights]
    opt = SAM([dict(params=params[k :: len(settings)]) | s for k, s in enumerate(settings)], base, **options)
    seen = []
    for i, now in enumerate(gradients):
        for p, g in zip(params, now):
            p.grad = g.to(p.dtype, copy=True)
        (opt.second_step if i % 2 else opt.first_step)()
        seen += [p.detach().clone() for p in params]
    return seen + [x for p in params for key, x in opt.state[p].items() if key != "step" and torch.is_tensor(x)]


@pytest.mark.parametrize("variant", mup2_ref.VARIANTS)
def test_5000_float32_tensors_with_sgd_have_the_references_bits(threads, variant):
    """More tensors than a launch of any kind holds, and more distinct groups (100, of 32)."""
    assert all(2 * capacity < MANY for capacity in mup2_fused._C.tensors_per_launch.values())
    data = many([F32], 100, steps=3)
    options = dict(variant=variant, momentum=0.9, weight_decay=1e-4)
    fused, reference = (trajectory(kind, torch.optim.SGD, options, *data) for kind in (mup2_fused.SAM, mup2_ref.SAM))
    assert len(fused) == len(reference) == 7 * MANY
    assert all(torch.equal(a, b) for a, b in zip(fused, reference))
    assert not any(torch.equal(a, w) for a, w in zip(fused, data[0]) if len(w) > 8)  # every tensor is perturbed


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_5000_tensors_of_all_types_agree_with_float64(threads, base):
    """Within twice the reference's own error and an ulp, each tensor by itself; float64 as exact as the norm."""
    dtypes = [F32, BF16, F64] + [F16] * (base is torch.optim.SGD)  # in which Adam's g² underflows
    data = many(dtypes, 7, steps=1)  # 7: all types in each group
    options = dict(momentum=0.9) if base is torch.optim.SGD else dict(weight_decay=0.1)
    fused, reference = (trajectory(kind, base, options, *data) for kind in (mup2_fused.SAM, mup2_ref.SAM))
    exact = trajectory(mup2_ref.SAM, base, options, *data, dtype=F64)
    assert len(fused) == len(exact) == (3 if base is torch.optim.SGD else 4) * MANY
    for i, three in enumerate(zip(fused, reference, exact)):
        error, bound = verify.error_and_bound(*([x] for x in three))
        if three[1].dtype == F64 and len(three[1]):  # the other gradients' part of the norm is summed in some 45 bits
            bound += 2**-45 * three[2].abs().max().item()
        assert error <= bound, (i, three)
    assert not any(torch.equal(a, w) for a, w in zip(fused, data[0]) if len(w) > 8)


# ------------------------------------------------------------------------------------------------- many elements


@pytest.mark.parametrize("sizes", [[2**31 - 1, 2**31, 5], [2**32 + 1, 3, 2**33 - 1], [3 * 2**42, 7, 2**43, 2**42 - 1]])
def test_the_walk_over_more_than_2_to_the_31_elements(sizes):
    """First and last chunk of each tensor. The last sizes have more chunks than a launch may have, 2^31 - 1."""
    counts = [-(-n // CHUNK) for n in sizes]
    starts = [sum(counts[:i]) for i in range(len(sizes))]
    assert starts[-1] * CHUNK > 2**31 and (sum(counts) >= 2**31) == (sizes[-1] == 2**42 - 1)
    for tensor, (n, start, count) in enumerate(zip(sizes, starts, counts)):
        first = (tensor, 0, min(n, CHUNK))
        last = (tensor, (count - 1) * CHUNK, n - (count - 1) * CHUNK)
        assert mup2_fused._C.walk(sizes, [start]) == [first] and mup2_fused._C.walk(sizes, [start + count - 1]) == [
            last
        ]
    assert mup2_fused._C.walk(sizes, [sum(counts)]) == []


def available_memory():
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else 0


def step_of_a_large_tensor(device):
    """All weights are 1; e is 1/2 and the update -1/2, but at both ends and around 2^31, where they are 1 and -1."""
    n = 2**31 + 5
    special = [0, 1, CHUNK - 1, CHUNK, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    p = nn.Parameter(torch.ones(n, dtype=BF16, device=device))
    p.grad = torch.full((n,), 2.0**-16, dtype=BF16, device=device)
    p.grad[special] = 2.0**-15
    norm = math.sqrt(n + 3 * len(special)) * 2.0**-16
    opt = mup2_fused.SAM([p], rho=norm * 2**15, lr=2.0**15)

    def check(others, there):
        assert p.detach()[special].tolist() == [there] * len(special)
        assert sum((part == others).sum().item() for part in p.detach().split(2**27)) == n - len(special)

    opt.first_step()
    assert opt._plan.norms()[0] == pytest.approx(norm, rel=1e-12)
    check(1.5, 2.0)
    opt.restore()
    assert all((part == 1).all() for part in p.detach().split(2**27))
    opt.first_step()
    opt.second_step()
    check(0.5, 0.0)


@pytest.mark.skipif("MUP2_LARGE" not in os.environ, reason="takes 16 GiB of memory: MUP2_LARGE=1")
def test_a_parameter_of_more_than_2_to_the_31_elements():
    if available_memory() < 16 * 2**30:
        pytest.skip("takes 16 GiB of memory")
    step_of_a_large_tensor("cpu")


@pytest.mark.cuda
def test_a_parameter_of_more_than_2_to_the_31_elements_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("takes 16 GiB of GPU memory")
    step_of_a_large_tensor("cuda")


# ------------------------------------------------------------------------------------------------- many steps


class Loop:
    """A tiny model, and one step of each kind in turn: two-step API, closure, perturbed(), skipped, restored."""

    def __init__(self, SAM, base, device):
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
        options = dict(momentum=0.9) if base is torch.optim.SGD else {}
        self.opt = SAM(self.model.parameters(), base, lr=1e-4, rho=0.01, same_randomness=True, **options)
        self.x, self.steps = torch.randn(5, 3, device=device), 0

    def closure(self):
        self.opt.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        return loss

    def step(self):
        kind, self.steps = self.steps % 5, self.steps + 1
        if kind == 0:
            return self.opt.step(self.closure)
        self.closure()
        if kind == 1:
            with self.opt.perturbed():
                self.closure()
        else:
            if kind == 2:  # nothing is perturbed, and the update is skipped
                self.model[0].weight.grad.fill_(math.nan)
            self.opt.first_step()
            self.closure()
            if kind == 3:
                return self.opt.restore()
        return self.opt.second_step()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def malloced_bytes():
    """What C and C++ hold, also where it fits into pages that the process has already; 0 without a new glibc."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Mallinfo
    return mallinfo().uordblks + mallinfo().hblkhd


def flat(run, measures, warm_up=1000, steps=10_000):
    """What each measure has grown by, from step warm_up to step steps."""
    for _ in range(warm_up):
        run.step()
    gc.collect()
    before = [[measure() for measure in measures] for _ in range(2)][1]  # the first leave lists' memory behind
    for _ in range(steps - warm_up):
        run.step()
    gc.collect()
    return [measure() - b for measure, b in zip(measures, before)]


def tensors_alive():
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())  # isinstance() wakes up deprecated objects


BASES = pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@BASES
def test_memory_is_flat_over_10000_steps(SAM, base):
    run = Loop(SAM, base, "cpu")
    measures = [resident_bytes, malloced_bytes, sys.getallocatedblocks, lambda: len(gc.get_objects()), tensors_alive]
    resident, malloced, blocks, objects, tensors = flat(run, measures)
    assert run.opt.skipped_steps == 2000 and run.steps == 10_000
    print(resident, malloced, blocks, objects, tensors)
    # Something that one of the five kinds of steps leaves behind would be there 1,800 times.
    assert resident < 2**18 and malloced < 2**14 and blocks < 900 and objects < 900 and tensors == 0


@pytest.mark.cuda
@BASES
def test_gpu_memory_is_flat_over_10000_steps(SAM, base):
    run = Loop(SAM, base, "cuda")
    assert flat(run, [torch.cuda.memory_allocated, torch.cuda.memory_reserved]) == [0, 0]
    assert run.opt.skipped_steps == 2000 and run.steps == 10_000


# ------------------------------------------------------------------------------------------------- threads


def train(SAM, seed, base, variant, steps, sizes, dtype):
    """Weights after so many steps of every kind; those of several chunks make at::parallel_for split."""
    torch.set_num_threads(2)  # which some backends count per thread
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    opt = SAM([dict(params=params[::2], rho=0.5), dict(params=params[1::2])], base, lr=0.01, variant=variant)

    def closure():
        opt.zero_grad()
        loss = torch.stack([(p * p.detach().cos()).sum() for p in params]).sum()
        loss.backward()
        return loss.detach()

    for i in range(steps):
        if i % 3 == 0:
            opt.step(closure)
            continue
        closure()
        if i % 3 == 1:
            opt.first_step()
            closure()
        else:
            with opt.perturbed():
                closure()
        opt.second_step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("sizes, steps", [((3, 17, 100), 500), ((3, 50_001, 5 * CHUNK, 9_000), 200)])
def test_optimizers_in_several_threads_take_the_steps_that_they_take_alone(SAM, sizes, steps):
    kinds = [
        (torch.optim.SGD, "sam", F32),
        (torch.optim.AdamW, "elementwise", F32),
        (torch.optim.SGD, "layerwise", BF16),
    ]
    jobs = [(SAM, seed, base, variant, steps, sizes, dtype) for seed, (base, variant, dtype) in enumerate(kinds)]
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    together, barrier = {}, threading.Barrier(len(jobs))
    running, most = set(), set()

    def run(i):
        barrier.wait()
        running.add(i)
        together[i] = train(*jobs[i])
        most.add(len(running))
        running.discard(i)

    try:
        alone, untrained = ([train(*job[:4], n, *job[5:]) for job in jobs] for n in (steps, 0))
        sys.setswitchinterval(1e-5)  # seconds; between any two lines
        started = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
    assert max(most) > 1  # they did run at once
    for i, weights in enumerate(alone):
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(weights, together[i]))
        assert not any(torch.equal(a, b) for a, b in zip(weights, untrained[i]))


# ------------------------------------------------------------------------------------------------- annotations

USAGE = """
import torch
from torch import Tensor, nn
import mup2_fused
import mup2_ref
from mup2_fused.check import Report, check

def network(width: int) -> nn.Module:
    return mup2_ref.MLP(3, width, 2)

model, base = network(8), network(4)
groups = mup2_ref.param_groups(model, base, lr=0.1, rho=0.1, perturbation=(0.5, (0.0, 0.5, 1.0)))
mup2_ref.param_groups(model, base, lr="0.1", rho=0.1)  # wrong
mup2_ref.param_groups(model, base, lr=0.1)  # wrong
mup2_ref.param_groups(model, base, lr=0.1, rho=0.1, perturb=lambda name, p: p.ndim > 1)
mup2_ref.param_groups(model, base, lr=0.1, rho=0.1, perturb=3)  # wrong
mup2_ref.init_(model, base, roles={"layers.0.weight": "input"}).eval()
mup2_ref.init_(model, base, roles=["input"])  # wrong
radius: float = mup2_ref.exponents("mup").d
radius = mup2_ref.predict("mup").r  # wrong
"""

FOR_BOTH = """
opt = KIND(groups, torch.optim.AdamW, rho=0.1, variant="sam", skip_nonfinite=True, weight_decay=0.1)
KIND(model.parameters(), lr=0.1, momentum=0.9)
KIND(groups, rho="0.1")  # wrong
KIND(groups, torch.optim.SGD, 0.1)  # wrong
KIND(groups, base_optimizer=torch.optim.SGD(groups))  # wrong
KIND()  # wrong

def closure() -> Tensor:
    opt.zero_grad()
    return mup2_ref.accumulate(model, [(torch.ones(1, 3), torch.ones(1))], nn.functional.cross_entropy)

def no_tuples() -> Tensor:
    return mup2_ref.accumulate(model, [torch.ones(3)])  # wrong

opt.step(closure)
opt.step(3)  # wrong
opt.first_step(zero_grad=True)
opt.second_step(zero_grad="yes")  # wrong
with opt.perturbed(), mup2_ref.frozen_buffers(model):
    closure()
opt.restore()
with opt.restore():  # wrong
    pass
skipped: int = opt.skipped_steps
skipped = opt.state_dict()  # wrong
torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
loss: Tensor = mup2_ref.train_epoch(model, opt, [(torch.ones(1, 3), torch.ones(1))], scaler=torch.amp.GradScaler())
mup2_ref.train_epoch(model, model, [])  # wrong
"""


def test_annotations_accept_right_calls_and_refuse_wrong_ones(tmp_path):
    """What users of mypy see: an error in each line that is marked as wrong, and in no other."""
    pytest.importorskip("mypy")
    for name in IMPLEMENTATIONS:
        source = USAGE + FOR_BOTH.replace("KIND", f"{name}.SAM")
        source += 'report: Report = check(network, [4, 8], lr=0.1)\ncheck(network, "4")  # wrong\n'
        (tmp_path / f"{name}_usage.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *sorted(tmp_path.glob("*.py"))]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {(Path(f).name, int(n)) for f, n in re.findall(r"^(.*?):(\d+): error:", printed.stdout, re.MULTILINE)}
    wrong = {
        (path.name, n)
        for path in tmp_path.glob("*.py")
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if line.endswith("# wrong")
    }
    assert found == wrong and len(wrong) == 32, printed.stdout + printed.stderr


def test_the_stub_names_what_the_compiled_module_has():
    stub = ast.parse((ROOT / "mup2_fused" / "_C.pyi").read_text())
    plan = next(node for node in stub.body if isinstance(node, ast.ClassDef))
    others = [node for node in stub.body if isinstance(node, (ast.FunctionDef, ast.AnnAssign))]
    public = {name for name in dir(mup2_fused._C) if not name.startswith("_")}
    assert public == {"Plan"} | {getattr(n, "name", None) or n.target.id for n in others}
    assert {n.name for n in plan.body} == {name for name in dir(mup2_fused._C.Plan) if not name.startswith("_")}
    values = [getattr(mup2_fused._C, n.target.id) for n in others if isinstance(n, ast.AnnAssign)]
    names = [n.annotation for n in others if isinstance(n, ast.AnnAssign)]
    assert [type(v).__name__ for v in values] == [n.value.id if isinstance(n, ast.Subscript) else n.id for n in names]

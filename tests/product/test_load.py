"""Load: thousands of tensors, thousands of steps, threads, and a tensor of more than 2^31 elements."""

import ctypes
import gc
import math
import os
import re
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import mup2_fused as mup2
import mup2_ref
from mup2_fused import verify
from mup2_fused.compiled_passes import chunk as CHUNK

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
compiled = partial(mup2.SAM, backend="compiled")
slow = pytest.mark.slow


@pytest.fixture(params=[pytest.param(1, marks=slow), 3], ids=["1 thread", "3 threads"])
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


@pytest.mark.parametrize(
    "variant", ["sam", pytest.param("elementwise", marks=slow), pytest.param("layerwise", marks=slow)]
)
def test_5000_float32_tensors_with_sgd_have_the_references_bits(threads, variant):
    """More tensors than a launch of any kind holds, and more distinct groups: 100, where a launch holds 32."""
    data = many([F32], 100, steps=2)
    options = dict(variant=variant, momentum=0.9, weight_decay=1e-4)
    ours, reference = (trajectory(kind, torch.optim.SGD, options, *data) for kind in (compiled, mup2_ref.SAM))
    assert len(ours) == len(reference) == 5 * MANY
    assert all(torch.equal(a, b) for a, b in zip(ours, reference))
    assert not any(torch.equal(a, w) for a, w in zip(ours, data[0]) if len(w) > 8)  # every tensor is perturbed


@pytest.mark.parametrize("base", [torch.optim.SGD, pytest.param(torch.optim.AdamW, marks=slow)])
def test_5000_tensors_of_all_types_agree_with_float64(threads, base):
    """Within twice the reference's own error and an ulp, each tensor by itself; float64 as exact as the norm."""
    dtypes = [F32, BF16, F64] + [F16] * (base is torch.optim.SGD)  # in which Adam's g² underflows
    data = many(dtypes, 7, steps=1)  # 7: all types in each group
    options = dict(momentum=0.9) if base is torch.optim.SGD else dict(weight_decay=0.1)
    ours, reference = (trajectory(kind, base, options, *data) for kind in (compiled, mup2_ref.SAM))
    exact = trajectory(mup2_ref.SAM, base, options, *data, dtype=F64)
    assert len(ours) == len(exact) == (3 if base is torch.optim.SGD else 4) * MANY
    for i, three in enumerate(zip(ours, reference, exact)):
        error, bound = verify.error_and_bound(*([x] for x in three))
        if three[1].dtype == F64 and len(three[1]):  # the other gradients' part of the norm is summed in some 45 bits
            bound += 2**-45 * three[2].abs().max().item()
        assert error <= bound, (i, three)
    assert not any(torch.equal(a, w) for a, w in zip(ours, data[0]) if len(w) > 8)


# ------------------------------------------------------------------------------------------------- many elements


def available_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else 0


@slow
def test_a_parameter_of_more_than_2_to_the_31_elements(device):
    """All weights are 1; e is 1/2 and the update -1/2, but at both ends and around 2^31, where they are 1 and -1."""
    if available_memory(device) < 16 * 2**30:
        pytest.skip("takes 16 GiB of memory")
    n = 2**31 + 5
    special = [0, 1, CHUNK - 1, CHUNK, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    p = nn.Parameter(torch.ones(n, dtype=BF16, device=device))
    p.grad = torch.full((n,), 2.0**-16, dtype=BF16, device=device)
    p.grad[special] = 2.0**-15
    norm = math.sqrt(n + 3 * len(special)) * 2.0**-16
    opt = compiled([p], rho=norm * 2**15, lr=2.0**15)

    def check(others, there):
        assert p.detach()[special].tolist() == [there] * len(special)
        assert sum((part == others).sum().item() for part in p.detach().split(2**27)) == n - len(special)

    opt.first_step()
    assert opt.passes.norms()[0] == pytest.approx(norm, rel=1e-12)
    check(1.5, 2.0)
    opt.restore()
    assert all((part == 1).all() for part in p.detach().split(2**27))
    opt.first_step()
    opt.second_step()
    check(0.5, 0.0)


# ------------------------------------------------------------------------------------------------- many steps


class Loop:
    """A tiny model, and one step of each kind in turn: closure, perturbed(), skipped, restored, two-step API."""

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


def flat(run, measures, steps, warm_up=500):
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


STEPS = pytest.mark.parametrize("steps", [1500, pytest.param(10_000, marks=slow)])
BASES = pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@BASES
@STEPS
def test_memory_is_flat(SAM, base, steps):
    run = Loop(SAM, base, "cpu")
    measures = [resident_bytes, malloced_bytes, sys.getallocatedblocks, lambda: len(gc.get_objects()), tensors_alive]
    resident, malloced, blocks, objects, tensors = flat(run, measures, steps)
    assert run.opt.skipped_steps == steps // 5 and run.steps == steps
    print(resident, malloced, blocks, objects, tensors)
    # Something that one of the five kinds of steps leaves behind would be there 200 times, or 1,900 times.
    assert resident < 2**18 and malloced < 2**14 and blocks < 150 and objects < 150 and tensors == 0


@pytest.mark.cuda
@BASES
def test_gpu_memory_is_flat(SAM, base):
    run = Loop(SAM, base, "cuda")
    assert flat(run, [torch.cuda.memory_allocated, torch.cuda.memory_reserved], 10_000) == [0, 0]
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


SMALL, LARGE = (3, 17, 100), (3, 50_001, 5 * CHUNK, 9_000)


@pytest.mark.parametrize("sizes, steps", [(SMALL, 100), (LARGE, 20), *[pytest.param(LARGE, 200, marks=slow)]])
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

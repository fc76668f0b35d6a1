"""Load: thousands of steps, threads, and a tensor of more than 2^31 elements.

Thousands of tensors are in tests/kernels/test_launches.py.
"""

import ctypes
import gc
import math
import os
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import mup2_fused as mup2
from mup2_fused.compiled_passes import chunk as CHUNK

F32, BF16 = torch.float32, torch.bfloat16
slow = pytest.mark.slow


@slow
def test_a_parameter_of_more_than_2_to_the_31_elements(device):
    """All weights are 1; e is 1/2 and the update -1/2, but at both ends and around 2^31, where they are 1 and -1."""
    free_on_host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (torch.cuda.mem_get_info()[0] if device == "cuda" else free_on_host) < 16 * 2**30:
        pytest.skip("takes 16 GiB of memory")
    n = 2**31 + 5
    special = [0, 1, CHUNK - 1, CHUNK, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, n - 1]
    p = nn.Parameter(torch.ones(n, dtype=BF16, device=device))
    p.grad = torch.full((n,), 2.0**-16, dtype=BF16, device=device)
    p.grad[special] = 2.0**-15
    norm = math.sqrt(n + 3 * len(special)) * 2.0**-16
    opt = mup2.SAM([p], backend="compiled", rho=norm * 2**15, lr=2.0**15)

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


class Loop:
    """A few tensors, and one step of each kind in turn: closure, perturbed(), skipped, restored, two-step API."""

    def __init__(self, SAM, base, sizes=(12, 4, 4, 1), dtype=F32, device="cpu", seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in sizes]
        groups = [dict(params=self.params[::2], rho=0.5), dict(params=self.params[1::2])]
        self.opt, self.steps = SAM(groups, base, lr=0.01, **options), 0

    def closure(self):
        self.opt.zero_grad()
        loss = torch.stack([(p * p.detach().cos()).sum() for p in self.params]).sum()
        loss.backward()
        return loss.detach()

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
                self.params[0].grad.fill_(math.nan)
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
    """The least that each measure grows by in a stretch, of three after the warm-up. A leak is in all of them.

    Memory of the process's other users, such as a cache that an earlier test left to grow, is in one of them at most.
    """
    found = []
    for stretch in [warm_up] + [(steps - warm_up) // 3] * 3:
        for _ in range(stretch):
            run.step()
        gc.collect()
        found.append([[measure() for measure in measures] for _ in range(2)][1])  # the first leave lists' memory behind
    return [min(b - a for a, b in pairwise(counts)) for counts in zip(*found)]


def tensors_alive():
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())  # isinstance() wakes up deprecated objects


STEPS = pytest.mark.parametrize("steps", [2000, pytest.param(11_000, marks=slow)])
BASES = pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@BASES
@STEPS
def test_memory_is_flat(SAM, base, steps):
    run = Loop(SAM, base, same_randomness=True, **({"momentum": 0.9} if base is torch.optim.SGD else {}))
    measures = [resident_bytes, malloced_bytes, sys.getallocatedblocks, lambda: len(gc.get_objects()), tensors_alive]
    resident, malloced, blocks, objects, tensors = flat(run, measures, steps)
    assert run.opt.skipped_steps == steps // 5 and run.steps == steps
    print(resident, malloced, blocks, objects, tensors)
    # Something that one of the five kinds of steps leaves behind would be there 100 times, or 700 times.
    assert resident < 2**18 and malloced < 2**12 and blocks < 75 and objects < 75 and tensors == 0


@pytest.mark.cuda
@BASES
def test_gpu_memory_is_flat(SAM, base):
    run = Loop(SAM, base, device="cuda")
    assert flat(run, [torch.cuda.memory_allocated, torch.cuda.memory_reserved], 11_000) == [0, 0]
    assert run.opt.skipped_steps == 2200 and run.steps == 11_000


SMALL, LARGE = (3, 17, 100), (3, 50_001, 5 * CHUNK, 9_000)  # which at::parallel_for splits
KINDS = [(torch.optim.SGD, "sam", F32), (torch.optim.AdamW, "elementwise", F32), (torch.optim.SGD, "layerwise", BF16)]


@pytest.mark.parametrize("sizes, steps", [(SMALL, 100), (LARGE, 20), pytest.param(LARGE, 200, marks=slow)])
def test_optimizers_in_several_threads_take_the_steps_that_they_take_alone(SAM, sizes, steps):
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    together, barrier = {}, threading.Barrier(len(KINDS))
    running, most = set(), set()

    def train(i, steps):
        torch.set_num_threads(2)  # which some backends count per thread
        base, variant, dtype = KINDS[i]
        loop = Loop(SAM, base, sizes, dtype, seed=i, variant=variant)
        for _ in range(steps):
            loop.step()
        return [p.detach() for p in loop.params]

    def run(i):
        barrier.wait()
        running.add(i)
        together[i] = train(i, steps)
        most.add(len(running))
        running.discard(i)

    try:
        alone, untrained = ([train(i, n) for i in range(len(KINDS))] for n in (steps, 0))
        sys.setswitchinterval(1e-5)  # seconds; between any two lines
        started = [threading.Thread(target=run, args=(i,)) for i in range(len(KINDS))]
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

"""Run by test_processes.py in several processes: SAM with DistributedDataParallel, against one process on all data.

And what other scripts need to start processes and to compare them.
"""

import copy
import os
import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch._dynamo  # before the process group: imported later, it keeps gloo's threads alive at exit
import torch.distributed as dist
from small_problems import assert_close, equal, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mup2_fused as mup2
from mup2_fused import MLP, accumulate

STEPS, PER_RANK = 5, 8


def launch(*checks):
    """Run the checks in two processes, one after the other. Each gets the folder that the command line names."""
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(run, (sys.argv[1], checks), nprocs=2, start_method="fork")


def run(rank, folder, checks):
    """What torch.distributed.run would set up, but after the imports."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 0}
    os.environ |= {key: str(value) for key, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=2)
    for check in checks:
        check(folder)
    dist.destroy_process_group()


def same_everywhere(tensors):
    mine = torch.cat([t.detach().flatten() for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


def check_synchronized(SAM, **ddp):
    """Averaged gradients in all passes: one process on the joined batch, in float64.

    In a bucket of its own a gradient stays the same tensor in all passes, and each changes it once.
    """
    torch.manual_seed(0)
    alone = MLP(5, 16, 3).double()
    model = DistributedDataParallel(copy.deepcopy(alone), **ddp)
    a, b = (SAM(m.parameters(), lr=0.1, rho=0.2, momentum=0.9) for m in (model, alone))
    world, rank = dist.get_world_size(), dist.get_rank()
    at_once = ddp.keys() & {"static_graph", "bucket_cap_mb"}
    for _ in range(STEPS):
        x, y = torch.randn(world * PER_RANK, 5).double(), torch.randint(3, (world * PER_RANK,))
        mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        for opt, m, batch in ((a, model, (x[mine], y[mine])), (b, alone, (x, y))):

            def closure():
                opt.zero_grad()
                return accumulate(m, [batch] if at_once else [*zip(*(t.split(3) for t in batch))])

            opt.step(closure)
    assert same_everywhere(model.parameters())
    assert_close(model.parameters(), alone.parameters())


def check_m_sharpness(SAM):
    """Each process climbs by its own gradient; gradients at w + e are averaged, weights never differ by a bit."""
    torch.manual_seed(0)
    alone = MLP(5, 16, 3).double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    opt = SAM(model.parameters(), lr=0.1, rho=0.2, momentum=0.9)
    momentum = [torch.zeros_like(p) for p in alone.parameters()]
    world, rank = dist.get_world_size(), dist.get_rank()
    for _ in range(STEPS):
        x, y = torch.randn(world, PER_RANK, 5).double(), torch.randint(3, (world, PER_RANK))
        opt.zero_grad()
        accumulate(model, [(x[rank, :3], y[rank, :3]), (x[rank, 3:], y[rank, 3:])], synchronize=False)
        assert not same_everywhere([p.grad for p in model.parameters()]), "the first pass does not synchronise"
        opt.first_step(zero_grad=True)
        assert not same_everywhere(model.parameters())
        accumulate(model, [(x[rank], y[rank])])
        assert same_everywhere([p.grad for p in model.parameters()])
        opt.second_step()
        assert same_everywhere(model.parameters())

        params, average = list(alone.parameters()), [torch.zeros_like(p) for p in alone.parameters()]
        for r in range(world):  # what it should be, process by process
            g = torch.autograd.grad(nn.functional.cross_entropy(alone(x[r]), y[r]), params)
            norm = sum(v.square().sum() for v in g) ** 0.5
            climbed = {n: p + 0.2 * v / norm for (n, p), v in zip(alone.named_parameters(), g)}
            f = torch.func.functional_call(alone, climbed, (x[r],))
            g = torch.autograd.grad(nn.functional.cross_entropy(f, y[r]), list(climbed.values()))
            average = [a + v / world for a, v in zip(average, g)]
        with torch.no_grad():
            for p, v, a in zip(params, momentum, average):
                p.sub_(v.mul_(0.9).add_(a), alpha=0.1)
    assert_close(model.parameters(), alone.parameters())


def check_not_finite_in_one(SAM):
    """m-sharpness: a first gradient that is not finite in one process makes all skip, and weights stay the same."""
    torch.manual_seed(0)
    model = DistributedDataParallel(MLP(5, 16, 3))
    opt = SAM(model.parameters(), lr=0.1, rho=0.2, momentum=0.9)
    world, rank = dist.get_world_size(), dist.get_rank()
    for step in range(4):
        x, y = torch.randn(world, PER_RANK, 5), torch.randint(3, (world, PER_RANK))
        before = weights(model)
        opt.zero_grad()
        accumulate(model, [(x[rank], y[rank])], synchronize=False)
        broken = step in (1, 2)
        if broken and rank == step - 1:
            next(model.parameters()).grad[0, 0] = torch.inf
        with opt.perturbed(dist.group.WORLD) if step == 1 else nullcontext():
            if step != 1:
                opt.first_step(zero_grad=True, process_group=dist.group.WORLD)
            assert broken == equal(weights(model), before)
            opt.zero_grad()
            accumulate(model, [(x[rank], y[rank])])
        opt.second_step()
        assert broken == equal(weights(model), before)
        assert same_everywhere(model.parameters())
    assert opt.skipped_steps == 2


def check_no_gradient_in_one(SAM):
    """It climbs nowhere, keeps up with the others, and skips with them."""
    rank = dist.get_rank()
    for value, skipped in ((1.0, 0), (torch.nan, 1)):
        w = nn.Parameter(torch.ones(3))
        opt = SAM([{"params": []}, {"params": [w]}], lr=0.1, rho=0.2)
        w.grad = torch.full_like(w, value) if rank == 0 else None
        opt.first_step(process_group=dist.group.WORLD)
        assert (w[0] > 1) == (rank == 0 and not skipped)
        w.grad = torch.ones_like(w)
        opt.second_step()
        assert opt.skipped_steps == skipped and (w[0] < 1) == (not skipped)


def check_data_parallel(backend):
    SAM = partial(mup2.SAM, backend=backend)
    views = {"gradient_as_bucket_view": True}
    for ddp in ({}, views, views | {"bucket_cap_mb": 1e-5}, {"static_graph": True}):
        check_synchronized(SAM, **ddp)
    for way in (dict(interval=3), dict(ascent="momentum")):
        check_synchronized(partial(SAM, **way))
    check_m_sharpness(SAM)
    check_not_finite_in_one(SAM)
    check_no_gradient_in_one(SAM)

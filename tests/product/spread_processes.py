"""Run by test_processes.py with a folder for checkpoints: everything that takes processes, in four of them.

Ends with 0 if all assertions hold in every process. Here are parameters that are spread as DTensors.

Every way of spreading is compared with one process that has the same data. Checkpoints are read by three processes and
by one.
"""

import contextlib
import copy
import os
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ddp_processes import check_data_parallel
from small_problems import assert_close, backward, block, equal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import mup2_fused as mup2
from mup2_fused import torch_passes

BATCH, STEPS = 8, 2


class Net(nn.Module):
    """Sizes that four processes cannot share evenly; of the last layer, one of them has nothing."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head, self.gain = nn.Linear(16, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.embed(x)
        return self.gain * self.head(h + self.down(self.up(self.norm(h)).relu()))


def tensor_parallel(model, mesh):
    """With sequence parallelism, which leaves gradients as partial sums; gain stays a plain parameter."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
        "head": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def fsdp(model, mesh):
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def spread(model, how):
    """(the model over all processes, number of different batches, which of them is this process's)."""
    if how in ("tensor parallel", "fsdp"):
        mesh = init_device_mesh("cpu", (4,))
        return (tensor_parallel(model, mesh), 1, 0) if how != "fsdp" else (fsdp(model, mesh), 4, dist.get_rank())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    if how == "fsdp of tensor parallel":
        tensor_parallel(model, mesh["inner"])
        return fsdp(model, mesh["outer"]), 2, mesh["outer"].get_local_rank()
    return fsdp(model, mesh), 4, dist.get_rank()  # with a mesh of two dimensions, copies of what is sharded


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def part(t):
    return t.to_local() if isinstance(t, DTensor) else t


def parts(model):
    return [part(p.detach()).clone() for p in model.parameters()]


def pair(SAM, how="fsdp", base=torch.optim.SGD, **kwargs):
    """A model over all processes and its twin in this one, their optimizers, and this process's part of a batch."""
    torch.manual_seed(0)
    alone = Net().double()
    model, batches, mine = spread(copy.deepcopy(alone), how)
    kwargs |= {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizers = [SAM(m.parameters(), base, lr=0.1, rho=0.2, **kwargs) for m in (model, alone)]
    return model, alone, *optimizers, batches, slice(mine * BATCH, (mine + 1) * BATCH)


def data(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * BATCH, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (len(x),), generator=generator)


def train(model, opt, batches, mine, steps):
    for step in steps:
        x, y = data(batches, step)
        opt.step(lambda: backward(model, x[mine], y[mine]))


def check_steps(SAM, how, base, variant):
    model, alone, a, b, batches, mine = pair(SAM, how, base, variant=variant)
    addresses = [part(p).data_ptr() for p in model.parameters()]
    for step in range(STEPS):
        x, y = data(batches, step)
        for opt, m, batch in ((a, model, (x[mine], y[mine])), (b, alone, (x, y))):
            before = parts(m)
            backward(m, *batch)
            opt.first_step()
            if m is model:
                placements = [getattr(p.grad, "placements", None) for p in model.parameters()]
                assert placements == [getattr(p, "placements", None) for p in model.parameters()]
            if step == 0:  # back, and once more
                assert not equal(parts(m), before) or not sum(map(torch.numel, before))
                opt.restore()
                assert equal(parts(m), before)
                opt.first_step()
            backward(m, *batch)
            opt.second_step()
    assert_close(map(whole, model.parameters()), alone.parameters())
    assert addresses == [part(p).data_ptr() for p in model.parameters()]
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in a.state[p].items():
            assert key == "step" or isinstance(value, DTensor) == isinstance(p, DTensor), key
            torch.testing.assert_close(whole(value), b.state[q][key], rtol=1e-9, atol=1e-12)


def check_cheaper_steps(SAM):
    """An interval, climbing against the momentum, and climbing by a part of each process's batch."""
    for kwargs in (dict(interval=3), dict(ascent="momentum"), dict(ascent="momentum", base=torch.optim.AdamW)):
        model, alone, a, b, batches, mine = pair(SAM, **kwargs)
        train(model, a, batches, mine, range(5))
        train(alone, b, batches, slice(None), range(5))
        assert_close(map(whole, model.parameters()), alone.parameters())
    for always in (False, True):  # a second pass, which replaces the gradients of steps without SAM
        model, alone, a, b, batches, mine = pair(SAM, interval=2)
        for step in range(3):
            x, y = data(batches, step)
            for opt, m, batch in ((a, model, mine), (b, alone, slice(None))):
                F.cross_entropy(m(x[batch]), y[batch]).backward()
                if opt.first_step(zero_grad=True) or always:
                    F.cross_entropy(m(x[batch]), y[batch]).backward()
                opt.second_step(zero_grad=True)
        assert_close(map(whole, model.parameters()), alone.parameters())
    model, alone, a, b, batches, mine = pair(SAM)
    x, y = data(batches, 0)
    part = slice(mine.start, mine.start + 2)
    all_parts = torch.cat([torch.arange(i * BATCH, i * BATCH + 2) for i in range(batches)])
    a.step(lambda: backward(model, x[mine], y[mine]), lambda: backward(model, x[part], y[part]))
    b.step(lambda: backward(alone, x, y), lambda: backward(alone, x[all_parts], y[all_parts]))
    assert_close(map(whole, model.parameters()), alone.parameters())


def check_kinds():
    """That the cases are what they are meant to be."""
    model, _, _ = spread(Net().double(), "fsdp")
    assert {p.to_local().numel() for p in model.head.parameters()} == ({0} if dist.get_rank() == 3 else {16, 1})
    model, _, _ = spread(Net().double(), "tensor parallel")
    assert not isinstance(model.gain, DTensor)
    backward(model, *data(1, 0))
    assert model.norm.weight.grad.placements == (Partial(),) != model.norm.weight.placements
    model, _, _ = spread(Net().double(), "copies of shards")
    assert model.embed.weight.placements == (Replicate(), Shard(0))
    backward(model, *data(1, 0))
    with pytest.raises(TypeError, match="DTensors"):
        mup2.seen_perturbation(mup2.SAM(model.parameters()))


def check_not_finite(SAM, **kwargs):
    """In one process's part of one gradient only: all skip, nobody's weights change, and training goes on."""
    model, alone, a, b, batches, mine = pair(SAM, **kwargs)
    train(model, a, batches, mine, [0])
    for broken in (1, 2) if kwargs else (1,):
        x, y = data(batches, 1)
        before = parts(model)
        for number in (1, 2):
            backward(model, x[mine], y[mine])
            if number == broken and dist.get_rank() == 1:
                model.up.weight.grad.to_local()[0, 0] = torch.nan
            if number == 1:
                a.first_step()
                assert equal(parts(model), before) == (broken == 1)
        a.second_step()
        assert equal(parts(model), before) and a.skipped_steps == broken
    train(alone, b, batches, slice(None), [0, 2])
    train(model, a, batches, mine, [2])
    assert_close(map(whole, model.parameters()), alone.parameters())


def check_forward_alone(SAM):
    """Passes without backward, before the first step and at w + e, see the weights that are there."""
    model, alone, a, b, batches, mine = pair(SAM)
    x, y = data(batches, 0)
    losses = []
    for opt, m, batch in ((a, model, (x[mine], y[mine])), (b, alone, (x, y))):
        loss = partial(nn.functional.cross_entropy, target=y)
        backward(m, *batch)
        with torch.no_grad():
            seen = [loss(m(x))]
        with opt.perturbed(), torch.no_grad():
            seen.append(loss(m(x)))
        seen.append(loss(m(x)).detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(*losses)
    assert losses[0][1] > losses[0][0] == losses[0][2]


def check_nothing_here(SAM, base):
    """Only the first process has anything of the one tensor; all skip and count the same."""
    torch.manual_seed(0)
    alone = nn.Linear(5, 1, bias=False).double()
    model = fully_shard(copy.deepcopy(alone), mesh=init_device_mesh("cpu", (4,)))
    optimizers = [SAM(m.parameters(), base, lr=0.1, rho=0.2, skip_nonfinite=True) for m in (model, alone)]
    x = torch.randn(4, 8, 5).double()
    x[1, 0, 0] = torch.nan
    for opt, m in zip(optimizers, (model, alone)):
        for batch in (*x, x[1]):
            for number in (1, 2):
                m.zero_grad()
                (m(batch) ** 2).mean().backward()
                if number == 1:
                    opt.first_step()
            opt.second_step()
        assert opt.skipped_steps == 2
    assert_close(map(whole, model.parameters()), alone.parameters())


def check_scaler(SAM):
    """An overflow in one process's part: the scaler tells all, which restore, skip, and halve the scale."""
    model, alone, a, b, batches, mine = pair(SAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflow in (False, True, False):
        x, y = data(batches, 0)
        before = parts(model)
        for number in (1, 2):
            model.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x[mine]), y[mine])).backward()
            if number == 1:
                a.first_step()
        if overflow and dist.get_rank() == 1:
            model.up.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(a)
        scaler.update()
        assert equal(parts(model), before) == overflow
    assert scaler.get_scale() == 2.0**9 and a.skipped_steps == 1
    train(alone, b, batches, slice(None), [0, 0])
    assert_close(map(whole, model.parameters()), alone.parameters())


def check_spread_parameters(backend):
    SAM = partial(mup2.SAM, backend=backend)
    unused = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("climb", "descend")}
    with mock.patch.multiple(torch_passes, **unused) if backend == "compiled" else contextlib.nullcontext():
        for variant in ("sam", "elementwise", "layerwise"):
            check_steps(SAM, "fsdp", torch.optim.SGD, variant)
        for how in ("copies of shards", "tensor parallel", "fsdp of tensor parallel"):
            check_steps(SAM, how, torch.optim.SGD, "layerwise")
            if backend == "compiled":  # whose update, too, is not torch's own
                check_steps(SAM, how, torch.optim.AdamW, "elementwise")
        check_forward_alone(SAM)
        check_cheaper_steps(SAM)
        for base in (torch.optim.SGD, torch.optim.AdamW):
            check_nothing_here(SAM, base)
        check_not_finite(SAM)
        check_not_finite(SAM, skip_nonfinite=True)
        check_scaler(SAM)


def check_recipe(folder):
    """The one in docs/training.md: the factors of the whole tensors, and a checkpoint that can be read."""
    torch.manual_seed(0)
    model, base = mup2.MLP(5, 32, 3), mup2.MLP(5, 8, 3)
    expected = mup2.param_groups(model, base, lr=0.1, rho=0.1)
    x, y = (t[dist.get_rank() :: 4] for t in data(4, 0))
    names = dict(torch=torch, mup2=mup2, model=model, base=base, folder=folder / "recipe")
    names["closure"] = lambda: backward(model, x.float(), y)
    exec(block("docs/training.md", "fully_shard("), names)
    got = [(g["lr"], g["rho"], g["gradnorm_scaling"]) for g in names["opt"].param_groups]
    assert got == [(g["lr"], g["rho"], g["gradnorm_scaling"]) for g in expected]
    assert all(isinstance(state["momentum_buffer"], DTensor) for state in names["opt"].state.values())
    assert (folder / "recipe" / ".metadata").exists()


WAYS = {torch.optim.SGD: dict(interval=3), torch.optim.AdamW: dict(ascent="momentum")}
CHECKPOINTS = [(backend, base) for backend in ("torch", "compiled") for base in (torch.optim.SGD, torch.optim.AdamW)]


def save(folder):
    for backend, base in CHECKPOINTS:
        model, _, opt, *_ = pair(partial(mup2.SAM, backend=backend), base=base, **WAYS[base])
        train(model, opt, 1, slice(None), range(STEPS))  # one batch for all, whatever the number of processes
        saved, state = get_state_dict(model, opt)
        dcp.save({"model": saved, "optimizer": state}, checkpoint_id=folder / f"{backend}-{base.__name__}")
        backward(model, *data(1, 0))
        with opt.perturbed(), pytest.raises(RuntimeError, match="weights are perturbed"):
            get_state_dict(model, opt)


def load(folder, group):
    """What the other backend saved, read by the processes of a group: training goes on as if never interrupted."""
    for backend, base in CHECKPOINTS:
        torch.manual_seed(0)
        alone = Net().double()
        model = fsdp(copy.deepcopy(alone), DeviceMesh.from_group(group, "cpu"))
        kwargs = dict(lr=0.1, rho=0.2) | ({"momentum": 0.9} if base is torch.optim.SGD else {})
        kwargs |= WAYS[base]
        opt, expected = (mup2.SAM(m.parameters(), base, backend=backend, **kwargs) for m in (model, alone))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        saved, state = get_state_dict(model, opt)
        other = "torch" if backend == "compiled" else "compiled"
        path = folder / f"{other}-{base.__name__}"
        dcp.load({"model": saved, "optimizer": state}, checkpoint_id=path, process_group=group)
        set_state_dict(model, opt, model_state_dict=saved, optim_state_dict=state)
        train(alone, expected, 1, slice(None), range(STEPS))
        assert_close(map(whole, model.parameters()), alone.parameters())
        train(alone, expected, 1, slice(None), range(STEPS, 2 * STEPS))
        train(model, opt, 1, slice(None), range(STEPS, 2 * STEPS))
        assert_close(map(whole, model.parameters()), alone.parameters())
        assert opt.param_groups[0]["rho"] == 0.2 and opt.param_groups is opt.base_optimizer.param_groups


def check_checkpoints(folder):
    check_recipe(folder)
    save(folder)
    groups = [dist.new_group([0, 1, 2]), dist.new_group([3])]
    load(folder, groups[dist.get_rank() == 3])


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=4)
    check_kinds()
    for backend in ("torch", "compiled"):
        check_data_parallel(backend)
        check_spread_parameters(backend)
    check_checkpoints(folder)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # in torch 2.11 gloo's threads outlive their group where checkpoints were read, and abort at exit


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Forking shares the seconds that importing takes.
    torch.multiprocessing.start_processes(run, (Path(sys.argv[1]),), nprocs=4, start_method="fork")

"""Run by tests/test_loops.py under torch.distributed.run: SAM with parameters that are spread over processes.

`save FOLDER` in four processes compares every way of spreading with one process that has the same data, and saves two
checkpoints; `load FOLDER` in another number of processes goes on from them. Ends with 0 if all assertions hold.
"""

import copy
import os
import re
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # before the process group: imported later, it keeps gloo's threads alive at exit
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mup2_fused
import mup2_ref

BATCH, STEPS = 8, 3


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


def spread(model, how):
    """(the model over all processes, number of different batches, which of them is this process's)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if how == "tensor parallel":
        return tensor_parallel(model, init_device_mesh("cpu", (world,))), 1, 0
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if how == "fsdp of tensor parallel":
        tensor_parallel(model, mesh["inner"])
        mesh = mesh["outer"]
        world, rank = 2, mesh.get_local_rank()
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    # With a mesh of two dimensions, copies of what is sharded.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True), world, rank


def backward(model, x, y):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def part(t):
    return t.to_local() if isinstance(t, DTensor) else t


def parts(model):
    return [part(p.detach()).clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


def pair(SAM, how="fsdp", base=torch.optim.SGD, **kwargs):
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


def assert_close(model, alone):
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-9, atol=1e-12)


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
    assert_close(model, alone)
    assert addresses == [part(p).data_ptr() for p in model.parameters()]
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        for key, value in a.state[p].items():
            assert key == "step" or isinstance(value, DTensor) == isinstance(p, DTensor), key
            torch.testing.assert_close(whole(value), b.state[q][key], rtol=1e-9, atol=1e-12)


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
    assert_close(model, alone)


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
    model = fully_shard(copy.deepcopy(alone), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
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
    assert_close(model, alone)


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
    assert_close(model, alone)


def check(SAM):
    for variant in ("sam", "elementwise", "layerwise"):
        check_steps(SAM, "fsdp", torch.optim.SGD, variant)
    for how in ("copies of shards", "tensor parallel", "fsdp of tensor parallel"):
        check_steps(SAM, how, torch.optim.SGD, "layerwise")
        check_steps(SAM, how, torch.optim.AdamW, "elementwise")
    check_forward_alone(SAM)
    for base in (torch.optim.SGD, torch.optim.AdamW):
        check_nothing_here(SAM, base)
    check_not_finite(SAM)
    check_not_finite(SAM, skip_nonfinite=True)
    check_scaler(SAM)


def check_recipe(folder):
    """The README's, for both optimizers: on the same weights the same state, and a checkpoint that can be read."""
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (recipe,) = (code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fully_shard(" in code)
    for fused in (mup2_ref, mup2_fused):
        torch.manual_seed(0)
        model, base = mup2_ref.MLP(5, 32, 3), mup2_ref.MLP(5, 8, 3)
        expected = mup2_ref.param_groups(model, base, lr=0.1, rho=0.1)
        x, y = (t[dist.get_rank() :: 4] for t in data(4, 0))
        names = dict(
            torch=torch, mup2=mup2_ref, mup2_fused=fused, model=model, base=base, folder=folder / fused.__name__
        )
        names["closure"] = lambda: backward(model, x.float(), y)
        exec(recipe, names)
        got = [(g["lr"], g["rho"], g["gradnorm_scaling"]) for g in names["opt"].param_groups]
        assert got == [(g["lr"], g["rho"], g["gradnorm_scaling"]) for g in expected]
        assert all(isinstance(state["momentum_buffer"], DTensor) for state in names["opt"].state.values())
        assert (folder / fused.__name__ / ".metadata").exists()


CHECKPOINTS = [(torch.optim.SGD, "sgd"), (torch.optim.AdamW, "adamw")]


def save(folder):
    for SAM in (mup2_ref.SAM, mup2_fused.SAM):
        for base, name in CHECKPOINTS:
            model, _, opt, *_ = pair(SAM, base=base)
            train(model, opt, 1, slice(None), range(STEPS))  # one batch, whatever the number of processes
            weights, state = get_state_dict(model, opt)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{SAM.__module__}-{name}")
            x, y = data(1, 0)
            backward(model, x, y)
            opt.first_step()
            try:
                get_state_dict(model, opt)
                raise AssertionError("a checkpoint of perturbed weights")
            except RuntimeError as error:
                assert "weights are perturbed" in str(error)
            opt.restore()


def load(folder):
    """What was saved, into a new model and optimizer; then on, as if never interrupted. Either can read the other's."""
    for SAM in (mup2_ref.SAM, mup2_fused.SAM):
        for other in (mup2_ref.SAM, mup2_fused.SAM):
            for base, name in CHECKPOINTS:
                model, alone, opt, expected, _, _ = pair(SAM, base=base)
                with torch.no_grad():
                    for p in model.parameters():
                        p.zero_()
                weights, state = get_state_dict(model, opt)
                dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{other.__module__}-{name}")
                set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)
                train(alone, expected, 1, slice(None), range(STEPS))
                assert_close(model, alone)
                train(alone, expected, 1, slice(None), range(STEPS, 2 * STEPS))
                train(model, opt, 1, slice(None), range(STEPS, 2 * STEPS))
                assert_close(model, alone)
                assert opt.param_groups[0]["rho"] == 0.2 and opt.param_groups is opt.base_optimizer.param_groups


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if command == "save":
        check_kinds()
        check_recipe(folder)
        check(mup2_ref.SAM)
        unused = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("_climb", "_descend")}
        with mock.patch.multiple(mup2_ref.SAM, **unused):
            check(mup2_fused.SAM)
        save(folder)
    else:
        load(folder)
    dist.destroy_process_group()
    os._exit(0)  # in torch 2.11 gloo's threads outlive their group where checkpoints were read, and abort at exit

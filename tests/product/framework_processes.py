"""Run by test_frameworks.py with an empty folder: the recipes in two processes, against one process.

Ends with 0 if all assertions hold in both.
"""

import os
import sys

import torch
import torch._dynamo  # before the process group: imported later, it keeps gloo's threads alive at exit
import torch.distributed as dist
from ddp_processes import same_everywhere
from small_problems import assert_close
from test_frameworks import (
    ACCELERATE,
    CLASS,
    EPOCHS,
    PIECES,
    execute,
    fresh_accelerator,
    names,
    plain,
    trainer,
    weights,
)
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

BATCH = 40  # in one process; half of it in each of two


def problem():
    """In float64, where two halves are the whole up to rounding, and whose samples are the halves' in turn."""
    space = names()
    space["model"].double()
    x, y = space["loader"].dataset.tensors
    space["samples"] = TensorDataset(x.repeat(2, 1).double(), y.repeat(2).roll(1))
    return space


def expected(**kwargs):
    """The plain loop in this process, on the joined batches."""
    space = problem()
    space["loader"] = DataLoader(space["samples"], BATCH)
    return plain(space, **kwargs)[0]


def check(space, reference):
    assert same_everywhere(space["model"].parameters())
    assert not torch.equal(reference[0], weights(problem())[0])
    assert_close(weights(space), reference)


def check_lightning(kind, pieces, clip):
    """Samples go to the processes in turn; Lightning's own sampler would shuffle them."""
    space = problem()
    loader = DataLoader(space["samples"], BATCH // 2, sampler=DistributedSampler(space["samples"], shuffle=False))
    execute(CLASS + PIECES.replace("split(32)", f"split({pieces})"), space)
    lit = space[kind](space["model"], space["groups"])
    trainer(devices=2, strategy="ddp", use_distributed_sampler=False).fit(lit, loader)
    assert lit.trainer.world_size == 2 and lit.trainer.global_step == EPOCHS * 2
    check(space, expected(clip=1.0 if clip else None))


def check_accelerate():
    """Accelerate deals batches to processes in turn; its scheduler steps once per process."""
    fresh_accelerator()
    space = problem()
    space["loader"] = DataLoader(space["samples"], BATCH // 2)
    execute(ACCELERATE.replace("Accelerator()", "Accelerator(cpu=True)"), space)
    assert space["accelerator"].num_processes == 2 and hasattr(space["model"], "no_sync")
    check(space, expected(epochs=1, every="batch", steps=2, T_max=4, clip=1.0))


def run(rank, folder):
    """What torch.distributed.run would set up, but after the imports."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 0}
    os.environ |= {key: str(value) for key, value in launched.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=2)
    check_lightning("Lit", pieces=32, clip=False)
    check_lightning("LitPieces", pieces=8, clip=True)
    check_accelerate()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.multiprocessing.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")

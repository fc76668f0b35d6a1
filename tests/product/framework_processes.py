"""Run by test_frameworks.py with an empty folder: the recipes in two processes, against one process.

Ends with 0 if all assertions hold in both.
"""

from functools import partial

import torch
from ddp_processes import launch, same_everywhere
from small_problems import assert_close
from test_frameworks import ACCELERATE, CLASS, EPOCHS, PIECES, execute, names, new_accelerator, plain, trainer, weights
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


def check_lightning(_, kind="Lit", pieces=32, clip=None):
    """Samples go to the processes in turn; Lightning's own sampler would shuffle them."""
    space = problem()
    loader = DataLoader(space["samples"], BATCH // 2, sampler=DistributedSampler(space["samples"], shuffle=False))
    execute(CLASS + PIECES.replace("split(32)", f"split({pieces})"), space)
    lit = space[kind](space["model"], space["groups"])
    trainer(devices=2, strategy="ddp", use_distributed_sampler=False).fit(lit, loader)
    assert lit.trainer.world_size == 2 and lit.trainer.global_step == EPOCHS * 2
    check(space, expected(clip=clip))


def check_accelerate(_):
    """Accelerate deals batches to processes in turn; its scheduler steps once per process."""
    new_accelerator()
    space = problem()
    space["loader"] = DataLoader(space["samples"], BATCH // 2)
    execute(ACCELERATE.replace("Accelerator()", "Accelerator(cpu=True)"), space)
    assert space["accelerator"].num_processes == 2 and hasattr(space["model"], "no_sync")
    check(space, expected(epochs=1, every="batch", steps=2, T_max=4, clip=1.0))


if __name__ == "__main__":
    launch(check_lightning, partial(check_lightning, kind="LitPieces", pieces=8, clip=1.0), check_accelerate)

"""Run by test_huggingface.py with an empty folder: SAMTrainer in two processes, against one on the joined batches.

Ends with 0 if all assertions hold in both.
"""

from functools import partial

from accelerate.state import AcceleratorState
from ddp_processes import launch, same_everywhere
from huggingface_problems import BASE, WAYS, SAMTrainer, config, llama, plain, samples, trainer_of
from small_problems import assert_close, weights


class Noting(SAMTrainer):
    """Whether each pass over a micro-batch exchanged gradients."""

    exchanged: list

    def compute_loss(self, model, *args, **kwargs):
        self.exchanged.append(model.require_backward_grad_sync)
        return super().compute_loss(model, *args, **kwargs)


def check(way, folder):
    """Each update takes 2 micro-batches in each process, and 4 in one; the last one of an epoch takes 1, and 2."""
    options = dict(base=config(BASE), rho=0.1, sam=way)
    data = samples(llama(), 24)
    arguments = dict(gradient_accumulation_steps=2, max_grad_norm=0.1, ddp_find_unused_parameters=False)
    trainer = trainer_of(llama().double(), folder, options, Noting, data, **arguments)
    trainer.exchanged = []
    trainer.train()
    expected, _, _ = plain(llama().double(), way, clip=0.1, data=data)
    assert trainer.args.world_size == 2 and same_everywhere(trainer.model.parameters())
    assert_close(weights(trainer.model), expected, rtol=1e-6, atol=1e-8)
    one = [False, True, True] * 2  # an epoch, each pass
    two = [False, True, False, True, True, True] * 2
    assert trainer.exchanged == {0: two, 1: two[:4] + [True] + two[:4] + [True], 2: one}[WAYS.index(way)]


def check_refused(folder):
    """A model that is sharded."""
    AcceleratorState._reset_state(True)  # which all trainers of a process share
    try:
        trainer_of(llama(), folder, fsdp=True)
    except ValueError as error:
        assert "FSDP1 and DeepSpeed flatten" in str(error)
    else:
        raise AssertionError("FSDP is not refused")


if __name__ == "__main__":
    launch(*(partial(check, way) for way in WAYS), check_refused)

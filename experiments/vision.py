"""Table 2 of the paper, one run at a time: ResNet-18 and ViT with SAM, in the standard parameterization or in muP².

    python -m experiments.vision --preset resnet18-digits                                 seconds per epoch on a CPU
    python -m experiments.vision --preset resnet18-cifar10 --root DIR --width-multiplier 4   DIR has CIFAR's archive
    torchrun --nproc_per_node 8 -m experiments.vision --preset vit-s16-imagenet --root DIR   DIR has train/ and val/

A preset sets defaults, every flag overrides one. The folder OUT/NAME of a run, NAME being made of its settings, gets
config.json, metrics.csv and checkpoint.pt (after every epoch), events for TensorBoard, and in the end result.json.
The same command goes on after the last whole epoch, with the same bits as if it had never stopped (on a GPU, or with
more than two processes, as far as sums are taken in the same order); when the run is finished it only prints the
result. Random streams depend on the seed, the epoch, the process and its workers, so that --workers and the number of
processes are settings too.

The batch is divided over the processes of torchrun; each normalizes its own part (no synchronized batch norm), and
the running statistics of the first one count. Every process reads --root and --out.
"""

import argparse
import contextlib
import gc
import os
from typing import Any

import torch.distributed as dist

from experiments import data
from experiments.commands import RANK, SettingsError, command, locked, start
from experiments.presets import parse_args, run_folder
from experiments.training import check_device, is_cuda
from experiments.vision_run import finished, train


def start_processes(args: argparse.Namespace) -> None:
    """Join the other processes of torchrun, each with its GPU."""
    # DDP imports this module. If DDP were the first to import it, threads of the process group would run until the
    # interpreter ends, which may abort the process when all is done ("terminate called without an active exception").
    import torch._dynamo

    if is_cuda(args.device):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if args.batch_size % dist.get_world_size():
        raise SettingsError(f"--batch-size {args.batch_size} cannot be divided over {dist.get_world_size()} processes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The result of the run, which is trained first if it is not finished."""
    check_device(args.device)
    if "RANK" in os.environ:
        start_processes(args)
    result = finished(args)
    if result is None:
        images = data.images(args.data, args.root)
        with contextlib.nullcontext() if RANK else locked(run_folder(args) / "lock"):
            result = train(args, images)
    return result


@command("the same command goes on after the last epoch that was finished")
def train_and_print(argv: list[str] | None) -> int:
    args = parse_args(argv, __doc__)
    result, folder = run(args), run_folder(args)
    if RANK == 0:
        text = "best test accuracy {best_test_accuracy:.2f} %, last {last_test_accuracy:.2f} %".format(**result)
        state = f"diverged in epoch {result['epochs']}; " if result["diverged"] else ""
        print(f"{state}{text}, {result['seconds_per_epoch']:.1f} s per epoch; files in {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return train_and_print(argv)
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP holds the group, in cycles
            dist.destroy_process_group()


if __name__ == "__main__":
    start(main)

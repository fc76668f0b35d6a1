"""Run by test_processes.py with a folder for checkpoints: everything that takes processes, in four of them.

Ends with 0 if all assertions hold in every process.
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # before the process group: imported later, it keeps gloo's threads alive at exit
import torch.distributed as dist
from ddp_processes import check_data_parallel
from spread_processes import check_checkpoints, check_kinds, check_seen_perturbation, check_spread_parameters


def run(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=4)
    check_kinds()
    check_seen_perturbation()
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

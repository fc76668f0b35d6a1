"""Parameters that are spread over processes: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Groups = list[dict[str, Any]]


def is_spread(t: Any) -> bool:
    """Whether t is a DTensor. Importing DTensor's class to ask for it would take long."""
    return hasattr(t, "placements")


def whole(t: Any) -> Tensor:
    """The sum, norm or tensor over all processes; a plain tensor itself."""
    return t.full_tensor() if is_spread(t) else t


@torch.no_grad()
def place_gradients(groups: Groups) -> None:
    """Spread each gradient as its parameter is spread: tensor parallelism leaves partial sums and copies."""
    for p in [p for group in groups for p in group["params"] if p.grad is not None]:
        if getattr(p.grad, "placements", None) != getattr(p, "placements", None):
            p.grad = p.grad.redistribute(placements=p.placements)


class Meshes(dict[tuple[Any, int], set[Tensor]]):
    """(device mesh, dimension) -> the parameters that are split along that dimension. Plain tensors have no mesh."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.indices: dict[tuple[Any, ...], Tensor] = {}
        for p in [p for group in groups for p in group["params"] if is_spread(p)]:
            for dimension, placement in enumerate(p.placements):
                split = self.setdefault((p.device_mesh, dimension), set())
                if not placement.is_replicate():
                    split.add(p)

    def reduce(self, perturbed: list[Tensor], process_group: Any, sums: Tensor, rows: list[int]) -> None:
        """Add the other processes' parts, in place. sums[i] belongs to perturbed[rows[i]].

        All sums become NaN if they are not finite in one process of process_group, whose processes keep their own sums.
        """
        for (mesh, dimension), split in self.items():
            where = tuple(i for i, row in enumerate(rows) if perturbed[row] in split)
            if len(where) == len(rows):
                dist.all_reduce(sums, group=mesh.get_group(dimension))
            elif where:
                key = (sums.device, *where)
                if key not in self.indices:  # kept, as copying it to a GPU waits and cannot be captured in a graph
                    self.indices[key] = torch.tensor(where, device=sums.device)
                part = sums[self.indices[key]]
                dist.all_reduce(part, group=mesh.get_group(dimension))
                sums.index_copy_(0, self.indices[key], part)
        if process_group is not None:
            sums.masked_fill_(in_any_process(~sums.isfinite().all(), process_group), torch.nan)

    def share(self, flag: Tensor) -> None:
        """Set the flag in every process if one of those with parts of the same tensors has set it."""
        for mesh, dimension in self:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.get_group(dimension))


def in_any_process(flag: Tensor, process_group: Any) -> Tensor:
    """Whether the flag is True in one of the group's processes, as a tensor on the flag's device."""
    number = flag.int()
    dist.all_reduce(number, dist.ReduceOp.MAX, group=process_group)
    return number.bool()

"""The fused twin of mup2_ref.SAM: the same optimizer in three passes over memory, on the CPU and on CUDA.

    norm              joint norm and every tensor's coefficient
    backup + perturb  w~ = w + c T² g
    restore + update  w back, and SGD's or Adam's step from it

mup2_ref.py explains the method and is the specification; here only its tensor functions are replaced. Operators for
torch.compile are in torch.ops.mup2.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

import mup2_ref

try:
    from mup2_fused import _C
except ImportError as error:
    raise ImportError(
        "the compiled part of mup2_fused is missing or does not fit this torch "
        f"({torch.__version__}): {error}. Build it with `python setup.py build_ext --inplace` in the source folder, or "
        "`pip install --no-build-isolation .`; mup2_ref.SAM needs no compiler."
    ) from error

__all__ = ["SAM", "capture"]

built_with_cuda: bool = _C.cuda
instruction_set: str = _C.instruction_set  # of the CPU kernels; MUP2_CPU=baseline, avx2 or avx512 chooses


class SAM(mup2_ref.SAM):
    """Drop-in for mup2_ref.SAM: same arguments, groups, methods, errors and state_dict. See there.

    Restoring and updating are one pass for torch.optim.SGD, Adam and AdamW (without amsgrad, without hooks on the base
    optimizer); any other base optimizer steps by itself after a restoring pass. Parameters are float32, float64,
    bfloat16 or float16, on CPUs and GPUs, with gradients of the same type or float32.

    On a GPU nothing waits for the host: a gradient that is not finite sets a flag there, which skipped_steps reads.
    (With a base optimizer of the other kind, one flag is read per step.) Work goes to the stream that is current
    in each call; calls of one optimizer on several streams must be ordered by the caller. Backups stay allocated from
    step to step: one copy of the perturbed weights.
    """

    if not TYPE_CHECKING:  # for which it has the reference's arguments

        def __init__(self, *args, **kwargs):
            self._start()
            super().__init__(*args, **kwargs)
            self._copied_finite = None

    def _start(self) -> None:
        self._plan = _C.Plan()
        self._copied_finite: bool | None = None  # of an optimizer that was copied between the passes
        self._skipped_before = 0

    @property
    def _finite(self) -> bool:
        return self._plan.finite() if self._copied_finite is None else self._copied_finite

    @_finite.setter
    def _finite(self, value: bool) -> None:
        self._copied_finite = value

    @property
    def skipped_steps(self) -> int:
        return self._skipped_before + self._plan.skipped()

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._skipped_before = value - self._plan.skipped()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._find_meshes()

    def _find_meshes(self) -> None:
        """(mesh, dimension) -> the parameters of which each process along it has a part. Only DTensors have meshes."""
        self._meshes: dict[tuple[Any, int], set[Tensor]] = {}
        self._indices: dict[tuple[Any, ...], Tensor] = {}
        for p in [p for group in self.param_groups for p in group["params"]]:
            for dimension, placement in enumerate(getattr(p, "placements", ())):
                parts = self._meshes.setdefault((p.device_mesh, dimension), set())
                if not placement.is_replicate():
                    parts.add(p)

    def _reduce(self, process_group: Any, sums: Tensor, rows: list[int]) -> None:
        """Add to each perturbed tensor's sums those of its other parts; NaN if one process of the group has one."""
        perturbed = [p for p, _ in self._perturbed()]
        for (mesh, dimension), parts in self._meshes.items():
            where = tuple(i for i, row in enumerate(rows) if perturbed[row] in parts)
            if len(where) == len(rows):
                dist.all_reduce(sums, group=mesh.get_group(dimension))
            elif where:
                key = (sums.device, *where)
                if key not in self._indices:  # kept: copying it to a GPU waits, and cannot be captured in a graph
                    self._indices[key] = torch.tensor(where, device=sums.device)
                part = sums[self._indices[key]]
                dist.all_reduce(part, group=mesh.get_group(dimension))
                sums.index_copy_(0, self._indices[key], part)
        if process_group is not None:
            flag = sums.isfinite().all().logical_not().int()
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=process_group)
            sums.masked_fill_(flag.bool(), torch.nan)

    def _share(self, flag: Tensor) -> None:
        """Set the flag where another process with parts of these tensors has set it."""
        for mesh, dimension in self._meshes:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.get_group(dimension))

    def _climb(self, process_group: Any) -> None:
        self._copied_finite = None
        if self._meshes:
            self._place_gradients()
        reduce, fused = None, True
        if self._meshes or process_group is not None:
            reduce = partial(self._reduce, process_group)
            fused = any(p.numel() for p, _ in self._perturbed())  # or nothing would be reduced in this process
        if fused:
            try:  # as in _restored_on_error(), which would take a microsecond of every step
                fused = self._plan.climb(self, reduce)
            except BaseException:
                self.restore()
                raise
        if not fused:  # parameters share memory, or something is wrong with a gradient
            super()._climb(process_group)

    @mup2_ref._uncompiled
    def restore(self) -> None:
        if self._backup is not None:
            self._plan.restore(self._backup)
            self._backup = None

    def _descend(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        method, share = self._fused_method(), None
        if self._meshes:
            self._place_gradients()
            share = self._share
        arguments = (self._create_state, scale, found_inf, self.skip_nonfinite, share)
        if not (method and self._plan.descend(self, method, *arguments)):
            super()._descend(scale, found_inf)

    def _fused_method(self) -> str | None:
        """The kernel that does what base_optimizer.step() would, if there is one and the flag is on the device."""
        return self._has_kernel() if self._copied_finite is None else None

    def _has_kernel(self) -> str | None:
        base = self.base_optimizer
        if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks or "step" in vars(base):
            return None
        return {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}.get(type(base))

    def _create_state(self, p: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """What the base optimizer's first step would put into state[p], at zero."""
        for key in keys:
            like_p = torch.zeros_like(p, memory_format=torch.preserve_format)
            self.state[p][key] = torch.zeros((), device=p.device) if key == "step" else like_p
        return self.state[p]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # Step counts live on the device here; torch keeps them on the host unless these options are set.
        for group in state["param_groups"]:
            if not (group.get("capturable") or group.get("fused")):
                for i in group["params"]:
                    own = state["state"].get(i, {})
                    if torch.is_tensor(own.get("step")):
                        state["state"][i] = own | {"step": own["step"].cpu()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # a copy, not load_state_dict
            self._start()
        super().__setstate__(state)
        self._find_meshes()
        for name in ("skipped_steps", "_finite"):  # properties here
            if name in self.__dict__:
                setattr(self, name, self.__dict__.pop(name))


# What torch.compile needs to know of the operators: shapes of results; the others change their arguments only.
@torch.library.register_fake("mup2::joint_norm")
def _(
    w: list[Tensor], g: list[Tensor], rho: list[float], gradnorm_scaling: list[float], variant: str
) -> tuple[Tensor, ...]:
    each = w[0].new_empty(len(w), dtype=torch.float64)
    return each.new_empty(()), each, torch.empty_like(each), w[0].new_empty(1, dtype=torch.int32)


for _name in ("perturb_", "restore_", "sgd_", "adam_"):
    torch.library.register_fake(f"mup2::{_name}", lambda *args, **kwargs: None)


from mup2_fused.graph import capture  # which needs SAM

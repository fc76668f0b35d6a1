"""A SAM step (climb, restore, descend) by the compiled kernels, on CPU and CUDA: three passes over memory.

    norm              the joint norm and each tensor's coefficient
    backup + perturb  w <- w + c T² g
    restore + update  w is restored, then updated by SGD or Adam

This is the only module that imports the compiled part. It also tells torch.compile about the operators in
torch.ops.mup2.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mup2_fused import torch_passes
from mup2_fused.sharded import Groups, Meshes, is_spread, place_gradients
from mup2_fused.torch_passes import Moments, Passes, Phase
from mup2_ref import known

try:
    from mup2_fused import _C

    missing = ""
except ImportError as error:
    if "MUP2_CPU" in str(error):
        raise  # the environment asks for kernels that do not exist
    absent = isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error)
    state = "is not built" if absent else f"does not fit this torch ({torch.__version__}): {error}"
    missing = f"the compiled part of mup2_fused {state}. " + (
        "Build it: `python setup.py build_ext --inplace` in the source folder, or `pip install --no-build-isolation .`"
        if sys.platform == "linux"
        else f"It is for Linux, and this is {sys.platform}"
    )

compiled: bool = not missing
built_with_cuda: bool = compiled and _C.cuda
instruction_set: str | None = _C.instruction_set if compiled else None  # on the CPU; MUP2_CPU chooses another one
chunk: int = _C.chunk if compiled else 8192  # elements that a kernel takes at a time, for tests around that size

KERNELS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}


def obstacle(groups: Groups) -> str:
    """Why the kernels cannot serve these parameters, and what to do. Empty if they can.

    Frozen parameters need no kernel. Parameters on the meta device have no values yet; where the values will be is seen
    in the first step.
    """
    if not compiled:
        return missing
    for p in [p for group in groups for p in group["params"] if p.requires_grad or p.grad is not None]:
        if p.device.type == "cuda" and not built_with_cuda:
            return "mup2_fused was built without CUDA. Build it again where nvcc is found, with MUP2_CUDA=1"
        if p.device.type not in ("cpu", "cuda", "meta"):
            return f"there are kernels for the CPU and for CUDA, but not for {p.device.type}"
        if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"there are kernels for float32, float64, bfloat16 and float16, but not for {p.dtype}"
        if not is_spread(p) and not _C.is_dense(p):
            return f"the kernels cannot look inside a {type(p).__name__}"
    return ""


def kernel_of(base: torch.optim.Optimizer) -> str | None:
    """The kernel that does what base.step() does: "sgd", "adam" or "adamw".

    None for others, or if step() has hooks or is replaced.
    """
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    if "step" in vars(base) and torch_passes.has_own_step(base):
        return None
    return KERNELS.get(type(base))


class CompiledPasses:
    """The functions of torch_passes by kernels where there is one, and by torch_passes elsewhere.

    No kernel perturbs parameters that share memory, or by gradients that are sparse, complex, tensors that wrap others,
    or of another type than float32 and the parameter's. The update has kernels for SGD, Adam and AdamW, without amsgrad
    and without hooks on the base optimizer, if the state has the parameter's type. The host never waits for the GPU
    where the kernels do both; work goes to the current stream, and calls on several streams must be ordered by the
    caller. Backups stay allocated from step to step: one copy of the perturbed weights.
    """

    def __init__(self, groups: Groups) -> None:
        self.plan = _C.Plan()
        self.backups: list[tuple[Tensor, Tensor]] = []  # not in the plan: the garbage collector cannot look inside it
        self.meshes = Meshes(groups)

    def climb(
        self, phase: Phase, groups: Groups, variant: str, process_group: Any = None, moments: Moments = None
    ) -> None:
        """As torch_passes.climb. Whether the gradient is finite stays on the device."""
        reduce, phase.finite = None, None
        if groups and (self.meshes or process_group is not None):
            place_gradients(groups)
            perturbed = [p for p, _, _ in torch_passes.climbing(groups, moments)]
            reduce = partial(self.meshes.reduce, perturbed, process_group)
            # No kernel would call reduce, and other processes may wait for it. All have moments, or none.
            if not any(p.numel() for p in perturbed) and not moments:
                return torch_passes.climb(phase, groups, variant, process_group, moments)
        if moments and built_with_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self.plan.may_sum = False  # replays of a graph change moments, and torch does not count that
        backups = self.backups if groups else []  # the backups' memory is kept for the next climb
        state, moment = moments or (None, "")
        try:
            done = self.plan.climb(groups, phase, variant, reduce, backups, state, moment)
        except BaseException:
            self.restore(phase)
            raise
        if not done:
            self.backups = []
            torch_passes.climb(phase, groups, variant, process_group, moments)

    def restore(self, phase: Phase) -> None:
        """As torch_passes.restore."""
        if phase.backups is not None:
            self.plan.restore(phase.backups)
            phase.backups = None

    def descend(
        self,
        phase: Phase,
        base: torch.optim.Optimizer,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        skip_nonfinite: bool,
    ) -> None:
        """As torch_passes.descend, in one pass over memory."""
        groups, share = base.param_groups, None
        if self.meshes:
            place_gradients(groups)
            share = self.meshes.share
        # phase.finite is None: the kernels climbed, and left the flag on the device
        kernel = kernel_of(base) if phase.finite is None else None
        if kernel is not None:
            create = partial(create_state, base.state)
            options = (create, grad_scale, found_inf, skip_nonfinite, share)
            if self.plan.descend(groups, base.state, phase, kernel, *options):
                if "step" in vars(base):
                    torch_passes.note_step(base)
                return
        self.restore(phase)
        phase.finite = self.finite(phase)
        torch_passes.descend(phase, base, grad_scale, found_inf, skip_nonfinite)

    def finite(self, phase: Phase) -> bool:
        """Whether the gradient of the latest first_step() was finite. Waits for the GPU."""
        return self.plan.finite() if phase.finite is None else phase.finite

    def skipped(self, phase: Phase) -> int:
        """How many updates were skipped. Waits for the GPU."""
        return phase.skipped + self.plan.skipped()

    def memory(self) -> list[Tensor]:
        """What the kernels write to besides parameters, gradients and state. A captured graph must keep it alive."""
        return [w for _, w in self.backups] + self.plan.memory()

    def norms(self) -> tuple[float, list[float]]:
        """(joint norm, gradnorm_scaling ||T g|| of each perturbed tensor) of the latest first_step(), to look at."""
        return self.plan.norms()


def create_state(state: dict[Tensor, Any], p: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """state[p] with the entries that the base optimizer's first step would make, at zero."""
    for key in keys:
        like_p = torch.zeros_like(p, memory_format=torch.preserve_format)
        state[p][key] = torch.zeros((), device=p.device) if key == "step" else like_p
    return state[p]


def passes_for(groups: list[dict[str, Any]], backend: str) -> Passes:
    """The passes of this backend. RuntimeError if the kernels are asked for and cannot serve these parameters."""
    if known(backend, ("auto", "compiled", "torch")) == "torch":
        return torch_passes
    reason = obstacle(groups)
    if not reason:
        return CompiledPasses(groups)
    if backend == "compiled":
        raise RuntimeError(f"SAM(backend='compiled') cannot run: {reason}. backend='torch' runs without kernels")
    warn_once(reason)
    return torch_passes


def passes_with(passes: Passes, groups: Groups, backend: str) -> Passes:
    """The passes of an optimizer to which these groups were added: `passes`, if they can serve the new ones, too.

    RuntimeError as in passes_for(). Looks at the new groups only.
    """
    if not isinstance(passes, CompiledPasses):
        return passes
    new = passes_for(groups, backend)
    if not isinstance(new, CompiledPasses):
        return new
    for key, split in new.meshes.items():
        passes.meshes.setdefault(key, set()).update(split)
    return passes


@cache
def warn_once(reason: str) -> None:
    """Say once in a process that the kernels are not used."""
    warnings.warn(
        f"SAM runs in torch's operations, which take longer than the kernels: {reason}. SAM(backend='torch') avoids "
        "this warning",
        stacklevel=4,
    )


if compiled:  # torch.compile needs the shapes of results; all operators but one only change their arguments

    @torch.library.register_fake("mup2::joint_norm")
    def _(
        w: list[Tensor], g: list[Tensor], rho: list[float], gradnorm_scaling: list[float], variant: str
    ) -> tuple[Tensor, ...]:
        each = w[0].new_empty(len(w), dtype=torch.float64)
        return each.new_empty(()), each, torch.empty_like(each), w[0].new_empty(1, dtype=torch.int32)

    for _name in ("perturb_", "restore_", "sgd_", "adam_"):
        torch.library.register_fake(f"mup2::{_name}", lambda *args, **kwargs: None)

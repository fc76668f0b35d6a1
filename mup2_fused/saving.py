"""What a checkpoint, a copy and a pickle of SAM hold: all groups, and the base optimizer's state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import torch

from mup2_fused.arguments import SETTINGS, variant_of
from mup2_fused.compiled_passes import passes_for
from mup2_fused.guards import Guard
from mup2_fused.sharded import Groups
from mup2_fused.torch_passes import Passes, Phase

STEPS = "sam_steps"  # key of the first group: finished steps


class Saving(torch.optim.Optimizer):
    """The part of SAM that saves and loads."""

    base_optimizer: torch.optim.Optimizer
    variant: str
    interval: int
    backend: str
    phase: Phase
    passes: Passes
    guard: Guard
    skipped_steps: Any

    def require_restored(self, before: str) -> None:
        if self.phase.backups and self.passes.finite(self.phase):  # otherwise nothing was perturbed
            self.forget_scale()
            raise RuntimeError(f"weights are perturbed: call second_step() or restore() before {before}")

    def forget_scale(self) -> None:
        """Delete grad_scale and found_inf, which GradScaler.step sets for a step and leaves behind if it fails."""
        for name in ("grad_scale", "found_inf"):
            vars(self).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """All groups and the base optimizer's state, never a backup. RuntimeError between the passes."""
        self.require_restored("state_dict(), or a checkpoint would hold w + e")
        torchs = type(self.base_optimizer).state_dict is torch.optim.Optimizer.state_dict  # others may save more
        state = super().state_dict() if torchs else self.base_optimizer.state_dict()
        return saved(state, self.phase.steps if self.interval > 1 else None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a SAM, or of a bare base optimizer: rho then stays. RuntimeError between the passes."""
        self.require_restored("load_state_dict()")
        state_dict, steps = accepted(state_dict, self.param_groups, self.variant)
        if type(self.base_optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
            super().load_state_dict(state_dict)
        else:
            self.base_optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.phase.steps = steps

    def follow_base(self) -> None:
        """From here on base_optimizer.load_state_dict() loads for SAM, too. Settings that the state lacks stay."""
        this = ref(self)

        def adopt(base: torch.optim.Optimizer) -> None:
            if (sam := this()) and base is sam.base_optimizer:
                for mine, group in zip(sam.param_groups, base.param_groups):
                    group.pop(STEPS, None)
                    group |= {key: mine[key] for key in SETTINGS if key not in group} | {"variant": sam.variant}
                sam.param_groups, sam.state = base.param_groups, base.state

        self.base_optimizer.register_load_state_dict_post_hook(adopt)

    def settled(self) -> Phase:
        """The phase, with the kernels' finite flag and skip count read from the device. Waits for the GPU."""
        return replace(self.phase, finite=self.passes.finite(self.phase), skipped=self.skipped_steps)

    def __getstate__(self) -> dict[str, Any]:
        names = ["base_optimizer", "variant", "interval", "moment", "backend", "skip_nonfinite", "same_randomness"]
        return super().__getstate__() | {name: getattr(self, name) for name in names} | {"phase": self.settled()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        if "phase" in state:  # a copy; load_state_dict sets the state and the groups only
            self.passes, self.guard = passes_for(self.param_groups, self.backend), Guard(self)
            self.follow_base()


def saved(state_dict: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The state_dict with the number of steps, if there is an interval to count, and with step counts on the CPU.

    The kernels keep an entry "step" on the device, but torch without capturable expects it on the CPU.
    """
    if steps is not None:
        state_dict["param_groups"][0][STEPS] = steps
    for group in state_dict["param_groups"]:
        if group.get("capturable") or group.get("fused"):
            continue
        for i in group["params"]:
            entry = state_dict["state"].get(i, {})
            if torch.is_tensor(entry.get("step")):
                state_dict["state"][i] = entry | {"step": entry["step"].cpu()}
    return state_dict


def accepted(state_dict: dict[str, Any], groups: Groups, variant: str) -> tuple[dict[str, Any], int]:
    """The state_dict as torch loads it into these groups, and the number of steps.

    Settings that it lacks stay. ValueError if it was saved with another variant of SAM.
    """
    theirs = [dict(group) for group in state_dict["param_groups"]]
    steps = [group.pop(STEPS, 0) for group in theirs]
    if len(theirs) == len(groups):  # torch raises an error otherwise
        variants = [{"variant": variant_of([group], variant)} for group in theirs]
        theirs = [mine | saved | own for mine, saved, own in zip(groups, theirs, variants)]
    return state_dict | {"param_groups": theirs, "state": without_old_weights(state_dict["state"])}, max(steps)


def without_old_weights(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state without the copies of all weights that davda54/sam keeps there. A base would not begin its own state
    beside them."""
    return {
        key: {name: value for name, value in entry.items() if name != "old_p"} if isinstance(entry, dict) else entry
        for key, entry in state.items()
    }

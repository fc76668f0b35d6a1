"""Mistakes in the loop around SAM, which would train wrongly without an error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary, ref

from torch import Tensor

from mup2_fused.sharded import Groups

optimizers: WeakValueDictionary[int, Any] = WeakValueDictionary()  # every SAM of this process


class Guard:
    """What SAM remembers to notice such mistakes. Every warning is given once for each optimizer."""

    def __init__(self, optimizer: Any) -> None:
        optimizers[id(optimizer)] = optimizer
        self.rates: list[float | None] = []  # of the groups that param_groups() made, as they came
        self.latest_rate: Any = None  # of the first group, at the latest look
        self.gradients: list[tuple[Any, Any, int]] = []  # (parameter, reference to its first gradient, version)
        self.looks_left = 3  # at gradients
        self.warned: set[str] = set()
        self.add(optimizer.param_groups)

    def add(self, groups: Groups) -> None:
        """Remember the learning rates of groups that have come to the optimizer."""
        rates = [group.get("lr") if "role" in group else None for group in groups]
        self.rates += [rate if rate and is_number(rate) else None for rate in rates]

    def before_climb(self, optimizer: Any) -> None:
        """RuntimeError if another SAM has perturbed some of these weights, and would restore what it saw."""
        if len(optimizers) == 1:
            return
        others = [other() for other in optimizers.valuerefs()]
        backups = [b for other in others if other not in (None, optimizer) for b in other.phase.backups or ()]
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]} if backups else set()
        if any(id(p) in mine for p, _ in backups):
            raise RuntimeError("another SAM has perturbed these weights: call its second_step() or restore() first")

    def after_climb(self, groups: Groups) -> None:
        """Remember the first and the last gradient, in some steps: a loop that adds to them does so in every step."""
        if self.looks_left == 0:
            return
        self.looks_left -= 1
        params = [group["params"] for group in groups]
        ends = with_gradient(p for ps in params for p in ps), with_gradient(p for ps in params[::-1] for p in ps[::-1])
        self.gradients = [(p, ref(p.grad), p.grad._version) for p in ends if p is not None]

    def before_update(self, groups: Groups) -> None:
        """Warnings about gradients and learning rates. The usual case takes a fraction of a microsecond."""
        if self.gradients:
            self.compare_gradients()
        if groups[0].get("lr") is not self.latest_rate:
            self.compare_rates(groups)

    def compare_gradients(self) -> None:
        """Warn if the first gradients have been added to."""
        # Adding changes a tensor once. Setting it to zero before changes it twice, and setting it to None replaces it.
        now = [(p.grad, g(), version) for p, g, version in self.gradients]
        if now and all(g is first and g is not None and g._version == version + 1 for g, first, version in now):
            self.warn(
                "the second pass seems to have added its gradient to the first one: call opt.zero_grad() at the start "
                "of the closure, or first_step(zero_grad=True)"
            )
        self.gradients = []

    def compare_rates(self, groups: Groups) -> None:
        """Warn if the learning rates are no longer proportional to what they were."""
        self.latest_rate = groups[0].get("lr")
        rates = [(group["lr"], before) for group, before in zip(groups, self.rates) if before]
        factors = [now / before for now, before in rates if is_number(now)]
        if factors and max(factors) > 1e-6 and min(factors) < 0.99 * max(factors):  # tiny rates are rounded
            self.warn(
                "the learning rates of the groups are no longer in the proportions that param_groups() gave them. "
                "Schedulers with absolute rates cause this: give OneCycleLR, CyclicLR and SWALR one rate per group, "
                "such as max_lr=[group['lr'] for group in opt.param_groups], and leave eta_min and min_lr at 0"
            )

    def warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=outside())


def outside() -> int:
    """The stacklevel of the line that called this package, for warnings."""
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mup2_fused", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def is_number(x: Any) -> bool:
    """Not a tensor: looking at one would wait for the GPU."""
    return isinstance(x, (int, float))


def with_gradient(params: Iterable[Tensor]) -> Any:
    """The first of them that has a gradient, or None."""
    return next((p for p in params if p.grad is not None), None)

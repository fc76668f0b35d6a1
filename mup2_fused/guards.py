"""Mistakes in the loop around SAM, which would train wrongly without an error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import Tensor

from mup2_fused.arguments import check_momentum
from mup2_fused.sharded import Groups, is_spread

Seen = list[tuple[Any, Any, int]]  # (parameter, reference to its gradient, its version)
optimizers: dict[int, ref[Any]] = {}  # every SAM of this process, by its id


class Guard:
    """What SAM remembers to notice such mistakes. Every warning is given once for each optimizer."""

    def __init__(self, optimizer: Any) -> None:
        key = id(optimizer)
        optimizers[key] = ref(optimizer, lambda _: optimizers.pop(key, None))
        self.rates: dict[int, float] = {}  # id of a group's first parameter -> the lr with which param_groups() made it
        self.latest_rate: Any = None  # of the first group, at the latest look
        self.gradients: Seen = []  # the first pass's
        self.added = False  # whether the first pass added to gradients that were there before
        self.kept: list[KeptGradient] = []  # of a step without SAM
        self.looks_left = 3  # at gradients
        self.warned: set[str] = set()
        self.add(optimizer.param_groups)

    def add(self, groups: Groups) -> None:
        """Remember the learning rates of groups that have come to the optimizer."""
        made = [group for group in groups if "role" in group and group["params"] and group.get("lr")]
        self.rates |= {id(group["params"][0]): group["lr"] for group in made if is_number(group["lr"])}

    def before_climb(self, optimizer: Any) -> None:
        """RuntimeError if another SAM has perturbed some of these weights: this one would take its w + e for w.

        ValueError if a group has lost the momentum, against which it would have to climb.
        """
        self.settle_kept()
        if optimizer.moment == "momentum_buffer":
            check_momentum(optimizer.param_groups)
        if len(optimizers) == 1:
            return
        others: list[Any] = [other() for other in list(optimizers.values())]
        others = [other for other in others if other not in (None, optimizer) and other.phase.backups]
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]} if others else set()
        for other in others:
            if any(id(p) in mine for p, _ in other.phase.backups or ()) and other.passes.finite(other.phase):
                raise RuntimeError(
                    "another SAM has perturbed these weights: call its second_step() or restore() first, or delete it "
                    "if you have loaded other weights since"
                )

    def after_climb(self, groups: Groups) -> None:
        """Remember the first and the last gradient, in some steps: a loop that adds to them does so in every step."""
        if self.looks_left == 0:
            return
        self.gradients = self.look(groups)
        self.looks_left -= 1

    def look(self, groups: Groups) -> Seen:
        """The first and the last gradient. Empty after a few steps."""
        if self.looks_left == 0:
            return []
        params = [group["params"] for group in groups]
        ends = with_gradient(p for ps in params for p in ps), with_gradient(p for ps in params[::-1] for p in ps[::-1])
        counted = [p for p in ends if p is not None and changes_are_counted(p.grad)]
        return [(p, ref(p.grad), p.grad._version) for p in counted]

    def after_closure(self, before: Seen, result: Any) -> None:
        """RuntimeError if the closure at w + e has computed no gradient. before: the gradients seen before it ran."""
        # A closure that replays a CUDA graph changes gradients unseen; it can return its loss.
        if result is None and changes(before) == {0}:
            raise RuntimeError(
                "the closure computed no gradient at w + e: it must run the forward and the backward pass. In "
                "Lightning's manual optimization, give opt.step() such a closure: without one, SAM would do nothing. "
                "A closure that replays a CUDA graph must return its loss"
            )

    def keep_gradients(self, groups: Groups) -> None:
        """Keep the gradients for the update, but let a second pass replace them, if a loop makes one nevertheless."""
        self.kept = [KeptGradient(p) for group in groups for p in group["params"] if p.grad is not None]

    def settle_kept(self) -> None:
        """If some gradients were replaced, drop the others: the second pass has not reached their parameters."""
        if self.kept:
            kept, self.kept = self.kept, []
            replaced = [gradient.settle() for gradient in kept]
            for gradient in kept if any(replaced) else ():
                gradient.drop()

    def before_update(self, groups: Groups) -> None:
        """Warnings about gradients and learning rates. The usual case takes a fraction of a microsecond."""
        self.settle_kept()
        if self.gradients:
            self.compare_gradients()
        if groups[0].get("lr") is not self.latest_rate:
            self.compare_rates(groups)

    def compare_gradients(self) -> None:
        """Warn if the first gradients have been added to; RuntimeError if they had been added to others, too."""
        gradients, self.gradients, twice, self.added = self.gradients, [], self.added, False
        if added_to(gradients):
            if twice:
                raise RuntimeError(
                    "the closure added its gradient twice to gradients that were there before: call opt.zero_grad() at "
                    "its start. Do not use Lightning's accumulate_grad_batches, which gives SAM the last batch only: "
                    "split a large batch in the closure. A closure without autograd assigns gradients: p.grad = g. "
                    "Changes through p.grad.data are not seen"
                )
            self.warn(
                "the second pass seems to have added its gradient to the first one: call opt.zero_grad() at the start "
                "of the closure, or first_step(zero_grad=True). Ignore this if your loop overwrites gradients in place"
            )

    def compare_rates(self, groups: Groups) -> None:
        """Warn if the learning rates are no longer proportional to what they were."""
        self.latest_rate = groups[0].get("lr")
        rates = [(group["lr"], self.rates.get(id(group["params"][0])) if group["params"] else None) for group in groups]
        factors = [now / before for now, before in rates if before and now and is_number(now)]
        if factors and max(factors) > 1e-6 and min(factors) < 0.99 * max(factors):  # tiny rates are rounded
            self.warn(
                "the learning rates of the groups are no longer in the proportions that param_groups() gave them. "
                "Schedulers with absolute rates cause this: give OneCycleLR, CyclicLR and SWALR one rate per group, "
                "such as max_lr=[group['lr'] for group in opt.param_groups], leave eta_min and min_lr at 0, and give "
                "ReduceLROnPlateau eps=0. Ignore this if you changed the rates on purpose"
            )

    def warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=outside())


class KeptGradient:
    """The gradient of a parameter in a step without SAM, until a backward pass replaces it."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.old, self.handle, self.replaced = parameter, None, None, False
        if parameter.requires_grad and not is_spread(parameter):
            self.handle = parameter.register_hook(self.replace)
        else:  # FSDP2 writes gradients without calling hooks: out of its sight until the update
            self.old, parameter.grad = parameter.grad, None

    def replace(self, _: Tensor) -> None:
        """Before a backward pass adds to the gradient; the first one of several micro-batches replaces it."""
        if not self.replaced:
            self.parameter.grad, self.replaced = None, True

    def settle(self) -> bool:
        """End the wait. Whether there is a new gradient."""
        if self.handle:
            self.handle.remove()
        elif self.parameter.grad is None:
            self.parameter.grad = self.old
        else:
            self.replaced = True
        return self.replaced

    def drop(self) -> None:
        if not self.replaced:
            self.parameter.grad = None


def added_to(gradients: Seen) -> bool:
    """Whether they have been added to since they were seen."""
    # Adding changes a tensor once. With zeros before, it changes twice. With None before, the tensor is a new one.
    return changes(gradients) == {1}


def changes(gradients: Seen) -> set[int | None]:
    """How often they have changed since they were seen; None where there is another gradient, or none."""
    now = [(p.grad, first(), version) for p, first, version in gradients]
    return {g._version - version if g is not None and g is first else None for g, first, version in now}


def require_all_batches() -> None:
    """RuntimeError where Accelerate calls step(closure) for the last one of several batches only."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)  # one for the whole process
    if state and state._shared_state and state().num_steps > 1:
        raise RuntimeError(
            "Accelerate's gradient accumulation runs the closure for the last batch of each group only, and the others "
            "are lost: leave gradient_accumulation_steps at 1, and split large batches in the closure (mup2.accumulate)"
        )


def require_gradient(found_inf: Any) -> None:
    """RuntimeError if GradScaler, whose found_inf this is, saw no gradient."""
    if found_inf is not None and not isinstance(found_inf, Tensor):  # torch's sum of no tensors
        raise RuntimeError(
            "GradScaler found no gradient: the second pass must compute one. With FSDP2 and an interval, leave out "
            "zero_grad=True of first_step()"
        )


def outside() -> int:
    """The stacklevel of the line that called this package, for warnings."""
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mup2_fused", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def changes_are_counted(g: Tensor) -> bool:
    """Whether this gradient's version says what a pass did to it. A view's does not: DistributedDataParallel can keep
    gradients in views of its buckets, which it changes in every pass.
    """
    return not g.is_inference() and not g._is_view()


def is_number(x: Any) -> bool:
    """Not a tensor: looking at one would wait for the GPU."""
    return isinstance(x, (int, float))


def with_gradient(params: Iterable[Tensor]) -> Any:
    """The first of them that has a gradient, or None."""
    return next((p for p in params if p.grad is not None), None)

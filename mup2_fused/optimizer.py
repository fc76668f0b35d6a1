"""The optimizer: its phases, closures, loss scaling, state and copies.

Climbing and descending are in torch_passes.py and compiled_passes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# torch.compile must leave these methods alone: a step would no longer be the eager step to the bit. Unlike
# torch.compiler.disable, this decorator imports the compiler at the first call only, and not with this module.
from torch._compile import _disable_dynamo as uncompiled

from mup2_fused import torch_passes
from mup2_fused.arguments import check_arguments, check_base, check_factors, first_moment, make_base, variant_of
from mup2_fused.compiled_passes import passes_for, passes_with
from mup2_fused.guards import Guard, added_to, require_all_batches, require_gradient
from mup2_fused.loops import random_states
from mup2_fused.saving import Saving
from mup2_fused.torch_passes import Phase

SCALED = (
    "with float16, call first_step() after the first backward pass and scaler.step(opt) after the second. "
    "docs/frameworks.md does so in Lightning (16-mixed) and Accelerate (fp16). In Hugging Face's Trainer, "
    "mup2_fused.huggingface.SAMTrainer does"
)


class SAM(Saving):
    """Sharpness-aware minimization around a torch optimizer, with muP² factors per parameter group.

    Groups may have rho, gradnorm_scaling (default 1) and perturb (default True), as param_groups() makes them
    (Algorithm 1). Over all tensors l with perturb=True that have a gradient:

        norm = sqrt(sum_l (gradnorm_scaling_l ||T g_l||)²)        e_l = rho_l T² g_l / (norm + 1e-12)

    rho: radius for groups without their own. For variant "sam" it is the Euclidean length of the perturbation; for
    the adaptive variants it is relative to the weights.
    variant: "sam" (T = 1), "elementwise" (|w|) or "layerwise" (||w||_F); by default the groups' own.
    base_optimizer: a class, or a function that makes an optimizer from groups, such as mup.MuSGD. It gets base_kwargs.
    interval: with interval=k, steps 1, k + 1, 2k + 1 and so on are SAM steps, and the others are the base optimizer's
    own. A longer interval needs a larger rho.
    ascent: "gradient", or "momentum": e = -rho_l T² v_l / norm, where v is the base optimizer's first moment and takes
    the place of g in the norm (Becker et al. 2024). No first pass is needed then. In the first step e is 0.
    backend: "compiled" uses the kernels, "torch" torch's operations, "auto" the kernels where they can be used.
    skip_nonfinite: also skip updates whose own gradient is not finite, that of the second or only pass. This check
    reads all gradients once more.
    same_randomness: step(closure) and train_epoch() give both passes the same random numbers and dropout masks.

    Call step(closure), or first_step() after one backward pass and second_step() after another. If the gradient of the
    first pass is not finite, nothing is perturbed, and the update is skipped and counted in skipped_steps. Weights are
    perturbed in place, and restored bit for bit, also those to which the second pass gives no gradient.
    This object and .base_optimizer share groups and state: schedulers, hooks, state_dict(), copies and pickles see one
    optimizer. GradScaler.step(sam) takes the place of second_step(). Gradients need no unscale_() before first_step(),
    because e does not depend on the scale.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then calls step() on overflow too, which restores the weights

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        variant: str | None = None,
        interval: int = 1,
        ascent: str = "gradient",
        backend: str = "auto",
        skip_nonfinite: bool = False,
        same_randomness: bool = False,
        **base_kwargs: Any,
    ) -> None:
        check_base(base_optimizer)
        check_arguments(params, base_optimizer, base_kwargs)
        if not isinstance(params, Tensor):  # torch refuses a tensor, and says why
            params = [dict(p) if isinstance(p, dict) else p for p in params]
        self.variant = variant_of([p for p in params if isinstance(p, dict)], variant)
        self.backend, self.skip_nonfinite, self.same_randomness = backend, skip_nonfinite, same_randomness
        self.interval, self.phase = interval, Phase()
        defaults = {"rho": rho, "gradnorm_scaling": 1.0, "perturb": True, "variant": self.variant}
        super().__init__(params, defaults)
        self.base_optimizer = make_base(base_optimizer, self.param_groups, base_kwargs)
        self.defaults = self.base_optimizer.defaults | defaults
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.follow_base()
        self.moment = first_moment(ascent, interval, self.base_optimizer)
        self.passes = passes_for(self.param_groups, backend)
        self.guard = Guard(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. ValueError for a bad rho or gradnorm_scaling, or a group that is made for another variant."""
        if isinstance(param_group, dict):  # torch refuses anything else, and says why
            check_factors(self.defaults | param_group)
            variant_of([self.defaults | param_group], self.variant)
        groups = len(self.param_groups)
        super().add_param_group(param_group)
        if "passes" in vars(self):  # not while __init__ adds the first groups
            try:
                passes = passes_with(self.passes, self.param_groups[groups:], self.backend)
            except RuntimeError:
                del self.param_groups[groups:]
                raise
            if passes is not self.passes:
                self.phase, self.passes = self.settled(), passes
            self.guard.add(self.param_groups[groups:])

    @property
    def climbs(self) -> bool:
        """Whether the next step is a SAM step. It is not in the steps in between, if there is an interval."""
        return self.phase.steps % self.interval == 0

    @property
    def moments(self) -> tuple[dict[Any, Any], str] | None:
        """The base optimizer's state and the key of what SAM climbs against; None: it climbs along gradients."""
        return (self.base_optimizer.state, self.moment) if self.moment else None

    @property
    def skipped_steps(self) -> int:
        """How many updates were skipped because a gradient was not finite. Reading it waits for the GPU."""
        return self.passes.skipped(self.phase)

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self.phase.skipped += value - self.skipped_steps

    # -- the two passes

    @uncompiled
    def first_step(self, zero_grad: bool = False, process_group: Any = None) -> bool:
        """Climb: w <- w + e. Returns True, or False in steps without SAM, which change nothing and need no second pass.

        RuntimeError if weights are perturbed already, by this or by another SAM, or if a gradient is sparse or complex.
        With ascent="momentum", call this before the only backward pass.
        zero_grad: forget the gradients after the climb. In steps without SAM they stay, until a second pass replaces
        them, if there is one.
        process_group: processes that climb by gradients of their own (m-sharpness), such as
        torch.distributed.group.WORLD. If the gradient is not finite in one of them, none climbs or updates, so that
        their weights stay equal.
        """
        climbs = self.interval == 1 or self.climbs
        self._climb(self.param_groups if climbs else [], process_group if climbs else None)
        if zero_grad and climbs:
            self.zero_grad()
        elif zero_grad:
            self.guard.keep_gradients(self.param_groups)
        return climbs

    def _climb(self, groups: list[dict[str, Any]], process_group: Any) -> None:
        if "phase" not in vars(self):  # Lightning's wrapper is a subclass of SAM
            raise RuntimeError("this wraps the optimizer: call step(closure), or first_step() on the optimizer itself")
        self.require_restored("the next first_step()")
        self.guard.before_climb(self)
        self.phase.backups = None  # of a pass with a gradient that was not finite, to which no update came
        self.passes.climb(self.phase, groups, self.variant, process_group, self.moments)
        self.guard.after_climb([] if self.moment else groups)

    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base optimizer step. RuntimeError without a first_step() before."""
        self.step()
        if zero_grad:
            self.zero_grad()

    @uncompiled
    def restore(self) -> None:
        """Return every perturbed weight to w, bit for bit; no update can follow. Does nothing if none is perturbed."""
        self.passes.restore(self.phase)

    @contextmanager
    def perturbed(self, process_group: Any = None) -> Iterator[None]:
        """Weights are at w + e inside, and at w again afterwards, also after an exception or Ctrl-C.

        Use it for passes that may fail, and to look at the loss at w + e. After the block, second_step() updates with
        the last gradient. Restoring and updating are then two passes over memory, not one. It climbs in every step,
        whatever the interval.
        """
        self._climb(self.param_groups, process_group)
        self.guard.gradients = []  # the block may only look
        try:
            yield
        finally:
            updated = self.phase.backups is None  # by a second_step() inside
            self.restore()
        if not updated:
            self.phase.backups = []

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None, ascent_closure: Callable[[], Any] | None = None) -> Any:
        """One step. closure: zero_grad, forward, backward, return the loss. Returns the first loss.

        The closure runs at w and at w + e in a SAM step, only at w in a step without SAM (interval), and only at w + e
        with ascent="momentum".

        ascent_closure: replaces the closure at w in SAM steps, such as a pass over a part of the batch.
        Without closure this is second_step(). RuntimeError when weights are perturbed and a closure is given, or when
        they are not and no closure is given.
        """
        if closure is not None:
            self.require_restored("step(closure)")
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        try:
            loss = None
            if closure is not None:
                loss = self._run(closure, ascent_closure, found_inf)
            elif self.phase.backups is None:
                if found_inf is not None:
                    raise RuntimeError(f"nothing is perturbed: {SCALED}")
                return torch_passes.make_state(self.base_optimizer)
            require_gradient(found_inf)
            base = self.base_optimizer
            if base.param_groups is not self.param_groups or base.state is not self.state:  # somebody replaced them
                base.__setstate__({"state": self.state, "param_groups": self.param_groups})
            self.guard.before_update(self.param_groups)
            self.passes.descend(self.phase, base, grad_scale, found_inf, self.skip_nonfinite)
            self.phase.steps += 1
        except BaseException:
            self.restore()
            self.forget_scale()
            raise
        return loss

    def _run(self, closure: Callable[[], Any], ascent_closure: Any, found_inf: Tensor | None) -> Any:
        """The passes of a step."""
        if found_inf is not None:
            raise RuntimeError(f"GradScaler cannot unscale in a closure: {SCALED}")
        require_all_batches()
        random = random_states(self.param_groups) if self.same_randomness else []
        before = self.guard.look(self.param_groups)
        with torch.enable_grad():
            if self.moment:
                if ascent_closure:
                    raise RuntimeError("ascent='momentum' needs no first pass: leave out ascent_closure")
                self.first_step()
                loss = closure()
                self.guard.after_closure(before, loss)
            else:
                loss = (ascent_closure if ascent_closure and self.climbs else closure)()
                self.guard.added = added_to(before)
                if self.first_step():
                    for set_state, state in random:
                        set_state(state)
                    self.guard.after_closure(self.guard.gradients, closure())
        if self.phase.backups is None:
            raise RuntimeError("the closure called second_step() or restore(), which step(closure) does by itself")
        return loss

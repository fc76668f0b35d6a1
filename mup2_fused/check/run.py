"""A check: measure a model at several widths with several seeds, and judge what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mup2_fused.check.counterpart import Counterpart, Settings, settings_of
from mup2_fused.check.data import random_data
from mup2_fused.check.judge import Measurements, Pair, judge, judge_norm
from mup2_fused.check.measure import WHOLE, Values, measure
from mup2_fused.check.notes import notes_on
from mup2_fused.check.report import Report
from mup2_fused.groups import init_
from mup2_fused.optimizer import SAM
from mup2_fused.roles import describe
from mup2_fused.theory import exponents
from mup2_fused.user_code import Loss, model_and_loss
from mup2_ref import known

BASES: dict[str, tuple[type[torch.optim.Optimizer], float]] = {  # and the default learning rate
    "sgd": (torch.optim.SGD, 0.05),
    "adam": (torch.optim.AdamW, 0.001),
}
ASCENTS = ("gradient", "momentum")


@torch.random.fork_rng()
def check(
    factory: Callable[[int], Any],
    widths: list[int],
    *,
    groups: Callable[[nn.Module], Any] | None = None,
    own_init: bool = False,
    roles: dict[str, str] | None = None,
    base_optimizer: str = "sgd",
    variant: str | None = None,
    ascent: str = "gradient",
    lr: float | None = None,
    rho: float = 0.02,
    steps: int = 5,
    seeds: int = 3,
    input_shape: tuple[int, ...] | None = None,
    vocabulary: int | None = None,
    batch: int = 32,
    device: str = "cpu",
    progress: Callable[[list[Any]], Any] = iter,
) -> Report:
    """Measures a model at several widths; help(mup2_fused.check) says what.

    factory(width) -> a new model, or (model, loss). groups(model) -> your own parameter groups for SAM.
    own_init: keep the weights as the factory draws them, as with groups. roles: as for mup2_fused.param_groups.
    base_optimizer: "sgd" or "adam". variant: of SAM; None: the groups' own, or "sam".
    ascent: "gradient", or "momentum" as for SAM. SGD then has momentum 0.9.
    lr (default 0.05, Adam's 0.001) and rho: for checks without groups. Own groups are compared with muP² groups that
    have the same values at the narrowest width. steps: SAM steps before the one that is measured.
    input_shape, vocabulary, batch: of random data. progress: wraps the list of runs, as tqdm does.

    Raises ValueError for fewer than two widths (or two steps with ascent="momentum"), for models that do not get wider
    or learn nothing, and for what param_groups and SAM refuse; FloatingPointError for a loss that is not finite. Random
    states are as before afterwards.
    """
    widths = sorted(set(widths))
    if len(widths) < 2 or seeds < 1:
        raise ValueError(f"an exponent takes at least two widths and one seed, not {widths} and {seeds}")
    data = partial(random_data, shape=input_shape, vocabulary=vocabulary, batch=batch)
    usual_lr = BASES[known(base_optimizer, BASES)][1]
    keep = own_init or groups is not None
    study = Study(factory, groups, keep, roles, base_optimizer, variant, ascent, steps, data, device)
    study.prepare(widths, {"lr": lr or usual_lr, "rho": rho})
    return study.report(study.measure(widths, seeds, progress))


@dataclass
class Study:
    """The user's models, and SAM for them with the user's groups or with muP²'s."""

    factory: Callable[[int], Any]
    groups: Callable[[nn.Module], Any] | None
    own_init: bool  # keep the weights as the factory, or groups(model), draws them
    roles: dict[str, str] | None
    base_optimizer: str
    variant: str | None
    ascent: str
    steps: int
    data: Callable[..., Loss]
    device: str

    def prepare(self, widths: list[int], start: dict[str, float]) -> None:
        """What is the same for all runs. start: lr and rho at the narrowest width, for checks without groups."""
        if self.ascent == "momentum" and self.steps < 2:  # one step leaves the moments below a readout of zeros at 0
            raise ValueError(f"with ascent='momentum', moments must form in 2 steps or more first, not in {self.steps}")
        narrow, self.wide = (model_and_loss(self.factory(width))[0] for width in (widths[0], widths[-1]))
        if [p.shape for p in narrow.parameters()] == [p.shape for p in self.wide.parameters()]:
            raise ValueError(f"the factory makes models of the same shapes at widths {widths[0]} and {widths[-1]}")
        self.base = None if all(hasattr(p, "infshape") for p in narrow.parameters()) else narrow
        weights = [describe(model, self.base, self.roles) for model in (narrow, self.wide)]
        self.pairs = {name: Pair(weights[0][name], weights[1][name]) for name in weights[1]}
        self.own: dict[int, Settings] = {}  # the user's settings by width
        own_start: Settings = {}
        if self.groups is not None:
            opt = self.optimizer(self.groups(narrow))
            own_start, self.variant = settings_of(narrow, opt.param_groups), opt.variant
        scaling = exponents(variant=self.variant or "sam", base_optimizer=self.base_optimizer)
        default = {"gradnorm_scaling": 1.0, "perturb": 1.0} | start
        self.counterpart = Counterpart(narrow, self.base, scaling, self.roles, own_start, default)

    def optimizer(self, groups: Any) -> SAM:
        if isinstance(groups, torch.optim.Optimizer) or not hasattr(groups, "__iter__"):
            raise TypeError(f"groups(model) returns parameter groups, as for SAM, not {type(groups).__name__}")
        has_none = self.base_optimizer == "sgd" and self.ascent == "momentum"
        moment: dict[str, Any] = {"momentum": 0.9} if has_none else {}
        return SAM(groups, BASES[self.base_optimizer][0], variant=self.variant, ascent=self.ascent, **moment)

    def measure(self, widths: list[int], seeds: int, progress: Callable[[list[Any]], Any]) -> Measurements:
        sides = [False] if self.groups is None else [False, True]
        runs = [(own, seed, width) for seed in range(seeds) for width in widths for own in sides]
        return Measurements(widths, seeds, sides[-1], {run: self.measure_one(*run) for run in progress(runs)})

    def measure_one(self, own: bool, seed: int, width: int) -> Values:
        """own: with the user's groups, otherwise with muP²'s."""
        torch.manual_seed(seed)
        model, loss = model_and_loss(self.factory(width))
        model = model.to(self.device)
        made = self.groups(model) if self.groups is not None else None  # in any case: it may draw initial weights
        if not self.own_init:
            self.draw(model)
        opt = self.optimizer(made if own else self.counterpart.groups(model))
        if own:
            self.own[width] = settings_of(model, opt.param_groups)
        roles = {name: pair.role for name, pair in self.pairs.items()}
        return measure(model, loss or self.data(model, seed=seed), opt, roles, self.steps)

    def draw(self, model: nn.Module) -> None:
        """muP's initial weights. The output starts at 0, but not where the embedding is tied to it."""
        names = {name for name, pair in self.pairs.items() if pair.role == "output"} - tied(self.wide)
        roles = (self.roles or {}) | dict.fromkeys(names, "output")
        init_(model, self.base, roles=roles, gain=1.0, zero_output=bool(names))

    def report(self, m: Measurements) -> Report:
        rows = judge(m, self.pairs, self.counterpart.scaling)
        if not any(row.values["update"] for row in rows if row.name != WHOLE):
            hint = "" if self.own_init else "; if its output must not start at zero, use own_init (--own-init)"
            raise ValueError(
                f"no parameter has a gradient or a learning rate: the model learns nothing from this loss{hint}"
            )
        if any(row.wrong for row in rows[:-1]):  # the network's output follows
            rows[-1] = rows[-1]._replace(wrong=(), advice=())
        if self.groups is None:
            return Report(m.widths, rows, [])
        growth = self.counterpart.growth_beyond(self.own[m.widths[0]], self.wide, self.own[m.widths[-1]])
        powers = {name: {key: m.power(x) for key, x in of.items()} for name, of in growth.items()}
        rows = [judge_norm(row, powers) for row in rows]
        return Report(m.widths, rows, notes_on(rows, self.own, m.widths))


def tied(model: nn.Module) -> set[str]:
    """First names of the parameters that the model uses in several places."""
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return {several[0] for several in names.values() if len(several) > 1}

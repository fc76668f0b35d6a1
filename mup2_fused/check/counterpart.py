"""muP² groups for the same model, with which the user's own groups are compared."""

from __future__ import annotations

from typing import Any

from torch import nn

from mup2_fused.groups import param_groups
from mup2_ref import Exponents

KEYS = ("lr", "rho", "gradnorm_scaling")
Settings = dict[str, dict[str, float]]  # parameter -> KEYS and "perturb" -> value


def settings_of(model: nn.Module, groups: list[dict[str, Any]]) -> Settings:
    """What parameter groups say of each parameter of the model."""
    names = {p: n for n, p in model.named_parameters()}
    return {names[p]: {k: float(g[k]) for k in (*KEYS, "perturb")} for g in groups for p in g["params"] if p in names}


class Counterpart:
    """muP² groups that start from the user's values at the narrowest width."""

    def __init__(
        self,
        narrow: nn.Module,
        base: nn.Module | None,
        scaling: Exponents,
        roles: dict[str, str] | None,
        start: Settings,
        default: dict[str, float],
    ) -> None:
        """start: the user's settings at the narrowest width. default: settings of parameters that are not in start."""
        self.base, self.scaling, self.roles, self.start, self.default = base, scaling, roles, start, default
        self.first = self.factors(narrow)

    def factors(self, model: nn.Module) -> Settings:
        return settings_of(model, param_groups(model, self.base, self.scaling, lr=1.0, rho=1.0, roles=self.roles))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One group for each trainable parameter."""
        now, made = self.factors(model), []
        for name, p in model.named_parameters():
            if p.requires_grad:
                start = self.start.get(name, self.default)
                scaled: dict[str, Any] = {k: start[k] * now[name][k] / self.first[name][k] for k in KEYS}
                made.append({"params": [p], "perturb": bool(start["perturb"])} | scaled)
        return made

    def growth_beyond(self, narrow: Settings, wide_model: nn.Module, wide: Settings) -> dict[str, dict[str, float]]:
        """By how much more the user's rho and gradnorm_scaling grow than muP²'s, from the narrowest to the widest."""
        now, keys = self.factors(wide_model), ("rho", "gradnorm_scaling")
        perturbed = [name for name in wide if narrow[name]["rho"] > 0 and wide[name]["rho"] > 0]
        return {
            name: {k: (wide[name][k] / narrow[name][k]) / (now[name][k] / self.first[name][k]) for k in keys}
            for name in perturbed
        }

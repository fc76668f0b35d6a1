"""From measurements at several widths to powers of the width, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mup2_fused.check.advice import advice_on, advice_on_norm, advice_on_output
from mup2_fused.check.measure import QUANTITIES, WHOLE, Values
from mup2_fused.groups import initial_scale
from mup2_fused.roles import Weight
from mup2_ref import Exponents

# Theory's powers are multiples of 1/2, and half of that separates them where a measurement with muP² groups is there to
# compare with. Without it, a wrong role is 1 off or more, while layers that are not aligned with each other yet, a few
# steps after the start, fall by up to n^-1 (queries and keys of deep ViTs: n^-1.2).
TOLERANCE = {  # (above, below) the expected power
    "init": (0.25, 0.25),
    "compared": (0.25, 0.25),
    "alone": (0.8, 1.3),
    "output": (0.5, math.inf),
}
NEGLIGIBLE = 1e-5  # share of the norm: the gradient of a bias before a normalization is nothing but rounding errors


class Slope(NamedTuple):
    """A power of the width, with its standard error over seeds, and what it should be. nan: nothing changes."""

    value: float
    error: float
    expected: float
    kind: str  # key of TOLERANCE

    @property
    def excess(self) -> float:
        return self.value - self.expected

    def off(self, margin: float = 0.0) -> bool:
        """Whether the excess is beyond the tolerance, by more than the margin."""
        above, below = TOLERANCE[self.kind]
        return self.excess - margin > above or -self.excess - margin > below

    @property
    def sure(self) -> bool:
        return self.off(2 * self.error - 0.1)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        value = f"{self.value:+.2f}"
        return f"{value} ({self.expected:+.2f})" if self.kind in ("init", "compared") else value


NOTHING = Slope(math.nan, math.nan, math.nan, "alone")


class Row(NamedTuple):
    """One parameter, or the output of the whole network."""

    name: str
    shape: tuple[int, ...]  # at the largest width
    role: str
    slopes: dict[str, Slope]  # by quantity
    values: dict[str, list[float]]  # by quantity: the geometric mean over seeds, for each width
    wrong: tuple[str, ...]  # quantities with a wrong power
    unclear: tuple[str, ...]  # quantities whose power may be wrong
    advice: tuple[str, ...]


class Measurements(NamedTuple):
    widths: list[int]
    seeds: int
    compared: bool  # whether there are the user's own groups beside muP²'s
    values: dict[tuple[bool, int, int], Values]  # by (with own groups?, seed, width)

    def names(self) -> Iterator[str]:
        yield from self.values[self.compared, 0, self.widths[-1]]

    def of(self, name: str, quantity: str, own: bool) -> Tensor:
        """(seeds, widths)"""
        values = [[self.values[own, s, w][name].get(quantity, 0.0) for w in self.widths] for s in range(self.seeds)]
        return torch.tensor(values, dtype=torch.float64)

    def slopes(self, y: Tensor) -> Tensor:
        """(seeds, widths) -> the least-squares slope of log y against log width, for each seed."""
        x = torch.tensor(self.widths, dtype=torch.float64).log()
        x = x - x.mean()
        return y.log() @ x / x.square().sum()

    def power(self, growth: float) -> float:
        """The power of the width that grows as much from the narrowest to the widest model."""
        return math.log(growth) / math.log(self.widths[-1] / self.widths[0])

    def negligible(self, name: str) -> bool:
        """Whether the parameter has practically no gradient, at any width."""
        shares = [
            values[name].get("norm share", 1.0) for (own, *_), values in self.values.items() if own == self.compared
        ]
        return max(shares) < NEGLIGIBLE


class Pair(NamedTuple):
    """A parameter in the narrowest and in the widest model."""

    narrow: Weight
    wide: Weight

    @property
    def role(self) -> str:
        """Where the widest model is the base model, the narrowest tells."""
        return self.wide.role if self.wide.role != "finite" else self.narrow.role


def judge(m: Measurements, pairs: dict[str, Pair], scaling: Exponents) -> list[Row]:
    """A row for each parameter, and the last one for the network's output. scaling: of the initial weights."""
    return [judge_output(m) if name == WHOLE else judge_parameter(name, m, pairs[name], scaling) for name in m.names()]


def judge_parameter(name: str, m: Measurements, pair: Pair, scaling: Exponents) -> Row:
    wide = pair.wide
    grown = m.power(initial_scale(wide, scaling) / initial_scale(pair.narrow, scaling))
    slopes = {q: slope_of(m, name, q, grown) for q in QUANTITIES}
    advice: dict[str, str] = {}
    if not m.of(name, "update", m.compared).any() and (m.of(name, "update", False) > 0).all():
        advice["update"] = "never updated: it is in no parameter group, or its learning rate is 0"
    off = [q for q in ("init", "update", "perturbation") if slopes[q].off()]
    if wide.parameter.ndim < 2 and slopes["init"].excess < 0 and "init" in off:
        off.remove("init")  # a bias that starts smaller in wide networks is as good as one that starts at 0
    drawn = wide.base_fan_in is not None
    advice |= {q: advice_on(q, slopes[q].excess, drawn) for q in off if slopes[q].sure}
    unclear = tuple(q for q in off if q not in advice)
    shape, texts = tuple(wide.parameter.shape), tuple(advice.values())
    return Row(name, shape, pair.role, slopes, means(m, name, slopes), tuple(advice), unclear, texts)


def judge_output(m: Measurements) -> Row:
    slopes = {q: slope_of(m, WHOLE, q, None) for q in QUANTITIES}
    wrong = tuple(q for q in ("update", "perturbation") if slopes[q].off() and slopes[q].sure)
    advice = tuple(advice_on_output(q, slopes[q].excess) for q in wrong)
    return Row(WHOLE, (), "", slopes, means(m, WHOLE, slopes), wrong, (), advice)


def slope_of(m: Measurements, name: str, quantity: str, initial_power: float | None) -> Slope:
    """initial_power: that muP has for the initial weights; None for the network's output."""
    y, with_mup2 = m.of(name, quantity, m.compared), m.of(name, quantity, False)
    if (y <= 0).any() or (quantity != "init" and m.negligible(name)):
        return NOTHING
    each = m.slopes(y)
    expected, kind = torch.zeros_like(each), "alone"
    if initial_power is None:
        kind = "output"
    elif quantity == "init":
        expected, kind = expected + initial_power, "init"
    elif m.compared and (with_mup2 > 0).all():
        expected, kind = m.slopes(with_mup2), "compared"
    error = (each - expected).std().item() / m.seeds**0.5 if m.seeds > 1 else 0.0
    return Slope(each.mean().item(), error, expected.mean().item(), kind)


def means(m: Measurements, name: str, slopes: dict[str, Slope]) -> dict[str, list[float]]:
    measured = {q: m.of(name, q, m.compared) for q, slope in slopes.items() if slope is not NOTHING}
    return {q: measured[q].log().mean(0).exp().tolist() if q in measured else [] for q in slopes}


def judge_norm(row: Row, beyond_mup2: dict[str, dict[str, float]]) -> Row:
    """The row with a verdict on gradnorm_scaling, which can be wrong before its effect shows.

    A part of the norm that grows faster than all radii makes every perturbation vanish in the end.
    beyond_mup2: parameter -> "rho" and "gradnorm_scaling" -> the power by which they grow faster than muP²'s.
    """
    if row.name not in beyond_mup2 or not row.values["norm share"]:
        return row
    excess = beyond_mup2[row.name]["gradnorm_scaling"] - max(x["rho"] for x in beyond_mup2.values())
    if excess <= TOLERANCE["compared"][0]:
        return row
    return row._replace(wrong=(*row.wrong, "norm share"), advice=(*row.advice, advice_on_norm(excess)))

"""What follows from the finished runs of a sweep: each width's best learning rate and radius, and a table of them."""

import argparse
import itertools
import statistics
from typing import Any

from experiments.figures import deviation
from experiments.sweep import ALONE, METHODS, Rows, score

QUARTER_DECADES = [round(10 ** (k / 4), 4) for k in range(-12, 5)]  # 0.001 ... 10
COLLAPSE = 5.0  # points below the base optimizer at the same lr: from there on a radius counts as unstable


def grid_rhos(method: str, args: argparse.Namespace) -> tuple[float, ...]:
    return tuple(args.rhos or METHODS[method].rhos)


def slice_rhos(method: str, args: argparse.Namespace) -> list[float]:
    """The grid's radii, and the quarter decades in between if there is a slice."""
    rhos = grid_rhos(method, args)
    between = [r for r in QUARTER_DECADES if min(rhos) < r < max(rhos)] if args.slice_seeds else []
    return sorted({*rhos, *between})


class Optima:
    """Test accuracies of the finished runs, and what follows from them.

    The best lr of a width is the grid's, by the mean over args.seeds. The best rho is the slice's at that lr, by the
    mean over the slice's seeds. Where the narrowest width's best (lr, rho) turns out better, that is the optimum.
    """

    def __init__(self, runs: Rows, args: argparse.Namespace) -> None:
        self.runs, self.args = runs, args
        self.accuracy: dict[tuple, dict[int, float]] = {}  # (method, width, lr, rho) -> seed -> accuracy in %
        for run in runs:
            if (run.data, run.epochs, run.network) == (args.data, args.epochs, args.network):
                self.accuracy.setdefault((run.method, run.width, run.lr, run.rho), {})[run.seed] = score(runs, run)

    def by_seed(self, method: str, width: int, lr: float, rho: float) -> dict[int, float]:
        """rho 0: the base optimizer alone."""
        name = method if rho else ALONE[METHODS[method].parameterization]
        return self.accuracy.get((name, width, lr, rho), {})

    def values(self, method: str, width: int, lr: float, rho: float) -> list[float]:
        """Over the seeds of the slice (of the grid, if there is no slice)."""
        by_seed = self.by_seed(method, width, lr, rho)
        return [by_seed[seed] for seed in sorted(by_seed) if seed < max(self.args.seeds, self.args.slice_seeds)]

    def mean(self, method: str, width: int, lr: float, rho: float) -> float:
        return statistics.fmean(self.values(method, width, lr, rho))

    def grid(self, method: str, width: int, rhos: tuple[float, ...]) -> dict[tuple[float, float], float]:
        """(lr, rho) -> mean accuracy over the seeds of the grid."""
        points = {(lr, rho): self.by_seed(method, width, lr, rho) for lr in self.args.lrs for rho in rhos}
        return {point: statistics.fmean(v[seed] for seed in range(self.args.seeds)) for point, v in points.items()}

    def best_lr(self, method: str, width: int, alone: bool = False) -> float:
        """alone: that of the base optimizer."""
        grid = self.grid(method, width, (0.0,) if alone else grid_rhos(method, self.args))
        return max(grid, key=grid.get)[0]

    def slice(self, method: str, width: int) -> dict[float, list[float]]:
        """rho -> accuracies over seeds, at the width's best lr."""
        lr = self.best_lr(method, width)
        points = {rho: self.values(method, width, lr, rho) for rho in slice_rhos(method, self.args)}
        return {rho: values for rho, values in points.items() if values}

    def best(self, method: str, width: int) -> tuple[float, float]:
        """The best (lr, rho) of the slice."""
        points = self.slice(method, width)
        return self.best_lr(method, width), max(points, key=lambda rho: statistics.fmean(points[rho]))

    def narrow_best(self, method: str) -> tuple[float, float]:
        return self.best(method, min(self.args.widths))

    def optimum(self, method: str, width: int) -> tuple[float, float]:
        """The better one, by the mean over all seeds, of the narrowest width's best (lr, rho) and this width's."""
        candidates = self.narrow_best(method), self.best(method, width)
        return max(candidates, key=lambda point: self.mean(method, width, *point))

    def largest_stable_rho(self, method: str, width: int) -> float:
        alone = self.mean(method, width, self.best_lr(method, width), 0.0)
        points = self.slice(method, width)
        return max((rho for rho, v in points.items() if statistics.fmean(v) >= alone - COLLAPSE), default=0.0)

    def row(self, method: str, width: int) -> dict[str, Any]:
        """One row of the table. regret: what the narrowest width's best (lr, rho) loses here."""
        (lr, rho), alone_lr = self.optimum(method, width), self.best_lr(method, width, alone=True)
        sam, alone = self.values(method, width, lr, rho), self.values(method, width, alone_lr, 0.0)
        mean, alone_mean = statistics.fmean(sam), statistics.fmean(alone)
        stable_rho = self.largest_stable_rho(method, width)
        row = {"method": method, "width": width, "lr": lr, "rho": rho}
        row |= {"accuracy": mean, "std": deviation(sam), "seeds": len(sam)}
        row |= {"sgd_lr": alone_lr, "sgd": alone_mean, "sgd_std": deviation(alone), "gain": mean - alone_mean}
        row |= {"regret": mean - self.mean(method, width, *self.narrow_best(method))}
        return row | {"largest_stable_rho": stable_rho, "rho_edge": stable_rho == max(self.slice(method, width))}

    def table(self) -> list[dict[str, Any]]:
        return [self.row(*pair) for pair in itertools.product(self.args.methods, self.args.widths)]


def format_table(rows: list[dict[str, Any]], base: str = "SGD") -> str:
    """Markdown. base: the name of the optimizer without SAM."""
    head = f"best lr | best rho | accuracy % (± std over seeds) | {base} | gain | regret | largest stable rho"
    lines = [f"| | width | {head} |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        accuracy = f"{r['accuracy']:.1f} ± {r['std']:.1f} ({r['seeds']})"
        alone = f"{r['sgd']:.1f} ± {r['sgd_std']:.1f}"
        lines.append(
            f"| {r['method']} | {r['width']} | {r['lr']:g} | {r['rho']:.3g} | {accuracy} | {alone} | {r['gain']:+.1f} "
            f"| {r['regret']:.1f} | {'≥ ' * r['rho_edge']}{r['largest_stable_rho']:.3g} |"
        )
    return "\n".join(lines)


def what_to_look_at(rows: list[dict[str, Any]], base: str) -> str:
    """One sentence on the widest network, made of the measured numbers."""
    widths = sorted({row["width"] for row in rows})
    first, last = ({r["method"]: r for r in rows if r["width"] == width} for width in (widths[0], widths[-1]))
    method = "muP²" if "muP²" in last else next(iter(last))
    here, there = last[method], first[method]
    others = ", ".join(f"{r['gain']:+.1f} for {name}" for name, r in last.items() if name != method)
    return (
        f"Look at {method}: its best (lr, rho) is ({there['lr']:g}, {there['rho']:.3g}) at width {there['width']} and "
        f"({here['lr']:g}, {here['rho']:.3g}) at width {here['width']}, where the former costs {here['regret']:.1f} "
        f"points; SAM gains {here['gain']:+.1f} points over {base} there" + (f" ({others})." if others else ".")
    )

"""The demo: tune SAM on a narrow network, keep its learning rate and radius on wide ones, and see what that costs.

    python -m experiments.demo                             two minutes on two cores; the figure is runs/demo/demo.png
    python -m experiments.demo --methods SP-naive muP-naive muP²     also muP with one radius for all layers
    python -m experiments.demo --out experiments/results   the committed figure, from the committed runs

A 3-layer MLP learns 1,000 images of Fashion-MNIST, 40 % of whose labels are random, with SAM around AdamW. At width 64
plain SAM and muP² are the same, and the learning rate is the best one there; wider networks keep it. What counts is the
accuracy on test images, with right labels, after the last epoch. Finished runs are kept in OUT/demo.jsonl: the same
command goes on where it was interrupted.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

from experiments import figures
from experiments.commands import at_least, command, start
from experiments.sweep import METHODS, Place, Rows, Run, score, sweep

TITLES = {"SP-naive": "plain SAM", "muP-naive": "muP, one radius for all layers"}  # of methods, if not their names
NETWORK, DATA, LR, EPOCHS = "mlp-adamw", "noisy-fashion-mnist-1k", 0.00125, 10
RHOS = [0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0]


class Seen(NamedTuple):
    """What the runs of one method show."""

    title: str
    points: dict[int, dict[float, list[float]]]  # width -> rho -> accuracies in % over seeds

    def mean(self, width: int, rho: float) -> float:
        return statistics.fmean(self.points[width][rho])

    def best_rho(self, width: int) -> float:
        return max(self.points[width], key=lambda rho: self.mean(width, rho))

    @property
    def narrow(self) -> int:
        return min(self.points)

    @property
    def wide(self) -> int:
        return max(self.points)

    @property
    def kept(self) -> float:
        """Accuracy of the widest network with the narrowest one's best rho."""
        return self.mean(self.wide, self.best_rho(self.narrow))

    @property
    def cost(self) -> float:
        """What keeping that rho costs, in points."""
        return self.mean(self.wide, self.best_rho(self.wide)) - self.kept


def run_at(seed: int, method: str, width: int, rho: float, lr: float) -> Run:
    return Run(DATA, method, width, lr, rho, seed, EPOCHS, NETWORK)


def seen(runs: Rows, method: str, widths: list[int], rhos: list[float], seeds: int, lr: float = LR) -> Seen:
    def scores(width: int, rho: float) -> list[float]:
        return [score(runs, run_at(seed, method, width, rho, lr)) for seed in range(seeds)]

    return Seen(TITLES.get(method, method), {w: {rho: scores(w, rho) for rho in rhos} for w in widths})


def sentence(plain: Seen, scaled: Seen) -> str:
    """What is seen, made of the measured numbers."""

    def moves(x: Seen) -> str:
        a, b = x.best_rho(x.narrow), x.best_rho(x.wide)
        return f"stays at {a:.2g}" if a == b else f"moves by a factor of {max(a / b, b / a):.1f} ({a:.2g} to {b:.2g})"

    return (
        f"From width {plain.narrow} to {plain.wide}, at width {plain.narrow}'s learning rate, the best rho of "
        f"{plain.title} {moves(plain)}, and that of {scaled.title} {moves(scaled)}; at width {plain.wide}, keeping "
        f"width {plain.narrow}'s best rho costs {plain.title} {plain.cost:.1f} points of accuracy (it reaches "
        f"{plain.kept:.1f} %) and {scaled.title} {scaled.cost:.1f} points ({scaled.kept:.1f} %)."
    )


def plot(results: list[Seen], seeds: int, path: Path) -> None:
    """Accuracy over rho, a panel for each method and a curve for each width."""
    plt = figures.pyplot()
    size = (4.5 * len(results), 4.6)
    figure, axes = plt.subplots(1, len(results), figsize=size, sharey=True, squeeze=False, layout="constrained")
    low = min(x.mean(w, rho) for x in results for w in x.points for rho in x.points[w] if rho <= x.best_rho(x.narrow))
    high = max(x.mean(w, rho) for x in results for w in x.points for rho in x.points[w])
    for axis, x in zip(axes[0], results):
        axis.axvline(x.best_rho(x.narrow), color="black", linestyle=":", linewidth=1.5)
        for width, points in x.points.items():
            figures.curve(axis, width, points, label=f"width {width}")
            best = x.best_rho(width)
            figures.star(axis, width, best, x.mean(width, best))
        axis.set_title(f"{x.title}\nkeeping rho costs {x.cost:.1f} points at width {x.wide}", fontweight="bold")
        figures.log_axis(axis, [*x.points[x.narrow]], digits=2)
        axis.set_xlabel("radius rho")
    narrow = results[0].narrow
    at = results[0].best_rho(narrow), max(0, low - 2)
    axes[0, 0].annotate(f"best rho at\nwidth {narrow}", at, xytext=(6, 0), textcoords="offset points", fontsize=10)
    axes[0, 0].set(ylabel="test accuracy %", ylim=(max(0, low - 3), high + 3))  # too large radii leave the picture
    axes[0, -1].legend(loc="upper right")
    figure.suptitle(
        f"Tune SAM at width {narrow} (dotted line), keep its learning rate and radius in wider networks\n"
        f"stars: the best rho of each width; mean and standard deviation of {seeds} seeds"
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder of demo.jsonl and demo.png")
    add("--methods", nargs="+", choices=METHODS, default=["SP-naive", "muP²"], help="a panel for each")
    add("--widths", nargs="+", type=at_least(1, int), default=[64, 256, 1024])
    add("--rhos", nargs="+", type=at_least(0, float), default=RHOS)
    add("--lr", type=at_least(0, float), default=LR, help="of every width; the default is the best one at width 64")
    add("--seeds", type=at_least(1, int), default=5)
    add("--jobs", type=at_least(1, int), default=2, help="runs at once")
    return parser.parse_args(argv)


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    points = itertools.product(range(args.seeds), args.methods, args.widths, args.rhos, [args.lr])
    runs = [run_at(*point) for point in points]
    done = sweep(runs, args.out / "demo.jsonl", Place(jobs=args.jobs), "demo")
    results = [seen(done, method, args.widths, args.rhos, args.seeds, args.lr) for method in args.methods]
    plot(results, args.seeds, args.out / "demo.png")
    print(f"{sentence(results[0], results[-1])}\nfigure: {args.out / 'demo.png'}")
    return 0


if __name__ == "__main__":
    start(main)

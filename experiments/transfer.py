"""Figure 1 of the paper: how the best learning rate and radius of SAM move with the width, in five parameterizations.

    python -m experiments.transfer                        the committed results: widths 128, 256, 512 on MNIST-1D
    python -m experiments.transfer --network resnet       ResNet-18 on scikit-learn's digits, ten minutes; or vit
    python -m experiments.transfer --data cifar10 --root DIR --device cuda --graph --widths 256 1024 4096 --epochs 20

A 3-layer ReLU MLP without biases is trained with SGD at batch size 64 and constant learning rate; what counts is the
best test accuracy of all epochs (as in the paper). Base width 1: widths enter as in Definition 4, absolutely. First a
grid lr x rho at every width, then a slice over rho at each width's best lr with finer steps and more seeds, then the
narrowest width's best (lr, rho) at the others. Every finished run is appended to OUT/NAME.jsonl: the same command goes
on where it was interrupted, and only draws and prints where nothing is missing. --graph captures each SAM run's whole
iteration as one CUDA graph, which gives the same results up to rounding.

ResNet-18 (SGD with momentum) and a small ViT (AdamW) follow a cosine schedule to their last epoch, whose accuracy
counts, and have a base width and Algorithm 1's norm. mlp-adamw is the network of experiments.demo.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.commands import command, start
from experiments.data import loadable
from experiments.optima import Optima, format_table, grid_rhos, slice_rhos, what_to_look_at
from experiments.sweep import ALONE, METHODS, NETWORKS, Place, Run, data_on, sweep
from experiments.training import BACKENDS, check_device, has_kernels, is_cuda

DEFAULTS: dict[str, dict[str, Any]] = {  # of the options, for each network
    "mlp": dict(data="mnist1d", widths=[128, 256, 512], methods=[*METHODS], lrs=[0.2, 0.4, 0.8])
    | dict(slice_seeds=6, epochs=60),
    "mlp-adamw": dict(data="noisy-digits", widths=[32, 128, 512], methods=["SP-naive", "muP²"])
    | dict(lrs=[0.0025, 0.005, 0.01], rhos=[0.1, 0.1778, 0.3162, 0.5623], slice_seeds=0, epochs=10),
    "resnet": dict(data="noisy-digits", widths=[8, 32], methods=["SP-naive", "muP²"])
    | dict(lrs=[0.0125, 0.025, 0.05, 0.1, 0.2, 0.4], rhos=[0.05, 0.1, 0.2], slice_seeds=0, epochs=6),
    "vit": dict(data="noisy-digits", widths=[16, 64], methods=["SP-naive", "muP²"])
    | dict(lrs=[0.001, 0.003, 0.01, 0.03, 0.1], rhos=[0.01, 0.03, 0.1], slice_seeds=0, epochs=12),
}


def base_name(network: str) -> str:
    return "AdamW" if NETWORKS[network].base_optimizer == "adam" else "SGD"


def train_all(args: argparse.Namespace, path: Path) -> Optima:
    """Grid, slice and transfer, one after another, as each one's best points decide what the next one trains."""
    place = Place(**{key: getattr(args, key) for key in Place._fields})

    def finished(points: list[tuple], seeds: int, title: str) -> Optima:
        """points: (method, width, lr, rho)."""
        runs = [Run(args.data, *point, seed, args.epochs, args.network) for seed in range(seeds) for point in points]
        return Optima(sweep(runs, path, place, title), args)

    pairs = [*itertools.product(args.methods, args.widths)]
    alone = {m: ALONE[METHODS[m].parameterization] for m in args.methods}
    seeds = max(args.seeds, args.slice_seeds)
    grid = [(m, w, lr, rho) for m, w in pairs for lr in args.lrs for rho in grid_rhos(m, args)]
    grid += [(m, w, lr, 0.0) for m in dict.fromkeys(alone.values()) for w in args.widths for lr in args.lrs]
    optima = finished(grid, args.seeds, "grid")
    cut = [(m, w, optima.best_lr(m, w), rho) for m, w in pairs for rho in slice_rhos(m, args)]
    for m, w in pairs:
        lrs = {optima.best_lr(m, w), optima.best_lr(m, w, alone=True)}
        cut += [(alone[m], w, lr, 0.0) for lr in lrs]
    optima = finished(cut, seeds, "slice")
    return finished([(m, w, *optima.narrow_best(m)) for m, w in pairs], seeds, "transfer")


def summary(optima: Optima) -> dict[str, Any]:
    settings = {k: v for k, v in vars(optima.args).items() if k not in ("out", "root", "jobs", "device", "backend")}
    runs = optima.runs.values()
    places = {key: sorted({row[key] for row in runs if key in row}) for key in ("device", "date")}
    return {"args": settings, "rows": optima.table()} | places


def plot(optima: Optima, path: Path) -> None:
    """A heat map over lr and rho for each width and method; below, accuracy over rho (the MLP's) or over lr."""
    plt = figures.pyplot()
    args = optima.args
    rows, columns = len(args.widths) + 1, len(args.methods)
    size, heights = (3.1 * columns + 1, 2.1 * rows + 1.4), [1] * len(args.widths) + [1.7]
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", height_ratios=heights)
    for column, method in enumerate(args.methods):
        for axis, width in zip(axes[:, column], args.widths):
            heat_map(axis, optima, method, width)
        axes[0, column].set_title(method)
        curves(axes[-1, column], optima, method)
    for axis, width in zip(axes[:, 0], args.widths):
        axis.set_ylabel(f"width {width}\nlearning rate")
    pairs = [*itertools.product(args.methods, args.widths)]
    low = min(optima.mean(m, w, optima.best_lr(m, w, alone=True), 0.0) for m, w in pairs)
    high = max(optima.mean(m, w, *optima.optimum(m, w)) for m, w in pairs)
    plt.setp(axes[-1], ylim=(low - (high - low) / 2, high + 2))  # collapsed runs leave the picture
    axes[-1, 0].set_ylabel(f"test accuracy %\ndashed: {base_name(args.network)} alone")
    axes[-1, 0].legend(fontsize=9)
    network = NETWORKS[args.network].title
    figure.suptitle(f"{network} on {args.data}, {args.epochs} epochs\nnumbers: test accuracy %, stars: the optimum")
    figure.savefig(path)
    plt.close(figure)


def heat_map(axis: Any, optima: Optima, method: str, width: int) -> None:
    """Mean accuracies by (rho, lr), dark below 10 points less than the best."""
    lrs, rhos = optima.args.lrs, grid_rhos(method, optima.args)
    grid = optima.grid(method, width, rhos)
    best = max(grid.values())
    axis.grid(False)
    z = [[grid[lr, rho] for rho in rhos] for lr in lrs]
    axis.imshow(z, cmap=figures.SCALE, vmin=best - 10, vmax=best, aspect="auto", origin="lower")
    for (i, lr), (j, rho) in itertools.product(enumerate(lrs), enumerate(rhos)):
        colour = "black" if grid[lr, rho] > best - 4 else "white"
        axis.text(j - 0.45, i, f"{grid[lr, rho]:.0f}", va="center", fontsize=9, color=colour)
    lr, rho = optima.optimum(method, width)
    figures.star(axis, width, position(rho, rhos) + 0.2, position(lr, lrs))  # beside the number
    axis.set_xticks(range(len(rhos)), [f"{rho:.2g}" for rho in rhos])
    axis.set_yticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])


def position(x: float, ticks: list[float] | tuple[float, ...]) -> float:
    """Where x lies between the cells of a heat map, whose axes have one cell for each tick."""
    import numpy as np

    return float(np.interp(np.log(x), np.log(ticks), range(len(ticks))))


def curves(axis: Any, optima: Optima, method: str) -> None:
    """Accuracy over rho at each width's best lr; without a slice, over lr at the narrowest width's best rho."""
    args = optima.args
    over_lr = args.slice_seeds == 0 and len(args.lrs) > 1
    for width in args.widths:
        points = optima.slice(method, width)
        if over_lr:
            rho = optima.narrow_best(method)[1]
            points = {lr: optima.values(method, width, lr, rho) for lr in args.lrs}
        figures.curve(axis, width, points, label=f"width {width}")
        alone = optima.mean(method, width, optima.best_lr(method, width, alone=True), 0.0)
        axis.axhline(alone, color=figures.look_of(width)["color"], linestyle="--", linewidth=1)
    figures.log_axis(axis, args.lrs if over_lr else [*grid_rhos(method, args)])
    axis.set_xlabel(f"learning rate (rho {optima.narrow_best(method)[1]:.2g})" if over_lr else "rho (at the best lr)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="mlp", help="sets the defaults of the options below")
    add("--data", type=loadable, help="such as mnist1d, noisy-digits or cifar10")
    add("--root", help="folder with the files of CIFAR or Fashion-MNIST")
    add("--methods", nargs="+", choices=METHODS)
    add("--widths", nargs="+", type=int)
    add("--lrs", nargs="+", type=float)
    add("--rhos", nargs="+", type=float, help="one grid for all methods instead of each one's own")
    add("--seeds", type=int, default=2, help="of the grid")
    add("--slice-seeds", type=int, help="of the slice at the best lr; 0: no slice")
    add("--epochs", type=int)
    add("--jobs", type=int, default=2, help="runs at once")
    add("--device", default="cpu")
    add("--backend", choices=BACKENDS, default="auto", help="of the optimizer; torch needs no compiled part")
    add("--graph", action="store_true", help="replay iterations as a CUDA graph")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--name", help="of the result files; default transfer_DATA, and the network's name")
    args = parser.parse_args(argv)
    for key, value in DEFAULTS[args.network].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.network in ("resnet", "vit") and args.data.endswith("mnist1d"):
        parser.error("MNIST-1D is for MLPs: the other networks take images")
    if args.graph and not (is_cuda(args.device) and has_kernels(args.device)):
        parser.error("--graph takes --device cuda, and mup2_fused built with CUDA")
    args.widths = sorted(set(args.widths))
    prefix = "transfer" if args.network == "mlp" else f"transfer_{args.network}"
    args.name = args.name or f"{prefix}_{args.data}"
    return args


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_device(args.device)
    data_on(args.data, args.root, "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    optima = train_all(args, args.out / f"{args.name}.jsonl")
    found, base, figure = summary(optima), base_name(args.network), args.out / f"{args.name}.png"
    (args.out / f"{args.name}.json").write_text(json.dumps(found, indent=1, default=float) + "\n")
    print(format_table(found["rows"], base))
    plot(optima, figure)
    print(f"\n{what_to_look_at(found['rows'], base)}\nfigure: {figure}")
    return 0


if __name__ == "__main__":
    start(main)

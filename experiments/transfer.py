"""Figure 1 of the paper: how the best learning rate and radius of SAM move with the width, in five parameterizations.

    python experiments/transfer.py                        the committed results: widths 128, 256, 512 on MNIST-1D
    python experiments/transfer.py --demo                 a reduced sweep, five minutes on two cores
    python experiments/transfer.py --network resnet       ResNet-18 on scikit-learn's digits, ten minutes; or vit
    python experiments/transfer.py --data cifar10 --root DIR --device cuda --graph --widths 256 1024 4096 --epochs 20

A 3-layer ReLU MLP without biases is trained with SGD at batch size 64 and constant learning rate; what counts is the
best test accuracy of all epochs (as in the paper). Base width 1: widths enter as in Definition 4, absolutely. First a
grid lr x rho at every width, then a slice over rho at each width's best lr with finer steps and more seeds, then the
narrowest width's best (lr, rho) at the others. Every finished run is appended to OUT/NAME.jsonl: the same command goes
on where it was interrupted, and only draws and prints where nothing is missing. --graph captures each SAM run's whole
iteration as one CUDA graph, which gives the same results up to rounding.

ResNet-18 (SGD with momentum) and a small ViT (AdamW) follow a cosine schedule to their last epoch, whose accuracy
counts, and have a base width and Algorithm 1's norm. A part of the digits' training labels is random, so that there
is something to overfit; those of the test are right.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data as datasets
import mup2_ref
import networks
from vision import device_name, has_fused

try:  # the same optimizer to the bit, in less time
    from mup2_fused import SAM
except ImportError:  # not built
    from mup2_ref import SAM

QUARTER_DECADES = [round(10 ** (k / 4), 4) for k in range(-12, 5)]  # 0.001 ... 10
DEMO = dict(widths=[64, 256], methods=["SP-naive", "muP-global", "muP²"], lrs=[0.2, 0.4, 0.8], seeds=2, slice_seeds=0)
BATCH = 64
LABEL_NOISE = 0.4  # this part of the training labels is random in "noisy-" data
COLLAPSE = 5.0  # points below SGD at the same lr: from there on a radius counts as unstable


class Method(NamedTuple):
    parameterization: str
    perturbation: str
    rhos: tuple[float, ...]  # of the grid; the slice takes every quarter decade between its ends


METHODS = {
    "SP-naive": Method("sp", "naive", (0.0316, 0.1, 0.3162, 0.5623, 1.0)),
    "muP-naive": Method("mup", "naive", (0.0032, 0.01, 0.0316, 0.1, 0.3162)),
    "muP-global": Method("mup", "global", (0.0316, 0.1, 0.3162, 1.0, 3.1623)),
    "muP²": Method("mup", "effective", (0.0316, 0.1, 0.3162, 0.5623, 1.0)),
    "SP-LP": Method("sp", "effective", (0.01, 0.0316, 0.1, 0.1778, 0.3162)),
}
SGD = {"sp": "SP-SGD", "mup": "muP-SGD"}  # the base optimizer alone; for the ViT it is AdamW


class Setting(NamedTuple):
    """How a network is trained, and what the command's options are by default."""

    base_width: int
    base_optimizer: str
    norm: str
    cosine: bool  # to the last epoch, whose accuracy counts; otherwise constant, and the best one counts
    options: dict


SETTINGS = {
    "mlp": Setting(
        1,
        "sgd",
        "joint",
        False,
        dict(
            data="mnist1d", widths=[128, 256, 512], methods=list(METHODS), lrs=[0.2, 0.4, 0.8], slice_seeds=6, epochs=60
        ),
    ),
    "resnet": Setting(
        8,
        "sgd",
        "decoupled",
        True,
        dict(
            data="noisy-digits",
            widths=[8, 32],
            methods=["SP-naive", "muP²"],
            lrs=[0.0125, 0.025, 0.05, 0.1, 0.2, 0.4],
            rhos=[0.05, 0.1, 0.2],
            slice_seeds=0,
            epochs=6,
        ),
    ),
    "vit": Setting(
        16,
        "adam",
        "decoupled",
        True,
        dict(
            data="noisy-digits",
            widths=[16, 64],
            methods=["SP-naive", "muP²"],
            lrs=[0.001, 0.003, 0.01, 0.03, 0.1],
            rhos=[0.01, 0.03, 0.1],
            slice_seeds=0,
            epochs=12,
        ),
    ),
}
HEADS = 4  # of the ViT, at every width


class Run(NamedTuple):
    """One training run; rho 0 is plain SGD, shared by the methods of a parameterization."""

    data: str
    method: str
    width: int
    lr: float
    rho: float
    seed: int
    epochs: int
    network: str = "mlp"


# ------------------------------------------------------------------------------------------------- training


@functools.cache
def _data(name: str, root: str | None, device: str) -> tuple:
    (x, y), test = datasets.load(name.removeprefix("noisy-"), root)
    if name.startswith("noisy-"):
        generator = torch.Generator().manual_seed(0)
        noisy = torch.rand(len(y), generator=generator) < LABEL_NOISE
        y = torch.where(noisy, torch.randint(int(y.max()) + 1, y.shape, generator=generator), y)
    return tuple(tuple(t.to(device) for t in split) for split in ((x, y), test))


def _network(name: str, width: int, x: torch.Tensor, d_out: int, parameterization: str) -> torch.nn.Module:
    """For inputs like x. Attention is scaled by 1/d in muP, by 1/sqrt(d) in SP; at the base width they agree."""
    if name == "mlp":
        return mup2_ref.MLP(x[0].numel(), width, d_out)
    channels, *image = x.shape[1:]
    if name == "resnet":
        return networks.ResNet18(width, d_out, channels)
    head_dim = SETTINGS[name].base_width // HEADS if parameterization == "mup" else None
    return networks.ViT(width, 2, HEADS, tuple(image), 2, d_out, channels, base_head_dim=head_dim)


def train(run: Run, root: str | None, device: str, graph: bool = False) -> dict:
    """Train once; returns the run with its best and its last accuracy in %, the epochs it lasted, where and when.

    graph: SAM's whole iterations as one CUDA graph; the base optimizer alone trains without.
    """
    (x, y), test = _data(run.data, root, device)
    sgd = {name: parameterization for parameterization, name in SGD.items()}
    parameterization = sgd.get(run.method) or METHODS[run.method].parameterization
    perturbation = "naive" if run.method in sgd else METHODS[run.method].perturbation
    setting = SETTINGS[run.network]
    d_out = int(y.max()) + 1
    torch.manual_seed(run.seed)
    model, base = (_network(run.network, w, x, d_out, parameterization) for w in (run.width, setting.base_width))
    gain = 1.0 if run.network == "vit" else 2**0.5
    mup2_ref.init_(model, base, parameterization=parameterization, gain=gain).to(device)
    groups = mup2_ref.param_groups(
        model,
        base,
        lr=run.lr,
        rho=run.rho,
        base_optimizer=setting.base_optimizer,
        parameterization=parameterization,
        perturbation=perturbation,
        norm=setting.norm,
    )
    kind = torch.optim.AdamW if setting.base_optimizer == "adam" else torch.optim.SGD
    options = dict(momentum=0.9) if run.network == "resnet" else {}
    optimizer = kind(groups, **options) if run.rho == 0 else SAM(groups, kind, **options)
    steps = run.epochs * math.ceil(len(x) / BATCH)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if setting.cosine else None
    start = time.perf_counter()
    epoch = functools.partial(mup2_ref.train_epoch, model, optimizer, scheduler=scheduler)
    if graph and run.rho:
        from captured import training  # which needs mup2_fused

        epoch = training(model, optimizer, (x[:BATCH], y[:BATCH]), scheduler=scheduler)
    accuracies, shuffle = [], torch.Generator().manual_seed(run.seed)
    for _ in range(run.epochs):
        if not epoch(datasets.batches((x, y), BATCH, shuffle)).isfinite():
            break
        _, correct, samples = mup2_ref.evaluate(model, [test]).tolist()
        accuracies.append(100 * correct / samples)
    return run._asdict() | {
        "best": round(max(accuracies, default=100 / d_out), 2),
        "last": round(accuracies[-1], 2) if accuracies else None,
        "finished": len(accuracies),
        "seconds": round(time.perf_counter() - start, 1),
        "device": device_name(device),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_runs(path: Path) -> dict[Run, dict]:
    """Finished runs of earlier sweeps; a line that an interruption cut off is dropped from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    return {Run(**{field: row[field] for field in Run._fields if field in row}): row for row in rows}


def sweep(runs: list[Run], path: Path, args: argparse.Namespace, title: str) -> dict[Run, dict]:
    """Train what is not in the file yet, args.jobs at a time: seed by seed, the long ones first."""
    from tqdm import tqdm

    done = read_runs(path)
    todo = sorted((run for run in dict.fromkeys(runs) if run not in done), key=lambda run: (run.seed, -_cost(run)))
    if not todo:
        return done
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,)) as pool, path.open("a") as file:
        futures = {pool.submit(train, run, args.root, args.device, args.graph): run for run in todo}
        total = sum(map(_cost, todo))
        bar = tqdm(
            total=total,
            desc=title,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
        )
        with bar:
            try:
                for n, future in enumerate(as_completed(futures), 1):
                    row = future.result()
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    done[futures[future]] = row
                    bar.set_postfix_str(f"run {n} of {len(todo)}", refresh=False)
                    bar.update(_cost(futures[future]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                print(f"\ninterrupted; the same command goes on from {path}", file=sys.stderr)
                raise
    return done


def _cost(run: Run) -> int:
    """Expected time of one epoch, in arbitrary units: overhead plus matrix products; SGD needs one pass, not two."""
    scale = {"mlp": 250, "resnet": 10, "vit": 30}[run.network]
    return round(100 * (1 + (run.width / scale) ** 2) * (0.4 if run.rho == 0 else 1))


# -------------------------------------------------------------------------------------------------- results


class Results:
    """Accuracies of the finished runs (of the best epoch, with a schedule of the last), and what follows from them.

    The best lr of a width is the grid's, by the mean over args.seeds; the best rho is the slice's at that lr, by the
    mean over the slice's seeds. If the narrowest width's best (lr, rho) turns out better, that is the optimum.
    """

    def __init__(self, runs: dict[Run, dict], args: argparse.Namespace) -> None:
        self.args = args
        self.accuracy: dict[tuple, dict[int, float]] = {}  # (method, width, lr, rho) -> seed -> best accuracy
        for run, row in runs.items():
            if (run.data, run.epochs, run.network) == (args.data, args.epochs, args.network):
                score = row["last"] or 0.0 if SETTINGS[args.network].cosine else row["best"]
                self.accuracy.setdefault((run.method, run.width, run.lr, run.rho), {})[run.seed] = score

    def values(self, method: str, width: int, lr: float, rho: float) -> list[float]:
        """Over the seeds of the slice (of the grid, if there is none); rho 0 is SGD."""
        name = method if rho else SGD[METHODS[method].parameterization]
        by_seed = self.accuracy.get((name, width, lr, rho), {})
        return [by_seed[seed] for seed in sorted(by_seed) if seed < max(self.args.seeds, self.args.slice_seeds)]

    def mean(self, *point) -> float:
        return statistics.fmean(self.values(*point))

    def grid(self, method: str, width: int, rhos: tuple[float, ...]) -> dict[tuple[float, float], float]:
        """Mean accuracy by (lr, rho) over the seeds of the grid."""
        name = method if rhos != (0.0,) else SGD[METHODS[method].parameterization]
        points = {(lr, rho): self.accuracy[name, width, lr, rho] for lr in self.args.lrs for rho in rhos}
        return {key: statistics.fmean(v[seed] for seed in range(self.args.seeds)) for key, v in points.items()}

    def best_lr(self, method: str, width: int, sgd: bool = False) -> float:
        grid = self.grid(method, width, (0.0,) if sgd else grid_rhos(method, self.args))
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

    def optimum(self, method: str, width: int) -> tuple[float, float]:
        """The better one, by the mean over all seeds, of the narrowest width's best (lr, rho) and this width's."""
        candidates = self.best(method, min(self.args.widths)), self.best(method, width)
        return max(candidates, key=lambda point: self.mean(method, width, *point))

    def largest_stable_rho(self, method: str, width: int) -> float:
        sgd = self.mean(method, width, self.best_lr(method, width), 0.0)
        points = self.slice(method, width)
        return max((rho for rho, v in points.items() if statistics.fmean(v) >= sgd - COLLAPSE), default=0.0)

    def table(self) -> list[dict]:
        rows = []
        for method, width in itertools.product(self.args.methods, self.args.widths):
            lr, rho = self.optimum(method, width)
            sgd_lr = self.best_lr(method, width, sgd=True)
            stable_rho = self.largest_stable_rho(method, width)
            sam, sgd = self.values(method, width, lr, rho), self.values(method, width, sgd_lr, 0.0)
            rows.append(
                {
                    "method": method,
                    "width": width,
                    "lr": lr,
                    "rho": rho,
                    "accuracy": statistics.fmean(sam),
                    "std": statistics.stdev(sam) if len(sam) > 1 else 0.0,
                    "seeds": len(sam),
                    "sgd_lr": sgd_lr,
                    "sgd": statistics.fmean(sgd),
                    "sgd_std": statistics.stdev(sgd) if len(sgd) > 1 else 0.0,
                    "gain": statistics.fmean(sam) - statistics.fmean(sgd),
                    "regret": statistics.fmean(sam)
                    - self.mean(method, width, *self.best(method, min(self.args.widths))),
                    "largest_stable_rho": stable_rho,
                    "rho_edge": stable_rho == max(self.slice(method, width)),
                }
            )
        return rows


def grid_rhos(method: str, args: argparse.Namespace) -> tuple[float, ...]:
    return tuple(args.rhos or METHODS[method].rhos[slice(1, 4) if args.demo else slice(None)])


def slice_rhos(method: str, args: argparse.Namespace) -> list[float]:
    """The grid's radii, and the quarter decades in between if there is a slice."""
    rhos = grid_rhos(method, args)
    between = [r for r in QUARTER_DECADES if min(rhos) < r < max(rhos)] if args.slice_seeds else []
    return sorted({*rhos, *between})


def base_name(network: str) -> str:
    return "AdamW" if SETTINGS[network].base_optimizer == "adam" else "SGD"


def format_table(rows: list[dict], base: str = "SGD") -> str:
    """Markdown. base: the optimizer without SAM; regret: what the narrowest width's best (lr, rho) loses here."""
    head = f"best lr | best rho | accuracy % (± std over seeds) | {base} | gain | regret | largest stable rho"
    lines = [
        f"| | width | {head} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        accuracy = f"{r['accuracy']:.1f} ± {r['std']:.1f} ({r['seeds']})"
        sgd = f"{r['sgd']:.1f} ± {r['sgd_std']:.1f}"
        lines.append(
            f"| {r['method']} | {r['width']} | {r['lr']:g} | {r['rho']:.3g} | {accuracy} | {sgd} | {r['gain']:+.1f} "
            f"| {r['regret']:.1f} | {'≥ ' * r['rho_edge']}{r['largest_stable_rho']:.3g} |"
        )
    return "\n".join(lines)


def what_to_look_at(rows: list[dict], base: str) -> str:
    """One sentence on the widest network, made of the measured numbers."""
    first, last = (
        {r["method"]: r for r in rows if r["width"] == width}
        for width in (min(r["width"] for r in rows), max(r["width"] for r in rows))
    )
    method = "muP²" if "muP²" in last else next(iter(last))
    here, there = last[method], first[method]
    others = ", ".join(f"{r['gain']:+.1f} for {name}" for name, r in last.items() if name != method)
    return (
        f"Look at {method}: its best (lr, rho) is ({there['lr']:g}, {there['rho']:.3g}) at width {there['width']} and "
        f"({here['lr']:g}, {here['rho']:.3g}) at width {here['width']}, where the former costs {here['regret']:.1f} "
        f"points; SAM gains {here['gain']:+.1f} points over {base} there" + (f" ({others})." if others else ".")
    )


def plot(results: Results, path: Path, title: str) -> None:
    """Top: lr x rho. Bottom: the MLP's rho at each width's best lr; of the others, lr at the narrowest's best rho."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, NullLocator

    args, methods, low, high = results.args, results.args.methods, 100.0, 0.0
    over_lr = args.network != "mlp"
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(args.widths)))
    figure, axes = plt.subplots(2, len(methods), figsize=(3.1 * len(methods), 6), squeeze=False, layout="constrained")
    for column, method in enumerate(methods):
        top, bottom = axes[:, column]
        rhos = grid_rhos(method, args)
        for i, (color, width) in enumerate(zip(colors, args.widths)):
            grid = results.grid(method, width, rhos)
            if len(args.lrs) > 1 and len(rhos) > 1:
                z = [[grid[lr, rho] for rho in rhos] for lr in args.lrs]
                levels = [max(grid.values()) - 3, max(grid.values()) - 1.5]
                top.contour(rhos, args.lrs, z, levels=levels, colors=[color], linestyles=[":", "-"])
            lr, rho = results.optimum(method, width)
            top.plot(rho, lr, "*", color=color, markersize=max(24 - 7 * i, 6), markeredgewidth=0)  # they may coincide
            points = results.slice(method, width)
            if over_lr:
                rho = results.best(method, min(args.widths))[1]
                points = {lr: results.values(method, width, lr, rho) for lr in args.lrs}
            mean = np.array([statistics.fmean(v) for v in points.values()])
            std = np.array([statistics.stdev(v) if len(v) > 1 else 0.0 for v in points.values()])
            bottom.plot(list(points), mean, "-o", color=color, markersize=3, label=f"width {width}")
            bottom.fill_between(list(points), mean - std, mean + std, color=color, alpha=0.2)
            sgd = results.mean(method, width, results.best_lr(method, width, sgd=True), 0.0)
            bottom.axhline(sgd, color=color, linestyle="--", linewidth=1)
            low, high = min(low, sgd), max(high, mean.max())
        top.set(title=method, xscale="log", yscale="log", ylim=(min(args.lrs) / 1.15, max(args.lrs) * 1.15))
        top.set_yticks(args.lrs, [f"{lr:g}" for lr in args.lrs])
        top.yaxis.set_minor_locator(NullLocator())
        top.set_xlim(min(rhos) / 1.2, max(rhos) * 1.2)
        top.xaxis.set_minor_formatter(NullFormatter())
        if over_lr:
            top.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
            top.set_xlabel("rho")
            bottom.set(xscale="log", xlabel="learning rate")
            bottom.set_xticks(args.lrs, [f"{lr:g}" for lr in args.lrs], fontsize=8)
            bottom.xaxis.set_minor_locator(NullLocator())
        else:
            bottom.set(xscale="log", xlabel="rho")
            bottom.sharex(top)
    for axis in axes[1]:
        axis.set_ylim(low - (15 if over_lr else 5), high + 2)  # collapsed radii fall out of the picture
    axes[0][0].set_ylabel("learning rate\n★ best, lines: 1.5, 3 points less")
    where = f"at width {min(args.widths)}'s best rho" if over_lr else "at the best lr"
    axes[1][0].set_ylabel(f"test accuracy %, {where}\nband: std of seeds, dashed: {base_name(args.network)}")
    axes[1][-1].legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------- commands


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SETTINGS, default="mlp", help="sets the defaults of the options below")
    parser.add_argument("--data", choices=["mnist1d", "noisy-digits", "cifar10"])
    parser.add_argument("--root", help="folder of the CIFAR-10 archive")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--widths", nargs="+", type=int)
    parser.add_argument("--lrs", nargs="+", type=float)
    parser.add_argument("--rhos", nargs="+", type=float, help="one grid for all methods instead of each one's own")
    parser.add_argument("--seeds", type=int, default=2, help="of the grid")
    parser.add_argument("--slice-seeds", type=int, help="of the slice at the best lr; 0: no slice")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graph", action="store_true", help="replay iterations as a CUDA graph, with mup2_fused")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the result files; default transfer_DATA, and the network's name")
    parser.add_argument("--demo", action="store_true", help="a reduced sweep: sets widths, methods, lrs and seeds")
    args = parser.parse_args(argv)
    for key, value in SETTINGS[args.network].options.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.network != "mlp" and args.data == "mnist1d":
        parser.error("MNIST-1D is for the MLP: the other networks take images")
    if args.graph and not (torch.device(args.device).type == "cuda" and has_fused(args.device)):
        parser.error("--graph takes --device cuda, and mup2_fused built with CUDA")
    args.widths = sorted(set(args.widths))
    if args.demo:
        vars(args).update(DEMO)
    prefix = "transfer" if args.network == "mlp" else f"transfer_{args.network}"
    args.name = args.name or ("demo" if args.demo else f"{prefix}_{args.data}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.jsonl"
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    try:
        _data(args.data, args.root, "cpu")
    except datasets.DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def run(method: str, width: int, lr: float, rho: float, seed: int) -> Run:
        return Run(args.data, method, width, lr, rho, seed, args.epochs, args.network)

    def all_seeds(points: list[tuple]) -> list[Run]:
        return [run(*point, seed) for seed in range(max(args.seeds, args.slice_seeds)) for point in points]

    pairs = list(itertools.product(args.methods, args.widths))
    sgd = dict.fromkeys(SGD[METHODS[m].parameterization] for m in args.methods)
    grid = [(m, w, lr, rho) for m, w in pairs for lr in args.lrs for rho in grid_rhos(m, args)]
    grid += [(m, w, lr, 0.0) for m in sgd for w in args.widths for lr in args.lrs]
    runs = sweep([run(*point, seed) for seed in range(args.seeds) for point in grid], path, args, "grid")
    results = Results(runs, args)
    cut = [(m, w, results.best_lr(m, w), rho) for m, w in pairs for rho in slice_rhos(m, args)]
    for m, w in pairs:
        lrs = {results.best_lr(m, w), results.best_lr(m, w, sgd=True)}
        cut += [(SGD[METHODS[m].parameterization], w, lr, 0.0) for lr in lrs]
    runs = sweep(all_seeds(cut), path, args, "slice")
    results = Results(runs, args)
    runs = sweep(all_seeds([(m, w, *results.best(m, min(args.widths))) for m, w in pairs]), path, args, "transfer")
    results = Results(runs, args)
    rows = results.table()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "root", "jobs", "device")}
    summary = {"args": settings, "rows": rows} | {
        key: sorted({row[key] for row in runs.values() if key in row}) for key in ("device", "date")
    }
    (args.out / f"{args.name}.json").write_text(json.dumps(summary, indent=1, default=float) + "\n")
    print(format_table(rows, base_name(args.network)))
    figure = args.out / f"{args.name}.png"
    network = {"mlp": "3-layer MLP", "resnet": "ResNet-18", "vit": "ViT with two layers"}[args.network]
    plot(results, figure, f"{network} on {args.data}, {args.epochs} epochs")
    print(f"\n{what_to_look_at(rows, base_name(args.network))}\nfigure: {figure}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a terminated sweep ends its workers too
    sys.exit(main())

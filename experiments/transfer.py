"""Figure 1 of the paper: how the best learning rate and radius of SAM move with the width, in five parameterizations.

    python -m experiments.transfer                          MNIST-1D, widths 64 to 1024
    python -m experiments.transfer --settings fashion       Fashion-MNIST, of whose labels 30 % are random
    python -m experiments.transfer --settings resnet vit    narrow ResNets and ViTs on the same images
    python -m experiments.transfer --settings fashion --data noisy30-fashion-mnist --root DIR --device cuda --graph
                                                            on all images, each SAM step as one CUDA graph

At every width each method's best (lr, rho) is searched on a grid, whose steps are factors of 2 for lr and quarter
decades for rho: first with one seed, then with three, and at the two narrowest widths (resnet and vit: at all) with
nine, until all neighbours are worse, so that no best point lies on an edge. The search begins at the best point of the
next narrower width. All that is reported comes from six other seeds: the accuracy at the best point, at the best points
of the two narrowest widths, without SAM (whose lr is searched in the same way), and next to the best rho. Three of
these seeds are trained at larger radii, too, until the accuracy has collapsed. Every finished run is appended to
OUT/transfer_NAME.jsonl: the same command goes on where it was interrupted, and only draws and prints where nothing is
missing.

On MNIST-1D a 3-layer ReLU MLP without biases is trained as in the paper: SGD at batch size 64 and a constant learning
rate, the test accuracy of the best epoch counts, widths enter absolutely (base width 1) as in Definition 4. On 1,000
images of Fashion-MNIST, 30 % of whose labels are random, the MLP, ResNet-18 and ViT have a base width, at which all
methods are the same, momentum (the ViT has AdamW), a cosine schedule to the last epoch, whose accuracy counts, and
Algorithm 1's norm. Settings resnet-clean and vit-clean have the right labels. Setting table2 compares variants of SAM
at one width; its searches begin at two learning rates, a factor of 4 apart, and the better end counts. --graph captures
each SAM run's whole iteration as one CUDA graph.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.climb import Point, best_points
from experiments.commands import at_least, command, start, write_json
from experiments.data import loadable
from experiments.sweep import ALONE, METHODS, NETWORKS, VARIANTS, Place, Run, add_place, data_on, score, sweep
from experiments.training import check_device, has_kernels, is_cuda
from experiments.transfer_report import COLLAPSE, FEW, format_radii, format_table, plot, what_to_see

CHOOSING = range(3)  # seeds of the search
MORE = range(100, 106)  # more of them, at the narrowest widths, whose best points are tried at all others
AROUND = 1  # steps of rho to both sides of the best one, at which all reported seeds are trained, too


class Setting(NamedTuple):
    """What is trained, and where the search begins at the narrowest width."""

    network: str
    data: str
    widths: tuple[int, ...]
    epochs: int
    lr: float
    rho: float  # plain SAM's
    methods: tuple[str, ...] = tuple(METHODS)
    shifts: tuple[int, ...] = (0,)  # steps of lr from the start at which the first width's searches begin
    nine: int = 2  # so many of the narrowest widths have their best points chosen by nine seeds, the others by three


TWO = ("SP-naive", "muP²")
SETTINGS = {
    "mnist1d": Setting("mlp", "mnist1d", (64, 128, 256, 512, 1024), 60, 0.4, 0.3162),
    "fashion": Setting("mlp-base-64", "noisy30-fashion-mnist-1k", (64, 128, 256, 512, 1024), 60, 0.005, 0.1778),
    "resnet": Setting("resnet-28", "noisy30-fashion-mnist-1k", (4, 8, 32), 30, 0.05, 0.1778, TWO, nine=3),
    "vit": Setting("vit-28", "noisy30-fashion-mnist-1k", (16, 32, 128), 40, 0.005, 0.1, TWO, nine=3),
    "resnet-clean": Setting("resnet-28", "fashion-mnist-1k", (4, 8, 32), 30, 0.05, 0.1778, TWO),
    "vit-clean": Setting("vit-28", "fashion-mnist-1k", (16, 32, 128), 40, 0.005, 0.1, TWO),
    "table2": Setting("resnet-28", "noisy30-fashion-mnist-1k", (16,), 30, 0.2, 0.1778, (*TWO, *VARIANTS), (0, -2), 0),
}
# Where the search begins, as multiples of plain SAM's rho: where widths enter absolutely, and for the variants of SAM.
FACTORS = {"muP-naive": 0.1, "SP-LP": 0.3162}
VARIANT_FACTORS = {"sam": 3.162, "elementwise": 10.0, "layerwise": 0.1}


class Transfer:
    """The runs of one setting, and the search for the best point of each method at each width."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        given = {key: value for key in ("data", "widths", "epochs") if (value := getattr(args, key))}
        self.setting = SETTINGS[name]._replace(**given)
        self.name, self.methods = name, args.methods or self.setting.methods
        self.reported = range(len(CHOOSING), len(CHOOSING) + args.seeds)
        self.place = Place(**{key: getattr(args, key) for key in Place._fields})
        self.path = args.out / f"transfer_{args.name or '_'.join(filter(None, (name, args.data)))}.jsonl"
        self.runs: dict[Run, dict[str, Any]] = {}  # all that the file has, from the first train() on
        self.best: dict[int, dict[str, Point]] = {}  # width -> method, or base optimizer alone -> its best point

    def alone(self, method: str) -> str:
        return ALONE[(METHODS | VARIANTS)[method].parameterization]

    def run(self, method: str, width: int, point: Point, seed: int) -> Run:
        """At the base width, all methods but the variants of SAM are the same one."""
        s, alone = self.setting, method in ALONE.values()
        if width == NETWORKS[s.network].base_width and method not in VARIANTS:
            method = ALONE["sp"] if alone else "SP-naive"
        return Run(s.data, method, width, self.lr(point), 0.0 if alone else rho(point), seed, s.epochs, s.network)

    def lr(self, point: Point) -> float:
        return float(f"{self.setting.lr * 2.0**point.lr:.4g}")

    def values(self, method: str, width: int, point: Point, seeds: Iterable[int]) -> list[float] | None:
        """Test accuracies in %; None if a run is missing."""
        runs = [self.run(method, width, point, seed) for seed in seeds]
        return [score(self.runs, run) for run in runs] if all(run in self.runs for run in runs) else None

    def train(self, pairs: Iterable[tuple[str, Point]], width: int, seeds: Iterable[int], what: str) -> None:
        runs = [self.run(method, width, point, seed) for seed in seeds for method, point in pairs]
        self.runs = sweep(runs, self.path, self.place, f"{self.name}, width {width}, {what}")

    def starts(self) -> dict[str, Point]:
        """Of the methods, and of the base optimizer alone."""
        factors = (FACTORS if NETWORKS[self.setting.network].base_width == 1 else {}) | {
            method: VARIANT_FACTORS[v.variant] for method, v in VARIANTS.items()
        }
        radius = lambda method: round(4 * math.log10(self.setting.rho * factors.get(method, 1.0)))
        alone = {self.alone(method): Point(0, 0) for method in self.methods}
        return {method: Point(0, radius(method)) for method in self.methods} | alone

    def search(self) -> None:
        """Best points of all widths. Where searches began at several learning rates, the best of their ends counts."""
        starts = [{m: p.moved((lr, 0)) for m, p in self.starts().items()} for lr in self.setting.shifts]
        for width in self.setting.widths:
            ends = []
            for points in starts:
                for seeds in (CHOOSING[:1], CHOOSING, self.choosing(width)):
                    points = self.search_at(width, points, seeds)
                ends.append(points)
            mean = lambda method, point: statistics.fmean(self.values(method, width, point, self.choosing(width)))
            self.best[width] = {m: max((end[m] for end in ends), key=lambda p: mean(m, p)) for m in ends[0]}
            starts = [self.best[width]]
            self.report_at(width)

    def choosing(self, width: int) -> tuple[int, ...]:
        """The seeds by which the best point of a width is chosen."""
        return (*CHOOSING, *MORE) if width in self.setting.widths[: self.setting.nine] else (*CHOOSING,)

    def search_at(self, width: int, starts: dict[str, Point], seeds: Sequence[int]) -> dict[str, Point]:
        def known(method: str, point: Point) -> float | None:
            values = self.values(method, width, point, seeds)
            return statistics.fmean(values) if values else None

        lrs, radii = [(1, 0), (-1, 0)], [(0, 1), (0, -1)]
        moves = lambda method: lrs if method in ALONE.values() else lrs + radii
        return best_points(starts, moves, known, lambda pairs: self.train(pairs, width, seeds, "search"))

    def report_at(self, width: int) -> None:
        """Train what is reported of a width; of a single one only the best points."""
        best, narrow = self.best[width], list(self.best.values())[:2]
        if len(self.setting.widths) == 1:
            return self.train(best.items(), width, self.reported, "report")
        pairs = [*best.items(), *((m, found[m]) for m, found in itertools.product(self.methods, narrow))]
        radii = [*range(-AROUND, 0), *range(1, AROUND + 1)]
        pairs += [(m, best[m].moved((0, step))) for m, step in itertools.product(self.methods, radii)]
        self.train(dict.fromkeys(pairs), width, self.reported, "report")
        smaller = [(m, best[m].moved((0, -AROUND - 1))) for m in self.methods]
        self.train(smaller, width, self.reported[:FEW], "smaller radii")
        while larger := [(m, p) for m in self.methods if (p := self.next_radius(m, width))]:
            self.train(larger, width, self.reported[:FEW], "larger radii")

    def slice(self, method: str, width: int) -> dict[Point, list[float]]:
        """The accuracies at the best lr by rho, as far as they are known."""
        best, found = self.best[width][method], {}
        for step in itertools.count(-AROUND - 1):
            point = best.moved((0, step))
            few, values = (self.values(method, width, point, seeds) for seeds in (self.reported[:FEW], self.reported))
            if few is None:
                return found
            found[point] = values or few

    def next_radius(self, method: str, width: int) -> Point | None:
        """The next point of the slice, None if its last one has collapsed."""
        found = self.slice(method, width)
        means = [statistics.fmean(values) for values in found.values()]
        return None if means[-1] < max(means) - COLLAPSE else list(found)[-1].moved((0, 1))

    def known_points(self, method: str, width: int) -> dict[Point, list[float]]:
        """All points that were known when the best one was chosen."""
        around = itertools.product(range(-12, 13), [0] if method in ALONE.values() else range(-24, 13))
        seeds = self.choosing(width)
        found = {point: self.values(method, width, point, seeds) for point in itertools.starmap(Point, around)}
        return {point: values for point, values in found.items() if values}

    def as_good(self, method: str, width: int) -> list[Point]:
        """The points that the search's seeds cannot tell from the best one: by one standard error of the difference."""
        known, good = self.known_points(method, width), []
        for point, values in known.items():
            losses = [a - b for a, b in zip(known[self.best[width][method]], values)]
            if statistics.fmean(losses) <= statistics.stdev(losses) / math.sqrt(len(losses)):
                good.append(point)
        return good

    def row(self, method: str, width: int) -> dict[str, Any]:
        """One row of the table, which also has all that the figure shows. Accuracies are lists over the seeds."""
        best, alone, good = self.best[width][method], self.alone(method), self.as_good(method, width)
        lrs, radii = [self.lr(p) for p in good], [rho(p) for p in good]
        values = lambda name, point: self.values(name, width, point, self.reported)
        row = {"method": method, "width": width, "lr": self.lr(best), "rho": rho(best)}
        row |= {"lrs": [min(lrs), max(lrs)], "rhos": [min(radii), max(radii)], "accuracies": values(method, best)}
        row |= {"alone_lr": self.lr(self.best[width][alone]), "alone": values(alone, self.best[width][alone])}
        row |= {"kept": {f"{w}": values(method, self.best[w][method]) for w in [*self.best][:2] if w <= width}}
        row |= {"slice": [[rho(p), v] for p, v in self.slice(method, width).items()]}
        means = {p: statistics.fmean(v) for p, v in self.known_points(method, width).items()}
        return row | {"grid": [[self.lr(p), rho(p), round(mean, 3)] for p, mean in means.items()]}

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(*pair) for pair in itertools.product(self.methods, self.best)]


def rho(point: Point) -> float:
    return round(10 ** (point.rho / 4), 4 if point.rho >= -12 else 8)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=["mnist1d"])
    add("--data", type=loadable, help="in place of the setting's, such as cifar10")
    add("--root", help="folder with the files of CIFAR or Fashion-MNIST")
    add("--methods", nargs="+", choices=METHODS | VARIANTS, help="in place of the setting's")
    add("--widths", nargs="+", type=at_least(1, int), help="in place of the setting's")
    add("--seeds", type=at_least(2, int), default=6, help="that are reported, after the three of the search")
    add("--epochs", type=at_least(1, int), help="in place of the setting's")
    add_place(parser)
    add("--graph", action="store_true", help="replay iterations as a CUDA graph")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--name", help="of the result files; default the setting's, and the data's if they are given")
    args = parser.parse_args(argv)
    if args.graph and not (is_cuda(args.device) and has_kernels(args.device)):
        parser.error("--graph takes --device cuda, and mup2_fused built with CUDA")
    if args.name and len(args.settings) > 1:
        parser.error("--name is for one setting")
    args.widths = sorted(set(args.widths or []))
    return args


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_device(args.device)
    for name in args.settings:
        transfer = Transfer(name, args)
        data_on(transfer.setting.data, args.root, "cpu")
        transfer.search()
        rows, s = transfer.rows(), transfer.setting
        write_json(transfer.path.with_suffix(".json"), {"setting": s._asdict(), "rows": rows})
        print(f"{format_table(rows)}\n\n{what_to_see(rows)}\n")
        if len(s.widths) > 1:
            print(format_radii(rows))
            plot(rows, s, transfer.path.with_suffix(".png"))
            print(f"\nfigure: {transfer.path.with_suffix('.png')}\n")
    return 0


if __name__ == "__main__":
    start(main)

"""What cheaper ways of SAM keep of its gain: test accuracy over the number of passes that a training step takes.

    python -m experiments.frontier                          the committed results
    python -m experiments.frontier --settings resnet        one setting of them
    python -m experiments.frontier --settings mnist1d --ways interval-4 part-16 --seeds 2 --out runs      a part of one

SAM takes two passes. A SAM step in every k-th step only, a first pass on a part of the batch, climbing along momentum
without a first pass, and SAM in the last part of training only take fewer. Each way's learning rate and rho are the
best on a grid of factors of 2, and of sqrt(2) for rho near the best one: the search moves on until all neighbours are
worse, so that no best lies on an edge. It sees seeds 0 and 1; what is reported comes from the seeds after them. Without
SAM the network is trained for as many epochs, and for twice as many, which costs what SAM costs. Times are those of
steps in one process, in which the ways take turns, at the width that is trained and at a larger one. Every finished run
is appended to OUT/frontier_SETTING.jsonl: the same command goes on where it was interrupted. Times are kept in
OUT/frontier_SETTING.json.
"""

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import data
from experiments.climb import Point, best_points
from experiments.commands import at_least, command, read_json, start, write_json
from experiments.frontier_report import BASE, LONGER, format_table, plot
from experiments.sweep import ALONE, BATCH, NETWORKS, WAYS, Place, Run, add_place, data_on, score, sweep, trainings
from experiments.training import check_device
from experiments.transfer_report import mean_error

CHOOSING = (0, 1)  # seeds
DECIDING = (*CHOOSING, *range(100, 106))  # seeds, where more of them are needed
TIMED_STEPS = 16  # per round: a multiple of all intervals
TIMED_ROUNDS = {"time": 15, "wide_time": 4}


class Setting(NamedTuple):
    """What is trained, and where the search for the best lr and rho starts."""

    title: str
    network: str
    data: str
    width: int
    epochs: int
    lr: float
    rho: float
    wide: int  # the width at which times are measured, too, because passes take nearly all of a step there
    ways: tuple[str, ...] = tuple(WAYS)
    seeds: int = 6  # that are reported, after the two of the search
    finalists: int = 1  # the search's best points, between which eight seeds decide: for accuracies that scatter much


FEWER = ("sam", "interval-2", "interval-4", "interval-8", "part-4", "part-16", "momentum", "late-2")
SETTINGS = {
    "mnist1d": Setting("MLP, MNIST-1D, plain SGD", "mlp", "mnist1d", 256, 60, 0.4, 0.4, 1024),
    "mnist1d-momentum": Setting("MLP, MNIST-1D, momentum SGD", "mlp-momentum", "mnist1d", 256, 60, 0.04, 0.4, 1024),
    "fashion": Setting(
        "MLP, Fashion-MNIST, plain SGD", "mlp", "noisy30-fashion-mnist-5k", 256, 60, 0.05, 0.2, 1024, FEWER
    ),
    "fashion-momentum": Setting(
        "MLP, Fashion-MNIST, momentum SGD", "mlp-cosine", "noisy30-fashion-mnist-5k", 256, 60, 0.01, 0.2, 1024, FEWER
    ),
    "resnet": Setting("ResNet-18, digits, momentum SGD", "resnet", "noisy-digits", 16, 12, 0.1, 0.1, 64, FEWER, 16),
    "vit": Setting("ViT, digits, AdamW", "vit", "noisy-digits", 32, 24, 0.005, 0.12, 128, FEWER, 6, 3),
}


STEPS = (2, 1)  # first factors of 2 for rho, then of sqrt(2): a step in Point.rho is a factor of sqrt(2), in lr of 2


class Frontier:
    """The runs of one setting, and the search for each way's best point."""

    file, method, lr_moves = "frontier", "muP²", [(1, 0), (-1, 0)]

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        given = {key: value for key in ("width", "epochs", "seeds") if (value := getattr(args, key))}
        self.setting = setting = SETTINGS[name]._replace(**given)
        self.name, self.path = name, args.out / f"{self.file}_{name}.jsonl"
        self.place = Place(device=args.device, jobs=args.jobs)
        self.runs: dict[Run, dict[str, Any]] = {}  # all that the file has, from the first train() on
        self.searched: dict[str, dict[Point, float]] = {}  # accuracies over CHOOSING, of each way's points
        network = NETWORKS[setting.network]
        can_momentum = network.momentum > 0 or network.base_optimizer == "adam"
        self.ways = [way for way in args.ways or setting.ways if WAYS[way].ascent == "gradient" or can_momentum]

    def run(self, way: str, point: Point, seed: int) -> Run:
        s, alone = self.setting, way in (BASE, LONGER)
        epochs = s.epochs * (2 if way == LONGER else 1)
        lr, rho = (float(f"{x:.4g}") for x in (s.lr * 2.0**point.lr, s.rho * 2.0 ** (point.rho / 2)))
        method, rho, way = (ALONE["mup"], 0.0, "sam") if alone else (self.method, rho, way)
        return Run(s.data, method, s.width, lr, rho, seed, epochs, s.network, way)

    def values(self, way: str, point: Point, seeds: Iterable[int]) -> list[float] | None:
        """Test accuracies in %; None if a run is missing."""
        runs = [self.run(way, point, seed) for seed in seeds]
        return [score(self.runs, run) for run in runs] if all(run in self.runs for run in runs) else None

    def known(self, way: str, point: Point) -> float | None:
        """The mean that the search sees."""
        if values := self.values(way, point, CHOOSING):
            self.searched.setdefault(way, {})[point] = statistics.fmean(values)
        return statistics.fmean(values) if values else None

    def train(self, points: Iterable[tuple[str, Point]], seeds: Iterable[int], what: str) -> None:
        runs = [self.run(*pair, seed) for seed, pair in itertools.product(seeds, points)]
        self.runs = sweep(runs, self.path, self.place, f"{self.name}, {what}")

    def best(self, starts: dict[str, Point]) -> dict[str, Point]:
        points, train = starts, lambda pairs: self.train(pairs, CHOOSING, "search")
        for step in STEPS:
            radii = [(0, step), (0, -step)]
            moves = lambda way, radii=radii: self.lr_moves + radii * (way not in (BASE, LONGER))
            points = best_points(points, moves, self.known, train)
        return points

    def decide(self, points: dict[str, Point]) -> dict[str, Point]:
        """The best of each way's finalists, over DECIDING seeds."""
        if self.setting.finalists == 1:
            return points
        finalists = {}
        for way in points:
            means = self.searched[way]
            finalists[way] = sorted(means, key=means.get, reverse=True)[: self.setting.finalists]
        self.train([(way, p) for way, some in finalists.items() for p in some], DECIDING, "decision")
        mean = lambda way, p: statistics.fmean(self.values(way, p, DECIDING))
        return {way: max(some, key=lambda p: mean(way, p)) for way, some in finalists.items()}

    def search(self) -> dict[str, Point]:
        """First the base optimizer and SAM, then the other ways from SAM's lr and rho on."""
        found = self.best(dict.fromkeys((BASE, LONGER, "sam"), Point(0, 0)))
        sam, others = found["sam"], [way for way in self.ways if way != "sam"]
        found |= self.best({way: sam.moved((0, round(2 * math.log2(WAYS[way].factor)))) for way in others})
        return self.decide(found)

    def rows(self, points: dict[str, Point]) -> list[dict[str, Any]]:
        """Of the table. kept: the share of SAM's gain. error: the standard error of the accuracy."""
        found = {way: mean_error(self.values(way, p, reported(self.setting.seeds))) for way, p in points.items()}
        (base, base_error), (sam, sam_error) = found[BASE], found["sam"]
        gain, rows = sam - base, []
        for way, (mean, error) in found.items():
            run, kept, kept_error = self.run(way, points[way], 0), None, None
            if gain > 0:
                kept = (mean - base) / gain
                kept_error = math.hypot(error, kept * sam_error, (1 - kept) * base_error) / gain
            passes = {BASE: 1.0, LONGER: 2.0}.get(way) or WAYS[way].passes
            row = {"way": way, "lr": run.lr, "rho": run.rho, "passes": passes, "accuracy": mean, "error": error}
            rows.append(row | {"seeds": self.setting.seeds, "kept": kept, "kept_error": kept_error})
        return rows


def reported(seeds: int) -> range:
    return range(len(CHOOSING), len(CHOOSING) + seeds)


def times(frontier: Frontier, points: dict[str, Point], width: int, rounds: int) -> dict[str, float]:
    """Median time of a training step, as a multiple of the one without SAM. The ways take turns, in changing order."""
    train, _ = data_on(frontier.setting.data, None, frontier.place.device)
    batches = [tuple(t[:BATCH] for t in train)] * TIMED_STEPS
    runs = {way: frontier.run(way, p, 0)._replace(width=width) for way, p in points.items()}
    models = {way: trainings(run, train, frontier.place) for way, run in runs.items()}
    seconds: dict[str, list[float]] = {way: [] for way in models}
    threads, order = torch.get_num_threads(), random.Random(0)
    torch.set_num_threads(1)
    for _ in range(1 + rounds):  # memory is allocated in the first one
        for way in order.sample([*models], len(models)):
            first = 0 if way in (BASE, LONGER) else WAYS[way].first_epoch(TIMED_STEPS)
            begin = time.perf_counter()
            for training, some in zip(models[way], (batches[:first], batches[first:])):
                if some:
                    training.train_epoch(some).item()
            seconds[way].append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    ratios = {way: [a / b for a, b in zip(s[1:], seconds[BASE][1:])] for way, s in seconds.items()}
    return {way: statistics.median(r) * (2 if way == LONGER else 1) for way, r in ratios.items()}


def all_times(frontier: Frontier, points: dict[str, Point]) -> dict[str, dict[str, float]]:
    """Both kinds of times of each way. Those that a file has are not measured again."""
    path, setting = frontier.path.with_suffix(".json"), frontier.setting
    advice = "remove this file, and the same command measures its times again"
    known = read_json(path, ("times",), advice)["times"] if path.exists() else {}
    if known.keys() == TIMED_ROUNDS.keys() and all(found.keys() >= points.keys() for found in known.values()):
        return known
    widths = {"time": setting.width, "wide_time": max(setting.width, setting.wide)}
    return {kind: times(frontier, points, widths[kind], rounds) for kind, rounds in TIMED_ROUNDS.items()}


def report(frontier: Frontier, points: dict[str, Point]) -> str:
    """Write the table and the figure. Returns the table."""
    path, known = frontier.path.with_suffix(".json"), all_times(frontier, points)
    rows = [row | {kind: known[kind][row["way"]] for kind in known} for row in frontier.rows(points)]
    seeds = reported(frontier.setting.seeds)
    runs = [frontier.runs[frontier.run(way, p, seed)] for way, p in points.items() for seed in seeds]
    places = {key: sorted({row[key] for row in runs}) for key in ("device", "date")}
    write_json(path, {"setting": frontier.setting._asdict(), "rows": rows, "times": known} | places)
    plot(rows, heading(frontier.setting), frontier.path.with_suffix(".png"))
    return format_table(rows, frontier.setting.wide)


def heading(setting: Setting) -> str:
    network = NETWORKS[setting.network]
    base = "AdamW" if network.base_optimizer == "adam" else "SGD with momentum" if network.momentum else "SGD"
    return f"{network.title} of width {setting.width}, {data.title(setting.data)}, {setting.epochs} epochs, {base}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    add("--ways", nargs="+", choices=WAYS, help="default the setting's; SAM and the optimizer alone are always there")
    add("--seeds", type=at_least(2, int), help="that are reported, after the two of the search; default the setting's")
    add("--epochs", type=at_least(1, int), help="default the setting's")
    add("--width", type=at_least(1, int), help="default the setting's")
    add_place(parser)
    add("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(argv)


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_device(args.device)
    for name in args.settings:
        frontier = Frontier(name, args)
        points = frontier.search()
        frontier.train(points.items(), reported(frontier.setting.seeds), "report")
        table = report(frontier, points)
        print(f"{heading(frontier.setting)}\n\n{table}\n\nfigure: {frontier.path.with_suffix('.png')}\n")
    return 0


if __name__ == "__main__":
    start(main)

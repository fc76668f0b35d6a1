"""Does the rho that is best for a cheaper way of SAM stay the best one when the network gets wider?

    python -m experiments.frontier_transfer               the committed results: widths 64, 256, 1024 on MNIST-1D
    python -m experiments.frontier_transfer --ways interval-8 --widths 64 128 --seeds 2 --out runs        a part of them

Each way's learning rate is the one that experiments.frontier found at its own width; in muP it needs no other one. The
best rho of each width is searched in factors of 2, then of sqrt(2), until both neighbours are worse, on seeds 0 and 1.
At the narrowest width, whose choice all others take over, eight seeds then decide between the points up to a factor of
2 away. Regret is what a width loses, on the seeds after them, by the narrowest width's best rho. muP² has a radius for
each layer; muP-global has one radius for all layers, which is multiplied by width^(-1/2). Every finished run is
appended to OUT/frontier_transfer_SETTING.jsonl: the same command goes on where it was interrupted.
"""

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from experiments.climb import Point
from experiments.commands import at_least, command, markdown, read_json, start, write_json
from experiments.frontier import DECIDING, SETTINGS, Frontier, reported
from experiments.sweep import METHODS, WAYS, add_place
from experiments.training import check_device
from experiments.transfer_report import mean_error, plus_minus

RESULTS = Path(__file__).parent / "results"


class AtWidth(Frontier):
    """The search for the best rho of one method at one width. Learning rates stay."""

    file, lr_moves = "frontier_transfer", []

    def __init__(self, args: argparse.Namespace, method: str, width: int) -> None:
        super().__init__(args.setting, argparse.Namespace(**vars(args) | {"width": width}))
        self.method = method

    def refine(self, way: str, found: Point) -> Point:
        """The best of the points around this one, over DECIDING seeds."""
        around = [found._replace(rho=found.rho + step) for step in range(-2, 3)]
        self.train([(way, point) for point in around], DECIDING, f"{way} at width {self.setting.width}")
        return max(around, key=lambda point: statistics.fmean(self.values(way, point, DECIDING)))


def found_points(setting: str, ways: list[str]) -> dict[str, Point]:
    """The ways' best points at the width of experiments.frontier."""
    path, start = RESULTS / f"frontier_{setting}.json", SETTINGS[setting]
    rows = {row["way"]: row for row in read_json(path, ("rows",), "restore this committed file")["rows"]}
    logs = {way: (math.log2(rows[way]["lr"] / start.lr), 2 * math.log2(rows[way]["rho"] / start.rho)) for way in ways}
    return {way: Point(round(lr), round(rho)) for way, (lr, rho) in logs.items()}


def best_points(args: argparse.Namespace, method: str) -> list[tuple[AtWidth, dict[str, Point]]]:
    """Each width's search, with the ways' best points. A search begins where the next narrower one ended."""
    points, found = found_points(args.setting, args.ways), []
    for width in args.widths:
        search = AtWidth(args, method, width)
        points = search.best(points)
        if not found:
            points = {way: search.refine(way, point) for way, point in points.items()}
        found.append((search, points))
    return found


def rows(args: argparse.Namespace, method: str) -> list[dict[str, Any]]:
    """Of the table, for one method."""
    found = best_points(args, method)
    kept, rows, seeds = found[0][1], [], reported(args.seeds)
    for (search, best), way in itertools.product(found, args.ways):
        pairs = dict.fromkeys([(way, best[way]), (way, kept[way])])
        search.train(pairs, seeds, f"{method} at width {search.setting.width}")
        own, transferred = (search.values(way, points[way], seeds) for points in (best, kept))
        regret, error = mean_error([a - b for a, b in zip(own, transferred)])
        row = {"way": way, "method": method, "width": search.setting.width, "rho": search.run(way, best[way], 0).rho}
        row |= {"accuracy": statistics.fmean(own), "kept_rho": search.run(way, kept[way], 0).rho}
        row |= {"kept_accuracy": statistics.fmean(transferred), "regret": regret, "error": error}
        rows.append(row | {"seeds": len(seeds)})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    narrow, lines = min(row["width"] for row in rows), []
    head = ["", "", "width", "best rho", "accuracy %", f"with the best rho of width {narrow}"]
    for r in sorted(rows, key=lambda r: ([*WAYS].index(r["way"]), [*METHODS].index(r["method"]) * -1, r["width"])):
        accuracies = [f"{r[key]:.1f}" for key in ("accuracy", "kept_accuracy")]
        regret = f"{plus_minus((r['regret'], r['error']))} ({r['seeds']})" if r["width"] > narrow else ""
        lines.append([WAYS[r["way"]].title, r["method"], r["width"], f"{r['rho']:.3g}", *accuracies, regret])
    return markdown([*head, "regret (± standard error)"], lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=SETTINGS, default="mnist1d-momentum", help="of experiments.frontier")
    add("--ways", nargs="+", choices=WAYS, default=["interval-4", "part-16"])
    add("--methods", nargs="+", choices=METHODS, default=["muP²", "muP-global"])
    add("--widths", nargs="+", type=at_least(1, int), default=[64, 256, 1024])
    add("--seeds", type=at_least(2, int), default=3, help="that are reported, after the two of the search")
    add("--epochs", type=at_least(1, int), help="default the setting's")
    add_place(parser)
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.widths = sorted(set(args.widths))
    return args


@command("the same command goes on where it stopped")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_device(args.device)
    found = [row for method in args.methods for row in rows(args, method)]
    setting = SETTINGS[args.setting]
    setting = setting._replace(epochs=args.epochs or setting.epochs, seeds=args.seeds)
    write_json(args.out / f"frontier_transfer_{args.setting}.json", {"setting": setting._asdict(), "rows": found})
    print(format_table(found))
    return 0


if __name__ == "__main__":
    start(main)

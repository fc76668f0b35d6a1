"""The table and the figure of experiments.transfer, from the rows of its result file.

A row has the accuracies of one method at one width, as lists over the reported seeds: at its best (lr, rho)
("accuracies"), at the best ones of the two narrowest widths ("kept"), without SAM ("alone") and over rho ("slice").
"""

import itertools
import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from experiments import data, figures
from experiments.commands import markdown
from experiments.sweep import NETWORKS

Row = dict[str, Any]
FEW = 3  # seeds at two or more steps of rho from the best one
COLLAPSE = 5.0  # points below the best of a slice: from there on a radius counts as unstable
TITLES = {"SP-naive": "plain SAM (SP)", "muP-naive": "muP, one radius", "muP-global": "muP, global scaling"}


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def regret(row: Row, width: int) -> tuple[float, float]:
    """What this row's network loses by the best (lr, rho) of another width; differences are taken seed by seed."""
    return mean_error([a - b for a, b in zip(row["accuracies"], row["kept"][f"{width}"])])


def gain(row: Row) -> tuple[float, float]:
    """Of SAM over the base optimizer alone, each with its own best lr."""
    return mean_error([a - b for a, b in zip(row["accuracies"], row["alone"])])


def largest_stable_rho(row: Row) -> float:
    """Where the accuracy over rho falls to COLLAPSE points below its maximum, on a line between two radii (log)."""
    rhos, means = [rho for rho, _ in row["slice"]], [statistics.fmean(values) for _, values in row["slice"]]
    level = max(means) - COLLAPSE
    last = max(i for i, mean in enumerate(means) if mean >= level)  # the slice goes on to a radius that is not stable
    share = (means[last] - level) / (means[last] - means[last + 1])
    return rhos[last] * (rhos[last + 1] / rhos[last]) ** share


def power_of_the_width(rows: list[Row]) -> float:
    """The slope of log(largest stable rho) over log(width), by least squares."""
    x, y = ([math.log(f(row)) for row in rows] for f in (lambda row: row["width"], largest_stable_rho))
    return statistics.linear_regression(x, y).slope


def of(rows: list[Row], method: str) -> list[Row]:
    """The method's rows, narrowest first."""
    return sorted((row for row in rows if row["method"] == method), key=lambda row: row["width"])


def methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def widths(rows: list[Row]) -> list[int]:
    return sorted({row["width"] for row in rows})


def span(best: float, among: list[float]) -> str:
    """The best value, and the range of those that are as good within the errors."""
    return f"{best:.3g}" if among[0] == among[1] else f"{best:.3g} ({among[0]:.3g} to {among[1]:.3g})"


def plus_minus(pair: tuple[float, float], sign: str = "") -> str:
    return f"{pair[0]:{sign}.1f} ± {pair[1]:.1f}"


def format_table(rows: list[Row]) -> str:
    """Markdown. ± is a standard error; in brackets are values that the search cannot tell from the best one."""
    narrow = [width for width in widths(rows)[:2] if width < widths(rows)[-1]]
    head = ["", "width", "best lr", "best rho", "accuracy %", "without SAM", "gain"]
    head += [f"regret of width {w}'s" for w in narrow]
    lines = []
    for row in rows:
        cells = [row["method"], f"{row['width']}", span(row["lr"], row["lrs"]), span(row["rho"], row["rhos"])]
        cells += [plus_minus(mean_error(row["accuracies"])), plus_minus(mean_error(row["alone"]))]
        cells += [plus_minus(gain(row), "+")]
        cells += [plus_minus(regret(row, w)) if w < row["width"] else "" for w in narrow]
        lines.append(cells)
    return markdown(head, lines)


def format_radii(rows: list[Row]) -> str:
    """Markdown, a line per method: the largest stable rho of each width, and the power of the width that fits them."""
    head = ["largest stable rho", *(f"width {width}" for width in widths(rows)), "grows as"]
    lines = []
    for method in methods(rows):
        mine = of(rows, method)
        radii = [f"{largest_stable_rho(row):.3g}" for row in mine]
        lines.append([method, *radii, f"width^{power_of_the_width(mine):.2f}"])
    return markdown(head, lines)


def format_summary(results: dict[str, list[Row]]) -> str:
    """Markdown, a line per method: accuracies of the widest network of each result."""
    head, lines = [""], {method: [method] for rows in results.values() for method in methods(rows)}
    for title, rows in results.items():
        narrow = f"{widths(rows)[0]}"
        head += [f"{title}: width {narrow}'s (lr, rho)", "best (lr, rho)", "without SAM"]
        for method, cells in lines.items():
            row = of(rows, method)[-1]
            cells += (plus_minus(mean_error(x)) for x in (row["kept"][narrow], row["accuracies"], row["alone"]))
    return markdown(head, [*lines.values()])


def format_variants(rows: list[Row]) -> str:
    """Markdown in the layout of the paper's Table 2, from the rows of one width: accuracy, and gain over SGD."""
    found = {row["method"]: row for row in rows}
    lines = [["without SAM"]]
    for row in (found["SP-naive"], found["muP²"]):
        lines[0] += [plus_minus(mean_error(row["alone"])), f"{row['alone_lr']:.3g}"]
    for name in ("SAM", "SAM-ON", "elementwise", "layerwise"):
        cells = [name]
        for method in ("SP-naive", "muP²"):
            row = found[method if name == "SAM" else f"{method} {name}"]
            accuracy, over = plus_minus(mean_error(row["accuracies"])), plus_minus(gain(row), "+")
            cells += [f"{accuracy} ({over})", f"{row['lr']:.3g}, {row['rho']:.3g}"]
        lines.append(cells)
    return markdown(["", "SP", "lr, rho", "muP²", "lr, rho"], lines)


def what_to_see(rows: list[Row]) -> str:
    """One sentence on the widest network, made of the measured numbers."""
    narrow, wide = widths(rows)[0], widths(rows)[-1]
    if narrow == wide:
        best = max(rows, key=lambda row: statistics.fmean(row["accuracies"]))
        return f"At width {wide}, {best['method']} reaches the most: {plus_minus(mean_error(best['accuracies']))} %."
    lost = {method: regret(of(rows, method)[-1], narrow) for method in methods(rows)}
    parts = ", ".join(f"{plus_minus(pair)} points with {method}" for method, pair in lost.items())
    return f"Keeping the best (lr, rho) of width {narrow} at width {wide} loses {parts}."


def plot(rows: list[Row], setting: Any, path: Path) -> None:
    """A column per method: above lr and rho with the way of the optimum, below accuracy over rho at the best lr."""
    plt = figures.pyplot()
    names = methods(rows)
    size = (max(9.0, 2.6 * len(names) + 0.6), 7.4)
    figure, axes = plt.subplots(2, len(names), figsize=size, squeeze=False, layout="constrained", height_ratios=[1, 1])
    narrow, wide = widths(rows)[0], widths(rows)[-1]
    best = max(accuracy for row in rows if row["width"] == wide for _, _, accuracy in row["grid"])
    for (top, bottom), method in zip(axes.T, names):
        mine = of(rows, method)
        heat_map(top, mine, best)
        curves(bottom, mine)
        lost = plus_minus(regret(mine[-1], narrow))
        top.set_title(f"{TITLES.get(method, method)}\nwidth {narrow}'s optimum\nloses {lost} points")
    means = [mean_error(row["accuracies"])[0] for row in rows]
    plt.setp(axes[1], ylim=(min(means) - 10, max(means) + 2))  # collapsed runs leave the picture
    axes[0, 0].set_ylabel("learning rate")
    axes[1, 0].set_ylabel("test accuracy %")
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    seeds = len(rows[0]["accuracies"])
    spread = f"mean and standard deviation of {seeds} seeds ({min(FEW, seeds)} far from the best)"
    title = [
        f"{NETWORKS[setting.network].title}, {data.title(setting.data)}, {setting.epochs} epochs",
        f"above: accuracy % at width {wide}, and the way of the optimum from width {narrow} to {wide}",
        f"below: accuracy over rho at each width's best lr, {spread}",
    ]
    figure.suptitle("\n".join(textwrap.fill(line, round(9 * size[0])) for line in title))
    figure.savefig(path)
    plt.close(figure)


def heat_map(axis: Any, rows: list[Row], best: float) -> None:
    """Accuracies of the widest network by (rho, lr), where they are known, and the optima of all widths in a row.

    best: the brightest colour's accuracy.
    """
    import numpy as np

    grid = {(lr, rho): accuracy for lr, rho, accuracy in rows[-1]["grid"]}
    points = [*grid, *((row["lr"], row["rho"]) for row in rows)]
    lrs, rhos = (sorted({point[i] for point in points}) for i in (0, 1))
    z = [[grid.get((lr, rho), np.nan) for rho in rhos] for lr in lrs]
    axis.grid(False)
    axis.imshow(z, cmap=figures.SCALE, vmin=best - 8, vmax=best, aspect="auto", origin="lower")
    for (i, lr), (j, rho) in itertools.product(enumerate(lrs), enumerate(rhos)):
        if (accuracy := grid.get((lr, rho))) is not None:
            colour = "black" if accuracy > best - 4 else "white"
            axis.text(j + 0.45, i - 0.33, f"{accuracy:.1f}", ha="right", va="center", fontsize=10, color=colour)
    way = [(rhos.index(row["rho"]), lrs.index(row["lr"])) for row in rows]
    for start, end in itertools.pairwise(way):
        if start != end:
            axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color="black", lw=2, shrinkA=6, shrinkB=6))
    for row, (x, y) in zip(rows, way):
        figures.star(axis, row["width"], x, y)
    every = math.ceil(len(rhos) / 4)
    axis.set_xticks(range(0, len(rhos), every), [f"{rho:.2g}" for rho in rhos[::every]])
    axis.set_yticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
    axis.set_xlabel("rho")


def curves(axis: Any, rows: list[Row]) -> None:
    for row in rows:
        figures.curve(axis, row["width"], dict(row["slice"]), label=f"width {row['width']}")
        figures.star(axis, row["width"], row["rho"], statistics.fmean(row["accuracies"]))
    label = f"best rho of width {rows[0]['width']}"
    axis.axvline(rows[0]["rho"], color="black", linestyle=":", linewidth=1.5, label=label)
    radii = sorted({rho for row in rows for rho, _ in row["slice"]})
    figures.log_axis(axis, radii[:: math.ceil(len(radii) / 4)], digits=2)
    axis.set_xlabel("rho")

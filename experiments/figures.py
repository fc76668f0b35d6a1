"""How the figures look: a width has one colour in all of them, and colour-blind readers can tell the colours apart."""

import math
import statistics
from typing import Any

# Okabe and Ito's colours, without black and yellow.
COLOURS = ("#CC79A7", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
SCALE = "cividis"  # of heat maps


def pyplot() -> Any:
    """matplotlib.pyplot, which needs no display and draws in this style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "savefig.dpi": 110} | style)
    return plt


def look_of(width: int) -> dict[str, Any]:
    """Colour and marker of a width, for plot(). They are the same in all figures, and differ within six octaves."""
    i = round(math.log2(width)) % len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i]}


def curve(axis: Any, width: int, points: dict[float, list[float]], **options: Any) -> None:
    """Mean over seeds, and a band of one standard deviation. points: x -> values over seeds."""
    import numpy as np

    mean = np.array([statistics.fmean(values) for values in points.values()])
    std = np.array([statistics.stdev(values) if len(values) > 1 else 0.0 for values in points.values()])
    look = look_of(width)
    axis.plot(list(points), mean, markersize=5, linewidth=1.8, **look, **options)
    axis.fill_between(list(points), mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)


def star(axis: Any, width: int, x: float, y: float) -> None:
    """Marks an optimum."""
    axis.plot(x, y, marker="*", markersize=16, markeredgecolor="black", color=look_of(width)["color"], zorder=5)


def log_axis(axis: Any, ticks: list[float], digits: int = 3) -> None:
    """Make x logarithmic, with these ticks only, written as plain numbers."""
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.{digits}g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())

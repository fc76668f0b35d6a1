"""The table and the figure of experiments.frontier."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from experiments import figures
from experiments.commands import markdown
from experiments.sweep import WAYS

Row = dict[str, Any]  # as Frontier.rows() makes it
BASE, LONGER = "base", "longer"  # ways without SAM: the base optimizer, and the same for twice as many epochs
ENOUGH = 0.8  # of SAM's gain
ALONE = {BASE: "without SAM", LONGER: "without SAM, twice the epochs"}


class Kind(NamedTuple):
    """Ways that have a colour, a marker and a line in common."""

    title: str
    ways: tuple[str, ...]
    colour: str
    marker: str
    beside: tuple[int, int] = (7, 5)  # where labels are, in points from the marker; to its left if negative


KINDS = [
    Kind(ALONE[BASE], (BASE, LONGER), "black", "X"),
    Kind("SAM", ("sam",), figures.COLOURS[1], "*"),
    Kind("SAM in every k-th step", ("interval-8", "interval-4", "interval-2"), figures.COLOURS[3], "o", (7, -13)),
    Kind("first pass on a part of the batch", ("part-32", "part-16", "part-4"), figures.COLOURS[4], "s", (-7, 5)),
    Kind("every 4th step, 1/4 of the batch", ("interval-4-part-4",), figures.COLOURS[5], "P"),
    Kind("SAM late in training", ("late-4", "late-2"), figures.COLOURS[2], "^", (-7, -13)),
    Kind("momentum in place of a first pass", ("momentum",), figures.COLOURS[0], "D"),
]


def title(way: str) -> str:
    return ALONE.get(way) or WAYS[way].title


def label(way: str) -> str:
    """Beside a point of the figure, whose kind the legend names."""
    if way in (BASE, "sam", "interval-4-part-4", "momentum"):
        return ""
    if way == LONGER:
        return "twice the\nepochs"
    w = WAYS[way]
    return w.title if w.late < 1 else f"k = {w.interval}" if w.interval > 1 else f"1/{w.part}"


def in_order(rows: list[Row]) -> list[Row]:
    """The cheapest ways first."""
    return sorted(rows, key=lambda row: (row["passes"], -row["accuracy"]))


def kept(row: Row) -> str:
    """The share of SAM's gain, with its standard error. Empty where this says nothing."""
    if row["kept"] is None or row["way"] in (BASE, "sam"):
        return ""
    return f"{100 * row['kept']:.0f} ± {100 * row['kept_error']:.0f} %"


def format_table(rows: list[Row], wide: int) -> str:
    """Markdown. wide: the width of the second column of times."""
    head = ["", "passes per step", "time", f"time at width {wide}", "lr", "rho", "accuracy % (± standard error)"]
    lines = []
    for r in in_order(rows):
        accuracy = f"{r['accuracy']:.2f} ± {r['error']:.2f} ({r['seeds']})"
        numbers = [f"{r[key]:.2f}" for key in ("passes", "time", "wide_time")]
        rho = f"{r['rho']:.3g}" if r["rho"] else ""
        lines.append([title(r["way"]), *numbers, f"{r['lr']:g}", rho, accuracy, kept(r)])
    return markdown([*head, "of SAM's gain"], lines)


def format_summary(settings: dict[str, list[Row]], chosen: tuple[str, ...] = ()) -> str:
    """Markdown: each way's time at the large width, and the share of SAM's gain that it keeps, in each setting.

    settings: the rows by the setting's title. chosen: the ways; default all.
    """
    lines = []
    ways = {row["way"]: row for rows in settings.values() for row in rows if not chosen or row["way"] in chosen}
    by_way = [{row["way"]: row for row in rows} for rows in settings.values()]
    for way, any_row in sorted(ways.items(), key=lambda item: (item[1]["passes"], [*ALONE, *WAYS].index(item[0]))):
        cells = [summary_cell(rows[way]) if way in rows else "" for rows in by_way]
        lines.append([title(way), f"{any_row['passes']:.2f}", *cells])
    return markdown(["", "passes per step", *settings], lines)


def what_to_see(rows: list[Row]) -> str:
    """One sentence: what SAM gains, and the cheapest way that keeps enough of it."""
    by_way = {row["way"]: row for row in rows}
    gained = f"SAM gains {by_way['sam']['accuracy'] - by_way[BASE]['accuracy']:.1f} points for two passes per step"
    good = [row for row in in_order(rows) if row["way"] not in (*ALONE, "sam") and (row["kept"] or 0) >= ENOUGH]
    if not good:
        return f"{gained}, and no way with fewer passes keeps {100 * ENOUGH:.0f} % of this."
    fewest = f"the fewest passes that keep at least {100 * ENOUGH:.0f} % of this are {good[0]['passes']:.2f}"
    return f"{gained}; {fewest}: {title(good[0]['way'])} keeps {kept(good[0])}."


def summary_cell(row: Row) -> str:
    accuracy = f"{row['accuracy']:.1f} % accuracy" if row["way"] in (BASE, "sam") else kept(row)
    return f"{row['wide_time']:.2f}: {accuracy}"


def plot(rows: list[Row], heading: str, path: Path) -> None:
    """Accuracy over passes per step, with standard errors. Dashed lines: without SAM, and SAM."""
    plt = figures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.6), layout="constrained")
    by_way = {row["way"]: row for row in rows}
    base, sam, longer = (by_way[way]["accuracy"] for way in (BASE, "sam", LONGER))
    if longer < (low := base - abs(sam - base)):  # it would squeeze all other points together
        del by_way[LONGER]
        words = f"twice the epochs\nwithout SAM: {longer:.1f} ↓"
        axis.annotate(words, (2.0, low), ha="center", va="bottom", fontsize=10, color="#333333")
        axis.plot(2.0, low, alpha=0)  # the words are inside the figure
    for kind in KINDS:
        found = [by_way[way] for way in kind.ways if way in by_way]
        if found:
            points(axis, kind, found)
    for way in (BASE, "sam"):
        axis.axhline(by_way[way]["accuracy"], color="grey", linestyle="--", linewidth=1, zorder=0)
    axis.set(xlabel="forward and backward passes per step", ylabel="test accuracy %", xlim=(0.92, 2.12))
    axis.legend(fontsize=10, loc="best")
    seeds = rows[0]["seeds"]
    axis.set_title(
        f"{textwrap.fill(heading, 76)}\nmean and standard error of {seeds} seeds; lr and rho are tuned for each way"
    )
    figure.savefig(path)
    plt.close(figure)


def points(axis: Any, kind: Kind, rows: list[Row]) -> None:
    from matplotlib.patheffects import withStroke

    x, y = ([row[key] for row in rows] for key in ("passes", "accuracy"))
    look = dict(color=kind.colour, marker=kind.marker, markersize=13 if kind.marker == "*" else 8)
    look |= dict(linewidth=1.2 if BASE not in kind.ways else 0, elinewidth=1.5, capsize=3)
    axis.errorbar(x, y, yerr=[row["error"] for row in rows], label=kind.title, **look)
    options = dict(xytext=kind.beside, textcoords="offset points", ha="left" if kind.beside[0] > 0 else "right")
    options |= dict(fontsize=10, color="#333333", path_effects=[withStroke(linewidth=3, foreground="white")], zorder=6)
    for row in rows:
        axis.annotate(label(row["way"]), (row["passes"], row["accuracy"]), **options)

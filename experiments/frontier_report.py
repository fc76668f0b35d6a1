"""The table and the figure of experiments.frontier."""

from pathlib import Path
from typing import Any, NamedTuple

from experiments import figures
from experiments.sweep import WAYS

Row = dict[str, Any]  # as Frontier.rows() makes it
BASE, LONGER = "base", "longer"  # ways without SAM: the base optimizer, and the same for twice as many epochs
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
    Kind("SAM in every k-th step", ("interval-8", "interval-4", "interval-2"), figures.COLOURS[3], "o"),
    Kind("first pass on a part of the batch", ("part-32", "part-16", "part-4"), figures.COLOURS[4], "s", (7, -13)),
    Kind("both of these", ("interval-4-part-4",), figures.COLOURS[5], "P", (-7, 5)),
    Kind("SAM late in training", ("late-4", "late-2"), figures.COLOURS[2], "^", (7, -13)),
    Kind("momentum in place of a first pass", ("momentum",), figures.COLOURS[0], "D"),
]


def title(way: str) -> str:
    return ALONE.get(way) or WAYS[way].title


def label(way: str) -> str:
    """Beside a point of the figure, whose kind the legend names."""
    if way in (BASE, "sam", "momentum"):
        return ""
    if way == LONGER:
        return "twice the\nepochs"
    w = WAYS[way]
    parts = [f"k = {w.interval}"] * (w.interval > 1) + [f"1/{w.part}"] * (w.part > 1) + [w.title] * (w.late < 1)
    return ", ".join(parts)


def format_table(rows: list[Row]) -> str:
    """Markdown, the cheapest ways first."""
    head = "| | passes | time | lr | rho | accuracy % (± standard error) | of SAM's gain |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda row: (row["passes"], -row["accuracy"])):
        error = "" if r["error"] is None else f" ± {r['error']:.2f}"
        accuracy = f"{r['accuracy']:.2f}{error} ({r['seeds']})"
        kept = "" if r["kept"] is None or r["way"] in (BASE, "sam") else f"{100 * r['kept']:.0f} %"
        rho = f"{r['rho']:.3g}" if r["rho"] else ""
        numbers = f"{r['passes']:.2f} | {r['time']:.2f} | {r['lr']:g} | {rho} | {accuracy} | {kept} |"
        lines.append(f"| {title(r['way'])} | {numbers}")
    return "\n".join(lines)


def plot(rows: list[Row], heading: str, path: Path) -> None:
    """Accuracy over passes per step, with standard errors. Dashed lines: without SAM, and SAM."""
    plt = figures.pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.6), layout="constrained")
    by_way = {row["way"]: row for row in rows}
    for kind in KINDS:
        found = [by_way[way] for way in kind.ways if way in by_way]
        if found:
            points(axis, kind, found)
    for way in (BASE, "sam"):
        axis.axhline(by_way[way]["accuracy"], color="grey", linestyle="--", linewidth=1, zorder=0)
    axis.set(xlabel="forward and backward passes per step", ylabel="test accuracy %", xlim=(0.92, 2.12))
    axis.legend(fontsize=10, loc="best")
    seeds = rows[0]["seeds"]
    axis.set_title(f"{heading}\nmean and standard error of {seeds} seeds; lr and rho are tuned for each way")
    figure.savefig(path)


def points(axis: Any, kind: Kind, rows: list[Row]) -> None:
    from matplotlib.patheffects import withStroke

    x, y = ([row[key] for row in rows] for key in ("passes", "accuracy"))
    look = dict(color=kind.colour, marker=kind.marker, markersize=13 if kind.marker == "*" else 8)
    look |= dict(linewidth=1.2 if BASE not in kind.ways else 0, elinewidth=1.5, capsize=3)
    axis.errorbar(x, y, yerr=[row["error"] or 0 for row in rows], label=kind.title, **look)
    options = dict(xytext=kind.beside, textcoords="offset points", ha="left" if kind.beside[0] > 0 else "right")
    options |= dict(fontsize=10, color="#333333", path_effects=[withStroke(linewidth=3, foreground="white")], zorder=6)
    for row in rows:
        axis.annotate(label(row["way"]), (row["passes"], row["accuracy"]), **options)

"""The result of a check as text, a table and below it what to change, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from mup2_fused.check.judge import Row
from mup2_fused.check.measure import QUANTITIES, WHOLE

# Okabe and Ito's colors, which people with any color vision can tell apart, and a marker for each role.
STYLES = {
    "input": ("#0072B2", "o"),
    "hidden": ("#E69F00", "s"),
    "output": ("#009E73", "^"),
    "finite": ("#999999", "D"),
    "": ("#000000", "v"),
}
TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Report(NamedTuple):
    """What was measured; print(report) shows the table and the advice."""

    widths: list[int]
    rows: list[Row]
    notes: list[str]  # on several rows together

    @property
    def passed(self) -> bool:
        return not any(row.wrong or row.unclear for row in self.rows)

    def __str__(self) -> str:
        heading = f"powers of the width, measured at {', '.join(map(str, self.widths))} (in brackets: with muP²)"
        return "\n".join([heading, *_table(self.rows), "", *_remarks(self), _verdict(self.rows)])


def _table(rows: list[Row]) -> list[str]:
    lines: list[tuple[str, ...]] = [("parameter", "shape", "role", *QUANTITIES, "")]
    for r in rows:
        lines.append((r.name, "x".join(map(str, r.shape)), r.role, *[str(r.slopes[q]) for q in QUANTITIES], _word(r)))
    sizes = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(line, sizes)).rstrip() for line in lines]


def _word(r: Row) -> str:
    if r.wrong or r.unclear:
        return ", ".join([f"{q} wrong" for q in r.wrong] + [f"{q} unclear" for q in r.unclear])
    if all(math.isnan(r.slopes[q].value) for q in ("update", "perturbation")):
        return "no gradient"
    return "" if r.name == WHOLE else "ok"


def _remarks(report: Report) -> list[str]:
    wrong = [r for r in report.rows if r.wrong]
    out = [f"* {note}" for note in report.notes]
    for advice in dict.fromkeys(a for r in wrong for a in r.advice):
        names = [r.name for r in wrong if advice in r.advice]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        out.append(f"* {', '.join(names[:4])}{more}: {advice}")
    if any(r.wrong for r in report.rows[:-1]):
        out.append("* or a role in the table is wrong: roles={name: role} (--roles name=role) settles it")
    if unclear := sum(bool(r.unclear) for r in report.rows):
        out.append(f"* {unclear} rows are too noisy to tell: use more --seeds, a larger --batch or more --widths")
    return out


def _verdict(rows: list[Row]) -> str:
    count, wrong = len(rows) - 1, sum(bool(r.wrong) for r in rows[:-1])
    if wrong:
        return f"FAILED: {wrong} of {count} parameters"
    if rows[-1].wrong:
        return "FAILED: the network's output"
    unclear = sum(bool(r.unclear) for r in rows)
    return f"UNCLEAR: {unclear} of {count} parameters" if unclear else f"Passed: {count} parameters"


def plot(report: Report, path: str | Path) -> None:
    """Each quantity against the width, relative to the narrowest, with a line for each parameter; wrong ones dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(QUANTITIES), figsize=(16, 4), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, QUANTITIES):
        labels: set[str] = set()
        for row in report.rows:
            if row.values[quantity]:
                _line(axis, report.widths, row, quantity, labels)
        axis.set_title(quantity)
        axis.set_xlabel("width")
        axis.set_xticks(report.widths, [str(w) for w in report.widths])
        axis.minorticks_off()
        if labels:
            axis.legend(fontsize=8)
    low, high = axes[0].get_ylim()
    low, high = min(low, 0.3), max(high, 3)
    axes[0].set_ylim(low, high)
    ticks = [t for t in TICKS if low <= t <= high]
    axes[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].set_ylabel(f"relative to width {report.widths[0]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axis: Any, widths: list[int], row: Row, quantity: str, labels: set[str]) -> None:
    """labels: those that the legend has already, to which the new one is added."""
    wrong = quantity in row.wrong
    label = (row.role or "network output") + (", wrong" if wrong else "")
    color, marker = STYLES[row.role]
    y = [value / row.values[quantity][0] for value in row.values[quantity]]
    style = dict(color=color, marker="x" if wrong else marker, linestyle="--" if wrong else "-", markersize=4)
    axis.loglog(widths, y, alpha=0.9 if wrong else 0.5, label=None if label in labels else label, **style)
    labels.add(label)

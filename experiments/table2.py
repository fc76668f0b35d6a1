"""Table 2 of the paper from finished runs of experiments.vision: what SAM and its variants gain, in SP and in muP².

python -m experiments.table2 OUT_DIR                 the --out of those runs; prints Markdown
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from experiments.commands import SettingsError, command, reading, start

ROWS = {"sam": "SAM", "sam-on": "SAM-ON", "elementwise": "elementwise ASAM", "layerwise": "layerwise ASAM"}
BASES = {"sgd": "SGD", "adamw": "AdamW"}
COLUMNS = {("sp", "naive"): "SP", ("mup", "effective"): "muP²"}  # by parameterization and perturbation scaling
ONE_TABLE = ("model", "depth", "heads", "patch", "data", "width_multiplier", "epochs", "base")
REPEATED = ("seed", "workers", "reference")  # in which runs may differ and still be repetitions of each other
CAPTION = (
    "Test accuracy in % of the best epoch: mean ± standard deviation (number of runs), and the gain over the base\n"
    "optimizer alone in the same parameterization. Where a cell has several settings, the one with the best mean is\n"
    "shown; it is selected by test accuracy, as in the paper. A setting with a diverged run does not compete."
)


class Cell(NamedTuple):
    """Runs that differ in nothing but the seed."""

    accuracies: list[float]  # of the best epochs, in %
    lr: float
    rho: float | None  # None: the base optimizer alone

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    def __str__(self) -> str:
        std = f" ± {statistics.stdev(self.accuracies):.2f}" if len(self.accuracies) > 1 else ""
        return f"{self.mean:.2f}{std} ({len(self.accuracies)})"


def best_cell(results: list[dict[str, Any]]) -> Cell | None:
    """The setting with the best mean among those without a diverged run; None if there is none."""
    groups = defaultdict(list)
    for result in results:
        setting = {k: v for k, v in result["settings"].items() if k not in REPEATED}
        groups[json.dumps(setting, sort_keys=True)].append(result)
    cells = []
    for runs in groups.values():
        if not any(r["diverged"] for r in runs):
            lr, rho = (runs[0]["settings"][name] for name in ("lr", "rho"))
            cells.append(Cell([r["best_test_accuracy"] for r in runs], lr, rho))
    return max(cells, key=lambda cell: cell.mean, default=None)


def table(results: list[dict[str, Any]], base: str) -> str:
    """Markdown; all results share the settings of ONE_TABLE."""
    cells: dict[tuple[str, str], list] = defaultdict(list)
    for result in results:
        s = result["settings"]
        for (parameterization, perturbation), column in COLUMNS.items():
            if s["parameterization"] == parameterization and s["perturbation"] in (perturbation, None):
                cells[s["variant"], column].append(result)
    head = ["", *(head for column in COLUMNS.values() for head in (column, "gain", "lr, rho"))]
    lines = [head, ["---"] * len(head)]
    for variant, title in {"none": BASES[base], **ROWS}.items():
        line = [title]
        for column in COLUMNS.values():
            cell, alone = best_cell(cells[variant, column]), best_cell(cells["none", column])
            gain = f"{cell.mean - alone.mean:+.2f}" if cell and alone and variant != "none" else "-"
            at = "-" if cell is None else f"{cell.lr:.4g}" + ("" if cell.rho is None else f", {cell.rho:.4g}")
            line += [str(cell or "-"), gain, at]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(shared: dict[str, Any]) -> str:
    vit = shared["model"] == "vit"
    sizes = "{depth} layers, {heads} heads, patches of {patch[0]} x {patch[1]}, ".format(**shared) if vit else ""
    return "{model} on {data}, {0}width multiplier {width_multiplier:g}, {epochs} epochs".format(sizes, **shared)


def read_result(path: Path) -> dict[str, Any]:
    with reading(path, "remove this file, and experiments.vision goes on with its run"):
        result = json.loads(path.read_bytes())
        s = result["settings"]
        (
            title({k: s[k] for k in ONE_TABLE}),
            table([result], s["base"]),
            result["diverged"],
        )  # an error if one is missing
        return result


@command("start the command again")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args(argv)
    tables, diverged, others = defaultdict(list), [], 0
    for path in sorted(args.out_dir.glob("*/result.json")):
        result = read_result(path)
        s = result["settings"]
        if s["perturbation"] is not None and (s["parameterization"], s["perturbation"]) not in COLUMNS:
            others += 1
            continue
        tables[json.dumps({k: s[k] for k in ONE_TABLE})].append(result)
        if result["diverged"]:
            diverged.append(path.parent.name)
    if not tables:
        raise SettingsError(f"no finished runs of SP or muP² in {args.out_dir}")
    for key, results in sorted(tables.items()):
        shared = json.loads(key)
        print(f"### {title(shared)}\n\n{table(results, shared['base'])}\n")
    print("\n".join([CAPTION, *(f"diverged: {name}" for name in diverged)]))
    if others:
        print(f"not shown: {others} runs with another perturbation scaling")
    return 0


if __name__ == "__main__":
    start(main)

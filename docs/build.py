"""Writes the tables of README.md and docs/*.md from the committed result files.

python -m docs.build    rewrites what stands between <!-- table: NAME --> and <!-- end -->
"""

import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import a10g, step_kinds, step_time
from experiments import demo, epoch_time_tables, frontier, frontier_report, frontier_transfer, sweep, transfer_report
from experiments.commands import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS, TIMES = ROOT / "experiments" / "results", ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def caption(sentence: str) -> str:
    """What stands under a figure."""
    return textwrap.fill(f"*{sentence}*", 120, break_on_hyphens=False)


def span(values: list[float]) -> str:
    """Smallest and largest value, as text."""
    low, high = (f"{x:.0f}" if x >= 10 else f"{x:.2f}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# ------------------------------------------------------------------------------------------- accuracy and theory


def transfer_rows(name: str) -> list[transfer_report.Row]:
    return load(RESULTS / f"transfer_{name}.json")["rows"]


def transfer_tables() -> dict[str, Callable[[], str]]:
    """By the setting's name: its tables, and the sentence below its figure."""
    tables: dict[str, Callable[[], str]] = {}
    for name in (path.stem for path in sorted(RESULTS.glob("transfer_*.json"))):
        rows = partial(transfer_rows, name.partition("_")[2])
        if name == "transfer_table2":
            tables[name] = lambda rows=rows: transfer_report.format_variants(rows())
            continue
        tables |= {name: lambda rows=rows: transfer_report.format_table(rows())}
        tables |= {f"{name}_radii": lambda rows=rows: transfer_report.format_radii(rows())}
        tables |= {f"{name}_caption": lambda rows=rows: caption(transfer_report.what_to_see(rows()))}
    return tables


def demo_runs() -> dict[str, demo.Seen]:
    """What the committed runs of the demo show, by method."""
    runs = sweep.read_runs(RESULTS / "demo.jsonl")
    methods = dict.fromkeys(run.method for run in runs)
    widths, rhos, seeds = (sorted({getattr(run, key) for run in runs}) for key in ("width", "rho", "seed"))
    return {method: demo.seen(runs, method, widths, rhos, len(seeds)) for method in methods}


def demo_caption() -> str:
    """The sentence below the README's picture."""
    found = demo_runs()
    plain, mup2 = found["SP-naive"], found["muP²"]
    return (
        f"*Test accuracy over the radius rho, one curve per width. The radius that is best at width {plain.narrow} "
        f"(dotted line), kept at\nwidth {plain.wide}, gives {plain.kept:.1f} % with plain SAM, {plain.cost:.1f} points "
        f"less than the best radius, and {mup2.kept:.1f} % with muP², {mup2.cost:.1f} points less.*"
    )


def demo_table() -> str:
    """Every method's best rho and accuracy at each width, and with the narrowest width's best rho."""
    lines = []
    for method, x in demo_runs().items():
        for width in x.points:
            rho, best, kept = x.best_rho(width), x.mean(width, x.best_rho(width)), x.mean(width, x.best_rho(x.narrow))
            lines.append([method, f"{width}", f"{rho:.2g}", f"{best:.1f}", f"{kept:.1f}", f"{best - kept:.1f}"])
    return markdown(["", "width", "best rho", "accuracy %", "with the narrow network's rho", "cost"], lines)


def exponents() -> str:
    """A sentence, not a table."""
    result = load(RESULTS / "exponents.json")
    rows, first, last = len(result["rows"]), result["widths"][0], result["widths"][-1]
    return (
        f"In all {rows} rows of the paper's tables and of Algorithm 1 that were measured, at widths {first} to {last}, "
        f"the predicted\nexponents of the width are right within {math.ceil(1000 * result['worst']) / 1000:.3f}."
    )


FRONTIERS = {name: load(RESULTS / f"frontier_{name}.json") for name in frontier.SETTINGS}


def frontier_tables() -> dict[str, Callable[[], str]]:
    """By the setting's name: its table, and the sentence below its figure."""
    tables: dict[str, Callable[[], str]] = {}
    for name, result in FRONTIERS.items():
        rows, wide = result["rows"], result["setting"]["wide"]
        tables[f"frontier_{name}"] = partial(frontier_report.format_table, rows, wide)
        tables[f"frontier_{name}_caption"] = lambda rows=rows: caption(frontier_report.what_to_see(rows))
    return tables


def frontier_summary(chosen: tuple[str, ...] = ()) -> str:
    return frontier_report.format_summary({r["setting"]["title"]: r["rows"] for r in FRONTIERS.values()}, chosen)


# ------------------------------------------------------------------------------------------- speed

Case = dict[str, dict[str, Any]]  # implementation -> its row, for one model, dtype and base optimizer


def step_time_results() -> list[dict[str, Any]]:
    """One result per device."""
    return [load(path) for path in sorted(TIMES.glob("*.json")) if path.name != a10g.OUT.name]


def cases(result: dict[str, Any], dtype: str = "", base: str = "", tiny: bool | None = None) -> list[Case]:
    """The cases of this dtype and base optimizer, all if not given; tiny: of the tiny model, or of the others."""
    found: dict[tuple, Case] = {}
    for row in result["rows"]:
        if dtype in ("", row["dtype"]) and base in ("", row["base"]) and tiny in (None, row["model"] == "mlp-tiny"):
            found.setdefault((row["model"], row["dtype"], row["base"]), {})[row["implementation"]] = row
    return list(found.values())


def gain(case: Case) -> float:
    """How many times faster ours is than the best of all others."""
    return min(row["speedup"] for name, row in case.items() if name != step_time.OURS)


def step_times() -> str:
    """Every device with a result file: what it is, and its table."""
    parts = []
    for result in step_time_results():
        about = result["machine"]
        kernels = f"{about['threads']} threads, {about['cpu_kernels']} kernels, torch {about['torch']}"
        parts += [f"{about['device']}, {kernels}, measured on {about['date']}:", step_time.markdown_table(result)]
    return "\n\n".join(parts)


def step_time_summary() -> str:
    """What the table of step times says, in a few lines for every device."""
    lines = []
    for result in step_time_results():
        device, large = result["machine"]["device"], list(map(gain, cases(result, tiny=False)))
        for dtype in ("fp32", "bf16"):
            over_floor = [case[step_time.OURS]["ratio"] for case in cases(result, dtype, tiny=False)]
            lines.append([device, f"time over the floor, {dtype}, without mlp-tiny", span(over_floor)])
        for peer in ("mup2_ref", "pytorch_optimizer"):
            faster = [case[peer]["speedup"] for case in cases(result) if peer in case]
            lines.append([device, f"speed over {peer}", span(faster)])
        lines.append(
            [device, "speed over the best alternative, mlp-tiny", span(list(map(gain, cases(result, tiny=True))))]
        )
        lines.append([device, "the same, other models", span(large)])
        lines.append([device, "geometric mean of the latter", f"{statistics.geometric_mean(large):.2f}"])
    return markdown(["device", "the compiled kernels'", "factor"], lines)


def key_speed() -> str:
    """float32 with SGD on the CPU: ours, the reference, and the best of the others."""
    head = ["model", "parameters", "compiled", "reference", "best alternative", "best alternative / compiled"]
    (result,) = (r for r in step_time_results() if r["knobs"]["device"] == "cpu")
    lines = []
    for case in cases(result, "fp32", "sgd"):
        ours, best = case[step_time.OURS], gain(case)
        ms = (ours["sum_ms"], case["mup2_ref"]["sum_ms"], best * ours["sum_ms"])
        times = map(epoch_time_tables.three_digits, ms)
        lines.append([ours["model"], f"{ours['params'] / 1e6:.3g} M", *times, f"{best:.2f}"])
    about = f"{result['machine']['device']}, {result['machine']['threads']} threads, {result['machine']['date']}:"
    return f"{about}\n\n{markdown(head, lines)}"


def training_times(form: Callable[[list[dict[str, Any]]], str]) -> str:
    """Every device with a result file of experiments/epoch_time.py."""
    parts = []
    for path in sorted(RESULTS.glob("epoch_time_*.json")):
        result = load(path)
        first = result["rows"][0]
        about = f"{first['threads']} threads, torch {first['torch']}, median of {first['steps']} steps"
        parts += [f"{result['device']}, {about}, {first['date']}:", form(result["rows"])]
    return "\n\n".join(parts)


def step_kinds_table() -> str:
    parts = []
    for path in sorted((TIMES / "kinds").glob("*.json")):
        result = load(path)
        about = result["machine"]
        parts += [f"{about['device']}, {about['threads']} threads, {about['date']}:", step_kinds.markdown_table(result)]
    return "\n\n".join(parts)


def a10g_tables() -> str:
    """Without the kernels' rows in bfloat16."""
    result = load(a10g.OUT)
    return a10g.markdown_table(result | {"kernels": [row for row in result["kernels"] if row["dtype"] == "fp32"]})


# ------------------------------------------------------------------------------------------- pages

TABLES: dict[str, Callable[[], str]] = {
    **transfer_tables(),
    "demo_caption": demo_caption,
    "frontier": frontier_summary,
    "key_frontier": partial(frontier_summary, ("base", "momentum", "interval-8", "interval-4", "sam")),
    **frontier_tables(),
    "frontier_transfer": lambda: frontier_transfer.format_table(
        load(RESULTS / "frontier_transfer_mnist1d-momentum.json")["rows"]
    ),
    "demo": demo_table,
    "key_transfer": lambda: transfer_report.format_summary(
        {"Fashion-MNIST": transfer_rows("fashion"), "MNIST-1D": transfer_rows("mnist1d")}
    ),
    "exponents": exponents,
    "step_times": step_times,
    "step_time_summary": step_time_summary,
    "key_speed": key_speed,
    "epochs": partial(training_times, epoch_time_tables.format_table),
    "steps": partial(training_times, epoch_time_tables.format_steps),
    "step_kinds": step_kinds_table,
    "a10g": a10g_tables,
}


def fill(text: str) -> str:
    """The page with every table as it should be. Raises ValueError for a marker that names no table."""

    def table(match: re.Match) -> str:
        start, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; a page may have {', '.join(TABLES)}")
        return f"{start}{TABLES[name]()}\n{end}"

    return BLOCK.sub(table, text)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if (filled := fill(text)) != text:
            page.write_text(filled)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()

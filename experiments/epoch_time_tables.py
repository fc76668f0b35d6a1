"""The tables of experiments.epoch_time, in Markdown, from its rows."""

from typing import Any

from experiments.commands import markdown

WAYS = {  # of taking a training step
    "base": "base optimizer",
    "reference": "SAM, reference",
    "fused": "SAM, compiled",
    "graph": "SAM, compiled, CUDA graph",
}


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def problem(way: dict[str, Any]) -> str:
    return "out of memory" if way["error"] == "out of memory" else "failed"


def ratio(way: dict[str, Any], base: dict[str, Any]) -> str:
    return f"{way['step'] / base['step']:.2f}" if "step" in way and "step" in base else "-"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Seconds of one epoch. SAM is the compiled one where it is built."""
    head = ["model", "width multiplier", "parameters", "batch", "base optimizer", "SAM", "SAM / base"]
    lines = []
    for r in rows:
        base, sam = r["ways"]["base"], r["ways"].get("fused") or r["ways"]["reference"]
        epochs = [three_digits(r["steps_per_epoch"] * w["step"]) if "step" in w else problem(w) for w in (base, sam)]
        sizes = [f"{r['width_multiplier']:g}", f"{r['parameters'] / 1e6:.3g} M", r["batch_size"]]
        lines.append([r["preset"], *sizes, *epochs, ratio(sam, base)])
    return markdown(head, lines)


def format_steps(rows: list[dict[str, Any]]) -> str:
    """A line for each way to take a training step. in SAM: the part of the step in SAM's own two calls."""
    head = ["model", "width", "batch", "precision", "training step", "ms", "steps/s", "/ base", "in SAM", "peak GiB"]
    lines = []
    for r in rows:
        precision = "fp32" if r["amp"] == "none" else r["amp"]
        for name, way in r["ways"].items():
            if "step" in way:
                share = "-" if way["share"] is None else f"{100 * way['share']:.0f} %"
                memory = "-" if way["memory"] is None else f"{way['memory'] / 2**30:.2f}"
                cells = [three_digits(1000 * way["step"]), three_digits(1 / way["step"])]
                cells += [ratio(way, r["ways"]["base"]), share, memory]
            else:
                cells = [problem(way), *"----"]
            lines.append([r["preset"], r["width"], r["batch_size"], precision, WAYS[name], *cells])
    return markdown(head, lines)

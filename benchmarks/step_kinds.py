"""Time of SAM's own part in every kind of step, beside a step of torch's fused base optimizer.

    python -m benchmarks.step_kinds                          some models on the CPU, a few minutes
    python -m benchmarks.step_kinds --device cuda --models resnet18-w4 vit-b16

The kinds are a step without SAM between those of an interval, a step that climbs by momentum, and a SAM step. No model
runs: see benchmarks.step_time, whose shapes and clocks are used. All take turns, in an order that rotates, and the
ratio to the fused base optimizer is the median of the ratios within a round. Bytes are those that the step must move,
per float32 parameter; the base optimizer moves as many as a step without SAM.
"""

import argparse
import gc
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.step_time import BASES, WARMUP, cpu_clock, cuda_clock, machine
from benchmarks.subjects import MODELS, OURS, count, from_package
from experiments.commands import markdown, write_json

FUSED = "fused base optimizer"
KINDS: dict[str, dict[str, Any]] = {
    "without SAM": dict(interval=10**9),  # all steps but the first one
    "momentum": dict(ascent="momentum"),
    "SAM": {},
}
BYTES = {"sgd": (20, 20, 36, 40), "adamw": (28, 28, 44, 48)}  # of the fused base optimizer and of the kinds


def optimizers(model: str, base: str, device: str) -> dict[str, Any]:
    """Each with parameters of its own. They share gradients, which stay the same."""
    random = torch.Generator(device).manual_seed(0)
    grads = [0.01 * torch.randn(shape, generator=random, device=device) for shape in MODELS[model]]

    def params() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(0.02 * torch.randn_like(g)) for g in grads]
        for p, g in zip(made, grads):
            p.grad = g
        return made

    kind, options = BASES[base]
    fused = kind(params(), fused=True, **options)
    found = {FUSED: SimpleNamespace(first_step=lambda: None, second_step=fused.step)}
    for name, own in KINDS.items():
        found[name] = from_package(OURS, params(), kind, rho=0.05, backend="compiled", **options, **own)
    return found


def rows(model: str, base: str, args: argparse.Namespace, clock: Callable) -> list[dict[str, Any]]:
    """One row for each kind of step. ms: the median of first_step() and second_step() together."""
    gc.collect()
    subjects = optimizers(model, base, args.device)
    names, times = list(subjects), {name: [] for name in subjects}
    for i in range(-WARMUP, args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            ms = clock(subjects[name].first_step)[0] + clock(subjects[name].second_step)[0]
            times[name] += [ms] if i >= 0 else []
    key = {"model": model, "params": count(MODELS[model]), "base": base}
    found = []
    for name, moved in zip(names, BYTES[base]):
        ratio = statistics.median(ms / fused for ms, fused in zip(times[name], times[FUSED]))
        row = key | {"kind": name, "bytes": moved, "ms": statistics.median(times[name]), "ratio": ratio}
        found.append(row | {"over_floor": ratio * BYTES[base][0] / moved})
    return found


def markdown_table(result: dict[str, Any]) -> str:
    head = ["model", "parameters", "base", "kind of step", "bytes", "ms"]
    lines = []
    for r in result["rows"]:
        cells = [r["model"], f"{r['params'] / 1e6:.3g} M", r["base"], r["kind"], r["bytes"], f"{r['ms']:.3g}"]
        lines.append([*cells, f"{r['ratio']:.2f}", f"{r['over_floor']:.2f}"])
    return markdown([*head, "of the fused base optimizer", "over the floor"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["mlp-tiny", "resnet18", "vit-s16", "mlp-4096"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    args = parser.parse_args()
    clock = cuda_clock() if args.device == "cuda" else cpu_clock
    cases = itertools.product(args.models, BASES)
    result = {"machine": machine(args.device), "rows": [row for case in cases for row in rows(*case, args, clock)]}
    print(markdown_table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)


if __name__ == "__main__":
    main()

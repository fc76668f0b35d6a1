"""Table G.3 of the paper: the training time of one epoch, by model and width, with the base optimizer and with SAM.

    python experiments/epoch_time.py                                                   on the GPU, if there is one
    python experiments/epoch_time.py --presets resnet18-digits --width-multipliers 0.125 0.25 --out

Times training steps on one synthetic batch that is already on the device, in the shape of the preset's data set, and
multiplies the median by the number of steps in an epoch of the real one: reading and augmenting data, and evaluation,
are not in it.
"""

import argparse
import math
import re
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data as datasets
import mup2_ref
import vision

PAPER = ["resnet18-cifar10", "vit-s4-cifar100", "vit-s16-imagenet"]
WARMUP = 3  # steps: memory is allocated, kernels are chosen


def step_times(args: argparse.Namespace, steps: int) -> tuple[list[float], int]:
    """(seconds of every timed step, parameters of the model) of a vision run."""
    shape, classes, _ = datasets.FACTS[args.data]
    model, base = vision.build_model(args, shape, classes)
    model.to(args.device)
    optimizer = vision.build_optimizer(args, model, base)
    autocast, scaler = vision.precision(args)
    batch = tuple(t.to(args.device) for t in datasets.synthetic(args.data, args.batch_size).tensors)
    cuda, marks = torch.device(args.device).type == "cuda", []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()  # the device's own time, without a host that waits for it after every step

    def batches():
        for _ in range(WARMUP + steps):
            mark()
            yield batch
        mark()

    mup2_ref.train_epoch(model, optimizer, batches(), autocast=autocast, scaler=scaler)
    if cuda:
        torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in pairwise(marks)]
    return seconds[WARMUP:], sum(p.numel() for p in model.parameters())


def measure(flags: list[str], steps: int) -> dict[str, Any]:
    """A row: flags are vision.py's. Its times are None where the device's memory was too small."""
    args = vision.parse_args([*flags, "--variant", "sam"])
    steps_per_epoch = math.ceil(datasets.FACTS[args.data].train_samples / args.batch_size)
    row = {"preset": args.preset, "width_multiplier": args.width_multiplier, "parameters": None}
    row |= {"batch_size": args.batch_size, "base": args.base, "steps_per_epoch": steps_per_epoch}
    for variant in ("none", "sam"):
        try:
            seconds, row["parameters"] = step_times(vision.parse_args([*flags, "--variant", variant]), steps)
            row[f"{variant}_step"] = statistics.median(seconds)
            row[f"{variant}_epoch"] = steps_per_epoch * row[f"{variant}_step"]
        except torch.OutOfMemoryError:
            row[f"{variant}_step"] = row[f"{variant}_epoch"] = None
    return row


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; seconds of one epoch."""

    def cell(seconds: float | None) -> str:
        return "out of memory" if seconds is None else f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.3g}"

    lines = ["| model | width multiplier | parameters | batch | base optimizer | SAM | SAM / base |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        parameters = f"{r['parameters'] / 1e6:.3g} M" if r["parameters"] else "-"
        ratio = f"{r['sam_step'] / r['none_step']:.2f}" if r["sam_step"] and r["none_step"] else "-"
        lines.append(
            f"| {r['preset']} | {r['width_multiplier']:g} | {parameters} | {r['batch_size']} "
            f"| {cell(r['none_epoch'])} | {cell(r['sam_epoch'])} | {ratio} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", choices=vision.PRESETS, default=PAPER)
    add("--width-multipliers", nargs="+", default=["0.5", "1", "2", "4"])
    add("--batch-size", help="default the preset's")
    add("--steps", type=vision.at_least(1, int), default=20, help="that are timed")
    add("--amp", choices=vision.AMP, default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, nargs="?", const=Path(), help="write JSON; default results/epoch_time_DEVICE.json")
    args = parser.parse_args(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    device = vision.device_name(args.device)
    about = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "amp": args.amp}
    about |= {"fused": vision.mup2_fused is not None, "steps": args.steps, "data": "synthetic"}
    print("Seconds per epoch, from the median of {steps} steps on synthetic data; {device}, amp {amp}".format(**about))
    rows = []
    for preset in args.presets:
        for multiplier in args.width_multipliers:
            flags = ["--preset", preset, "--width-multiplier", multiplier, "--amp", args.amp, "--device", args.device]
            flags += ["--batch-size", args.batch_size] if args.batch_size else []
            rows.append(measure(flags, args.steps))
            print(format_table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(format_table(rows))
    if args.out is not None:
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = Path(__file__).parent / "results" / f"epoch_time_{slug}.json" if args.out == Path() else args.out
        vision.write_json(path, about | {"rows": rows})
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

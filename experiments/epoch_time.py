"""Table G.3 of the paper: the time of training steps, and of an epoch, with the base optimizer and with SAM.

    python experiments/epoch_time.py                                                   on the GPU, if there is one
    python experiments/epoch_time.py --presets resnet18-digits --width-multipliers 0.125 0.25 --out

Times whole training steps in up to four ways: the base optimizer alone, SAM by mup2_ref, SAM by mup2_fused, and the
latter captured as a CUDA graph. They take one synthetic batch that is already on the device, in the shape of the
preset's data set; an epoch is the median times the number of steps in one of the real data set: reading and augmenting
data, and evaluation, are not in it. With --out each finished row goes to the file at once, beside those of other
presets, widths, batch sizes and precisions that are there.
"""

import argparse
import functools
import gc
import json
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data as datasets
import mup2_ref
import vision

PAPER = ["resnet18-cifar10", "vit-s4-cifar100", "vit-s16-imagenet"]
WARMUP = 3  # steps: memory is allocated, kernels are chosen
WAYS = {  # to take a step: vision.py's flags, and what the table calls it
    "base": (["--variant", "none"], "base optimizer"),
    "reference": (["--variant", "sam", "--reference"], "SAM, reference"),
    "fused": (["--variant", "sam"], "SAM, fused"),
    "graph": (["--variant", "sam"], "SAM, fused, CUDA graph"),
}
Training = Callable[[Iterable[tuple[Tensor, Tensor]]], Tensor]  # train_epoch, as a function of batches alone


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def possible_ways(args: argparse.Namespace) -> list[str]:
    fused = vision.has_fused(args.device)
    graph = fused and is_cuda(args.device) and args.amp != "fp16"  # a GradScaler looks at values on the host
    return ["base", "reference", *["fused"] * fused, *["graph"] * graph]


# ------------------------------------------------------------------------------------------------- steps


class Stopwatch:
    """Seconds between marks. On a GPU these are events in its stream: the host does not wait for them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, []

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter())
        if self.cuda:
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairwise(self.marks)]

    def watched(self, call: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.mark()
            result = call(*args, **kwargs)
            self.mark()
            return result

        return watched


def build(way: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Training, tuple]:
    """(model, its optimizer, its training, a batch) of a vision run."""
    shape, classes, _ = datasets.FACTS[args.data]
    torch.manual_seed(0)
    model, base = vision.build_model(args, shape, classes)
    model.to(args.device)
    optimizer = vision.build_optimizer(args, model, base)
    autocast, scaler = vision.precision(args)
    batch = tuple(t.to(args.device) for t in datasets.synthetic(args.data, args.batch_size).tensors)
    if way == "graph":
        from captured import training  # which needs mup2_fused

        return model, optimizer, training(model, optimizer, batch, autocast=autocast), batch
    train = functools.partial(mup2_ref.train_epoch, model, optimizer, autocast=autocast, scaler=scaler)
    return model, optimizer, train, batch


def step_times(train: Training, batch: tuple[Tensor, Tensor], steps: int) -> list[float]:
    """Seconds of every step, after a few that are not timed. Raises RuntimeError if the loss is not finite."""
    watch = Stopwatch(batch[0].is_cuda)

    def batches():
        for _ in range(WARMUP + steps):
            watch.mark()
            yield batch
        watch.mark()

    if not train(batches()).isfinite():
        raise RuntimeError("the loss is not finite, and SAM's steps without an update are not those to time")
    return watch.seconds()[WARMUP:]


def share_of_sam(optimizer: mup2_ref.SAM, train: Training, batch: tuple[Tensor, Tensor], steps: int) -> float:
    """What part of a training step first_step() and second_step() are. The optimizer is not to be used afterwards."""
    watch = Stopwatch(batch[0].is_cuda)
    optimizer.first_step, optimizer.step = watch.watched(optimizer.first_step), watch.watched(optimizer.step)
    seconds = step_times(train, batch, steps)
    calls = watch.seconds()[::2]  # the rest lies between them
    both = [first + second for first, second in zip(calls[::2], calls[1::2], strict=True)]
    return statistics.median(part / whole for part, whole in zip(both[WARMUP:], seconds, strict=True))


def measure_way(way: str, args: argparse.Namespace, steps: int) -> dict[str, Any]:
    """step: median seconds; memory: the largest that tensors took on the GPU, in bytes, building and capturing too."""
    cuda = is_cuda(args.device)
    gc.collect()  # what the last way has left
    if cuda:
        torch.cuda.init()  # or there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    _, optimizer, train, batch = build(way, args)
    found = {"step": statistics.median(step_times(train, batch, steps)), "share": None}
    found["memory"] = torch.cuda.max_memory_allocated(args.device) if cuda else None
    if way in ("reference", "fused"):
        try:
            found["share"] = share_of_sam(optimizer, train, batch, steps)
        except RuntimeError:  # it trains on for as many steps again; what is found so far stays
            traceback.print_exc()
    return found


def measure(flags: list[str], steps: int) -> dict[str, Any]:
    """A row: flags are vision.py's. A way that failed has an "error" instead of its times."""
    args = vision.parse_args([*flags, "--variant", "sam"])
    shape, classes, samples = datasets.FACTS[args.data]
    with torch.device("meta"):
        model, _ = vision.build_model(args, shape, classes)
    row = {"preset": args.preset, "width_multiplier": args.width_multiplier}
    row |= {
        "width": vision.width(args, args.width_multiplier),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    row |= {"batch_size": args.batch_size, "base": args.base, "amp": args.amp}
    row |= {"steps_per_epoch": math.ceil(samples / args.batch_size), "steps": steps, "torch": torch.__version__}
    row |= {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "ways": {}}
    for way in possible_ways(args):
        try:
            row["ways"][way] = measure_way(way, vision.parse_args([*flags, *WAYS[way][0]]), steps)
        except torch.OutOfMemoryError:
            row["ways"][way] = {"error": "out of memory"}
        except (RuntimeError, TypeError, ValueError) as error:  # the other ways' times are worth keeping
            traceback.print_exc()
            row["ways"][way] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row


# ------------------------------------------------------------------------------------------------- tables


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def problem(way: dict[str, Any]) -> str:
    return "out of memory" if way["error"] == "out of memory" else "failed"


def ratio(way: dict[str, Any], base: dict[str, Any]) -> str:
    return f"{way['step'] / base['step']:.2f}" if "step" in way and "step" in base else "-"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; seconds of one epoch. SAM is the fused one where it is built."""
    lines = ["| model | width multiplier | parameters | batch | base optimizer | SAM | SAM / base |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in rows:
        base, sam = r["ways"]["base"], r["ways"].get("fused") or r["ways"]["reference"]
        epochs = [
            three_digits(r["steps_per_epoch"] * way["step"]) if "step" in way else problem(way) for way in (base, sam)
        ]
        lines.append(
            f"| {r['preset']} | {r['width_multiplier']:g} | {r['parameters'] / 1e6:.3g} M | {r['batch_size']} "
            f"| {epochs[0]} | {epochs[1]} | {ratio(sam, base)} |"
        )
    return "\n".join(lines)


def format_steps(rows: list[dict[str, Any]]) -> str:
    """Markdown; a line for each way to take a training step. in SAM: the part of it in SAM's own two calls."""
    lines = ["| model | width | batch | precision | training step | ms | steps/s | / base | in SAM | peak GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
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
            cells = [r["preset"], f"{r['width']}", f"{r['batch_size']}", precision, WAYS[name][1], *cells]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- commands


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[k] for k in ("preset", "width_multiplier", "batch_size", "amp"))


def read_rows(path: Path, device: str) -> dict[tuple, dict[str, Any]]:
    """Of earlier commands; ValueError for a file of another device or of another script."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        rows = {key(row): row for row in found["rows"] if row["ways"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a file of this script: name another one") from None
    if found["device"] != device:
        raise ValueError(f"{path} has times of another device, {found['device']}: name another file")
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", choices=vision.PRESETS, default=PAPER)
    add("--width-multipliers", nargs="+", default=["0.5", "1", "2", "4"])
    add("--batch-size", help="default the preset's")
    add("--steps", type=vision.at_least(1, int), default=20, help="that are timed")
    add("--amp", choices=vision.AMP, default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, nargs="?", const=Path(), help="write JSON; default results/epoch_time_DEVICE.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if is_cuda(args.device) and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    if is_cuda(args.device):
        torch.cuda.set_device(torch.device(args.device).index or 0)  # whose stream the events mark
    device = vision.device_name(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = Path(__file__).parent / "results" / f"epoch_time_{slug}.json" if args.out == Path() else args.out
    print(f"Medians of {args.steps} steps on synthetic data; {device}, torch {torch.__version__}, amp {args.amp}")
    try:
        kept = read_rows(path, device) if path is not None else {}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for preset in args.presets:
        for multiplier in args.width_multipliers:
            flags = ["--preset", preset, "--width-multiplier", multiplier, "--amp", args.amp, "--device", args.device]
            flags += ["--batch-size", args.batch_size] if args.batch_size else []
            rows.append(measure(flags, args.steps))
            print("\n".join(format_steps(rows[-1:]).splitlines()[2:]), file=sys.stderr, flush=True)
            if path is not None:
                kept |= {key(rows[-1]): rows[-1]}
                vision.write_json(path, {"device": device, "data": "synthetic", "rows": [*kept.values()]})
    print(f"seconds per epoch:\n\n{format_table(rows)}\n\ntraining steps:\n\n{format_steps(rows)}")
    if path is not None:
        print(path)
    errors = [way["error"] for row in rows for way in row["ways"].values() if "error" in way]
    return int(any(error != "out of memory" for error in errors))


if __name__ == "__main__":
    sys.exit(main())

"""Table G.3 of the paper: the time of training steps, and of an epoch, with the base optimizer and with SAM.

    python -m experiments.epoch_time                                                   on the GPU, if there is one
    python -m experiments.epoch_time --presets resnet18-digits --width-multipliers 0.125 0.25 --out

Times whole training steps in up to four ways: the base optimizer alone, SAM by mup2_ref, SAM by the compiled passes of
mup2_fused, and the latter captured as a CUDA graph. They take one synthetic batch that is already on the device, in the
shape of the preset's data set; an epoch is the median times the number of steps in one of the real data set: reading
and augmenting data, and evaluation, are not in it. With --out each finished row goes to the file at once, beside those
of other presets, widths, batch sizes and precisions that are there.
"""

import argparse
import gc
import json
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

import mup2_fused as mup2
import mup2_ref
from experiments import data
from experiments.commands import SettingsError, at_least, command, reading, start, write_json
from experiments.epoch_time_tables import format_steps, format_table
from experiments.presets import PRESETS, width
from experiments.presets import parse_args as parse_run
from experiments.training import AMP, Batch, Training, check_device, device_name, has_kernels, is_cuda, precision
from experiments.vision_run import build_model, build_optimizer

PAPER = ["resnet18-cifar10", "vit-s4-cifar100", "vit-s16-imagenet"]
WARMUP = 3  # steps in which memory is allocated and kernels are chosen


def possible_ways(args: argparse.Namespace) -> list[str]:
    fused = has_kernels(args.device)
    graph = fused and is_cuda(args.device) and args.amp != "fp16"  # a GradScaler looks at values on the host
    return ["base", "reference", *["fused"] * fused, *["graph"] * graph]


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


def build(way: str, flags: list[str]) -> tuple[torch.optim.Optimizer, Training, Batch]:
    """(optimizer, its training, a batch) of a run of experiments.vision. flags: of that command."""
    variant = ["--variant", "none" if way == "base" else "sam"]
    args = parse_run([*flags, *variant, "--backend", "compiled"])
    shape, classes = data.FACTS[args.data][:2]
    torch.manual_seed(0)
    model, base = build_model(args, shape, classes)
    model.to(args.device)
    optimizer = build_optimizer(args, model, base, mup2_ref.SAM if way == "reference" else mup2.SAM)
    autocast, scaler = precision(args.device, args.amp)
    batch = tuple(t.to(args.device) for t in data.synthetic(args.data, args.batch_size))
    options = {"example": batch} if way == "graph" else {"scaler": scaler}
    return optimizer, Training(model, optimizer, autocast=autocast, **options), batch


def step_times(training: Training, batch: Batch, steps: int) -> list[float]:
    """Seconds of every step, after a few that are not timed. Raises RuntimeError if the loss is not finite."""
    watch = Stopwatch(batch[0].is_cuda)

    def batches():
        for _ in range(WARMUP + steps):
            watch.mark()
            yield batch
        watch.mark()

    if not training.train_epoch(batches()).isfinite():
        raise RuntimeError("the loss is not finite, and SAM's steps without an update are not those to time")
    return watch.seconds()[WARMUP:]


def share_of_sam(optimizer: Any, training: Training, batch: Batch, steps: int) -> float:
    """What part of a training step first_step() and second_step() are. The optimizer is not to be used afterwards."""
    watch = Stopwatch(batch[0].is_cuda)
    first, second = watch.watched(optimizer.first_step), watch.watched(optimizer.step)

    def step(closure: Callable | None = None) -> Any:
        """The reference gets a closure. Its passes are not to be counted."""
        if closure is None:
            return second()
        loss = closure()
        first()
        closure()
        second()
        return loss

    optimizer.first_step, optimizer.step = first, step
    seconds = step_times(training, batch, steps)
    calls = watch.seconds()[::2]  # every other interval lies between two calls
    both = [first + second for first, second in zip(calls[::2], calls[1::2], strict=True)]
    return statistics.median(part / whole for part, whole in zip(both[WARMUP:], seconds, strict=True))


def measure_way(way: str, flags: list[str], device: str, steps: int) -> dict[str, Any]:
    """step: median seconds; memory: the largest that tensors took on the GPU, in bytes, building and capturing too."""
    cuda = is_cuda(device)
    gc.collect()  # what the last way has left
    if cuda:
        torch.cuda.init()  # before this there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    optimizer, training, batch = build(way, flags)
    found = {"step": statistics.median(step_times(training, batch, steps)), "share": None}
    found["memory"] = torch.cuda.max_memory_allocated(device) if cuda else None
    if way in ("reference", "fused"):
        try:
            found["share"] = share_of_sam(optimizer, training, batch, steps)
        except RuntimeError:  # training went on for as many steps again, and diverged; the times so far stay
            traceback.print_exc()
    return found


def measure(flags: list[str], steps: int) -> dict[str, Any]:
    """A row of the table. flags: of experiments.vision. A way that failed has an "error" instead of its times."""
    args = parse_run([*flags, "--variant", "sam"])
    shape, classes, samples = data.FACTS[args.data][:3]
    with torch.device("meta"):
        model, _ = build_model(args, shape, classes)
    row = {"preset": args.preset, "width_multiplier": args.width_multiplier}
    row |= {"width": width(args, args.width_multiplier), "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"batch_size": args.batch_size, "base": args.base, "amp": args.amp}
    row |= {"steps_per_epoch": math.ceil(samples / args.batch_size), "steps": steps, "torch": torch.__version__}
    row |= {"threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "ways": {}}
    for way in possible_ways(args):
        try:
            row["ways"][way] = measure_way(way, flags, args.device, steps)
        except torch.OutOfMemoryError:
            row["ways"][way] = {"error": "out of memory"}
        except (RuntimeError, TypeError, ValueError) as error:  # the other ways' times are worth keeping
            traceback.print_exc()
            row["ways"][way] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return row


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[k] for k in ("preset", "width_multiplier", "batch_size", "amp"))


def read_rows(path: Path, device: str) -> dict[tuple, dict[str, Any]]:
    """The rows of earlier commands. DataError for a damaged file, SettingsError for one of another device."""
    if not path.exists():
        return {}
    with reading(path, "name another file, or remove this one"):
        found = json.loads(path.read_bytes())
        if found["device"] != device:
            raise SettingsError(f"{path} has times of another device, {found['device']}: name another file")
        return {key(row): row for row in found["rows"] if row["ways"]}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", choices=PRESETS, default=PAPER)
    add("--width-multipliers", nargs="+", default=["0.5", "1", "2", "4"])
    add("--batch-size", help="default the preset's")
    add("--steps", type=at_least(1, int), default=20, help="that are timed")
    add("--amp", choices=AMP, default="none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, nargs="?", const=Path(), help="write JSON; default results/epoch_time_DEVICE.json")
    return parser.parse_args(argv)


def measure_all(args: argparse.Namespace, path: Path | None, device: str) -> list[dict[str, Any]]:
    """A row for each preset and width multiplier; each is printed, and written if there is a path, when it is done."""
    kept = read_rows(path, device) if path is not None else {}
    rows = []
    for preset, multiplier in product(args.presets, args.width_multipliers):
        flags = ["--preset", preset, "--width-multiplier", multiplier, "--amp", args.amp, "--device", args.device]
        flags += ["--batch-size", args.batch_size] if args.batch_size else []
        rows.append(measure(flags, args.steps))
        print("\n".join(format_steps(rows[-1:]).splitlines()[2:]), file=sys.stderr, flush=True)
        if path is not None:
            kept |= {key(rows[-1]): rows[-1]}
            write_json(path, {"device": device, "data": "synthetic", "rows": [*kept.values()]})
    return rows


@command("rows that were finished are in the file of --out")
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_device(args.device)
    if is_cuda(args.device):
        torch.cuda.set_device(torch.device(args.device).index or 0)  # the events mark this device's stream
    device = device_name(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = Path(__file__).parent / "results" / f"epoch_time_{slug}.json" if args.out == Path() else args.out
    print(f"Medians of {args.steps} steps on synthetic data; {device}, torch {torch.__version__}, amp {args.amp}")
    rows = measure_all(args, path, device)
    print(f"seconds per epoch:\n\n{format_table(rows)}\n\ntraining steps:\n\n{format_steps(rows)}")
    if path is not None:
        print(path)
    errors = [way["error"] for row in rows for way in row["ways"].values() if "error" in way]
    return int(any(error != "out of memory" for error in errors))


if __name__ == "__main__":
    start(main)

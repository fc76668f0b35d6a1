"""Time of the two calls that SAM adds to forward and backward, first_step() and second_step(), of several SAMs.

    python -m benchmarks.step_time                                        all models on the CPU
    python -m benchmarks.step_time --device cuda --models resnet18 vit-b16

No model runs. Parameters have the shapes of well-known models. Gradients are random tensors, which stay the same and
which all implementations share. In each round every implementation makes one step, in an order that rotates. The
results are medians and interquartile ranges over the rounds.

The floor is the time that every SAM step must spend on moving bytes: the norm reads g; perturbing reads w and g, and
writes w and the backup; restoring and updating reads the backup, g and the moments, and writes w and the moments. The
bandwidth is measured: on CUDA by a copy from device to device, on the CPU by torch's fused SGD in float32 on tensors
of the same shapes, in the same rounds.
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.subjects import IMPLEMENTATIONS, MODELS, OURS, count
from experiments.commands import markdown, write_json
from experiments.training import device_name

RHO, SEED = 0.05, 0
WARMUP = 3  # steps of each implementation that are not timed, and then rounds whose times are not used
BASES = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-4)),
    "adamw": (torch.optim.AdamW, dict(lr=1e-3)),
}
MOVED = {"sgd": 1 + 4 + 5, "adamw": 1 + 4 + 7}  # values per parameter: norm, perturb, restore and update
PROBE = "fused SGD"  # an optimizer without SAM, which moves 20 bytes per parameter in one pass
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cpu_clock(call: Callable) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    ms = 1e3 * (time.perf_counter() - start)
    return ms, ms


def cuda_clock() -> Callable:
    """A clock: milliseconds on the device, and milliseconds until the call returns (the time to launch, without waits).

    In training, forward and backward have evicted the weights from the L2 cache, and they still run when the call
    comes. So the clock first writes to scratch memory often enough to keep the device busy for a millisecond.
    """
    scratch = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")

    def clock(call: Callable) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(12):
            scratch.zero_()
        start.record()
        _, host_ms = cpu_clock(call)
        end.record()
        end.synchronize()
        return start.elapsed_time(end), host_ms

    return clock


def copy_bandwidth(clock: Callable) -> float:
    """Bytes read and written per millisecond by a copy of 1 GiB on the GPU."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(clock(lambda: target.copy_(source))[0] for _ in range(10))


def available_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    with torch.no_grad():
        return sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b)) ** 0.5


class Case:
    """One model, dtype and base optimizer, with every implementation that supports them."""

    def __init__(self, model: str, dtype: str, base: str, args: argparse.Namespace) -> None:
        self.key = {"model": model, "params": count(MODELS[model]), "dtype": dtype, "base": base}
        self.args, self.left_out, self.deviation = args, [], {}
        random = torch.Generator(args.device).manual_seed(SEED)
        self.start, self.grads = (
            [std * torch.randn(shape, generator=random, device=args.device) for shape in MODELS[model]]
            for std in (0.02, 0.01)
        )
        self.optimizers = {}
        if args.device == "cpu":
            step = torch.optim.SGD(self._params(), fused=True, **BASES["sgd"][1]).step
            self.optimizers[PROBE] = SimpleNamespace(first_step=lambda: None, second_step=step)
        self.start, self.grads = ([t.to(DTYPES[dtype]) for t in tensors] for tensors in (self.start, self.grads))
        self.bytes = sum(w.nbytes for w in self.start)
        for name in args.implementations:
            try:
                self._prepare(name)
            except Exception as error:
                if name == OURS:
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
                self.left_out.append(self.key | {"implementation": name, "reason": reason})
                print(f"  without {name}: {reason}", flush=True)

    def _params(self) -> list[Tensor]:
        params = [torch.nn.Parameter(w.clone()) for w in self.start]
        for p, g in zip(params, self.grads):
            p.grad = g
        return params

    def _prepare(self, name: str) -> None:
        """Make optimizer and state. ArithmeticError if its first steps lead elsewhere than ours."""
        gc.collect()
        base, kwargs = BASES[self.key["base"]]
        need = self.bytes * MOVED[self.key["base"]] // 2  # w, backup, moments, temporary copies of w and g
        if need > (there := available_bytes(self.args.device)):
            raise MemoryError(f"takes {need >> 20} MiB, {there >> 20} are available")
        compiles = name == "foreach-compiled"
        if compiles and self.args.compile_seconds <= 0:
            raise TimeoutError("--compile-seconds are used up")
        begin, params = time.perf_counter(), self._params()
        optimizer = IMPLEMENTATIONS[name](params, base, rho=RHO, **kwargs)
        for _ in range(WARMUP):
            optimizer.first_step()
            optimizer.second_step()
        self.args.compile_seconds -= compiles * (time.perf_counter() - begin)
        if name == OURS:
            self.ours = params
        self.deviation[name] = distance(params, self.ours) / distance(self.ours, self.start)
        if self.deviation[name] > (1e-3 if self.key["dtype"] == "fp32" else 0.3):  # in bfloat16 roundings add up
            raise ArithmeticError(f"after {WARMUP} steps its weights are off by {self.deviation[name]:.0e} of the way")
        self.optimizers[name] = optimizer

    def run(self, clock: Callable, bandwidth: float | None) -> list[dict]:
        """Rows of the table. bandwidth: bytes per millisecond; None: measured by the probe."""
        names, times = list(self.optimizers), {name: [] for name in self.optimizers}
        for i in range(-WARMUP, self.args.rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                step = clock(self.optimizers[name].first_step) + clock(self.optimizers[name].second_step)
                times[name] += [step] if i >= 0 else []
        probe = times.pop(PROBE, None)
        bandwidth = bandwidth or 20 * self.key["params"] / statistics.median(step[2] for step in probe)
        rows = [self._row(name, times[name], bandwidth) for name in times]
        return [row | {"speedup": row["sum_ms"] / rows[0]["sum_ms"]} for row in rows]

    def _row(self, name: str, steps: list[tuple], bandwidth: float) -> dict:
        row = self.key | {"implementation": name, "deviation": self.deviation[name]}
        first, host_first, second, host_second = zip(*steps)
        for phase, ms in {"first": first, "second": second, "sum": list(map(sum, zip(first, second)))}.items():
            low, row[f"{phase}_ms"], high = statistics.quantiles(ms, n=4, method="inclusive")
            row[f"{phase}_iqr"] = high - low
        row["host_ms"] = statistics.median(map(sum, zip(host_first, host_second)))
        moved = self.bytes * MOVED[self.key["base"]]
        row |= {"floor_ms": moved / bandwidth, "ratio": row["sum_ms"] / (moved / bandwidth)}
        return row | {"gb_per_s": moved / row["sum_ms"] / 1e6}


def machine(device: str) -> dict:
    """The machine and the software that the numbers belong to."""
    about = {"device": device_name(device), "cpu": device_name("cpu")}
    about |= {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    about |= {"cpu_kernels": importlib.import_module(OURS).instruction_set, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "CUDA": torch.version.cuda}
    try:
        return about | {"pytorch_optimizer": metadata.version("pytorch_optimizer")}
    except metadata.PackageNotFoundError:
        return about


def markdown_table(result: dict) -> str:
    """One line per model, dtype and base optimizer: milliseconds of first_step() + second_step()."""
    names = [name for name in IMPLEMENTATIONS if any(r["implementation"] == name for r in result["rows"])]
    head = ["model", "parameters", "dtype", "base", *names, "best alternative / ours", "ours / floor"]
    lines = []
    for key, case in itertools.groupby(result["rows"], lambda r: (r["model"], r["params"], r["dtype"], r["base"])):
        rows = {r["implementation"]: r for r in case}
        ms = [f"{rows[name]['sum_ms']:.3g}" if name in rows else "-" for name in names]
        peer = min((r["speedup"] for name, r in rows.items() if name != OURS), default=float("nan"))
        lines.append([key[0], f"{key[1] / 1e6:.3g} M", *key[2:], *ms, f"{peer:.2f}", f"{rows[OURS]['ratio']:.2f}"])
    return markdown(head, lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=30, help="at least 2")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--compile-seconds", type=float, default=600, help="no more models are compiled after these")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/DEVICE.json")
    args = parser.parse_args(argv)
    args.implementations = list(dict.fromkeys([OURS, *args.implementations]))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    knobs = {k: v for k, v in vars(args).items() if k != "out"}
    options = {name: kwargs for name, (_, kwargs) in BASES.items()}
    knobs |= {"warmup": WARMUP, "rho": RHO, "seed": SEED, "options": options}
    result = {"machine": machine(args.device), "knobs": knobs}
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    out = args.out or Path(__file__).parent / "results" / f"{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    clock = cuda_clock() if args.device == "cuda" else cpu_clock
    bandwidth = copy_bandwidth(clock) if args.device == "cuda" else None
    result["copy_gb_per_s"] = bandwidth and bandwidth / 1e6
    print(json.dumps(result))
    result |= {"left_out": [], "rows": []}
    for model, dtype, base in itertools.product(args.models, args.dtypes, args.bases):
        print(f"{model}, {dtype}, {base}", flush=True)
        try:
            case = Case(model, dtype, base, args)
            result["rows"] += case.run(clock, bandwidth)
            result["left_out"] += case.left_out
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"  left out: {error}")
        case = None
        if "foreach-compiled" in args.implementations:
            torch.compiler.reset()  # frees memory; and torch stops compiling a function after many models
        write_json(out, result)  # after every case, because a time limit may end this
    print(f"{out}\n\n{markdown_table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

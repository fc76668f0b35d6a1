"""Table 2 of the paper, one run at a time: ResNet-18 and ViT with SAM, in the standard parameterization or in muP².

    python experiments/vision.py --preset resnet18-digits                                    seconds per epoch on a CPU
    python experiments/vision.py --preset resnet18-cifar10 --root DIR --width-multiplier 4   DIR has CIFAR's archive
    torchrun --nproc_per_node 8 experiments/vision.py --preset vit-s16-imagenet --root DIR   DIR has train/ and val/

A preset sets defaults, every flag overrides one. The folder OUT/NAME of a run, NAME being made of its settings, gets
config.json, metrics.csv and checkpoint.pt (after every epoch), events for TensorBoard, and in the end result.json.
The same command goes on after the last whole epoch, with the same bits as if it had never stopped (on a GPU, or with
more than two processes, as far as sums are taken in the same order); when the run is finished it only prints the
result. Random streams depend on the seed, the epoch, the process and its workers, so that --workers and the number of
processes are settings too.

The batch is divided over the processes of torchrun; each normalizes its own part (no synchronized batch norm), and
the running statistics of the first one count. Every process reads --root and --out.
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import data as datasets
import mup2_ref
import networks

try:
    import mup2_fused
except ImportError:  # not built
    mup2_fused = None

# ------------------------------------------------------------------------------------------------- settings

COMMON = dict(parameterization="mup", variant="sam", momentum=0.9, schedule="cosine", amp="none", seed=0)
PRESETS: dict[str, dict[str, Any]] = {
    "resnet18-cifar10": dict(  # the paper's
        model="resnet18",
        data="cifar10",
        width_multiplier=0.5,
        base_width_multiplier=0.5,
        base="sgd",
        lr={"mup": 2**-4, "sp": 0.05},
        rho={"mup": 2**-4, "sp": 0.1},
        momentum=0.9,
        weight_decay=5e-4,
        label_smoothing=0.1,
        epochs=200,
        warmup_epochs=0,
        batch_size=128,
        workers=4,
    ),
    "vit-s4-cifar100": dict(
        model="vit",
        data="cifar100",
        width_multiplier=1.0,
        base_width_multiplier=1.0,
        depth=12,
        heads=12,
        patch=[4, 4],
        base="adamw",
        # The paper's text does not say what follows; these are common values, and ours.
        lr=1e-3,
        rho=0.1,
        weight_decay=0.05,
        label_smoothing=0.1,
        epochs=100,
        warmup_epochs=10,
        batch_size=128,
        workers=4,
    ),
    "vit-s16-imagenet": dict(
        model="vit",
        data="imagenet",
        width_multiplier=1.0,
        base_width_multiplier=1.0,
        depth=6,
        heads=12,
        patch=[16, 16],
        base="adamw",
        epochs=100,
        # The paper's text does not say what follows; these are common values, and ours.
        lr=1e-3,
        rho=0.1,
        weight_decay=0.1,
        label_smoothing=0.1,
        warmup_epochs=10,
        batch_size=1024,
        workers=8,
    ),
    "mlp-cifar10": dict(  # the network, data, optimizer and batch of the paper's Figure 1; lr and rho are ours
        model="mlp",
        data="cifar10",
        width_multiplier=1.0,
        base_width_multiplier=1.0,
        base="sgd",
        lr=0.1,
        rho=0.1,
        momentum=0.0,
        weight_decay=0.0,
        label_smoothing=0.0,
        epochs=20,
        warmup_epochs=0,
        batch_size=64,
        schedule="constant",
        workers=4,
    ),
    "resnet18-digits": dict(  # ours, for trying out
        model="resnet18",
        data="digits",
        width_multiplier=0.125,
        base_width_multiplier=0.125,
        base="sgd",
        lr=2**-4,
        rho=2**-4,
        weight_decay=5e-4,
        label_smoothing=0.1,
        epochs=10,
        warmup_epochs=0,
        batch_size=64,
        workers=0,
    ),
    "vit-mnist1d": dict(  # ours, for trying out; lr and rho are near the best of a few trials of search.py
        model="vit",
        data="mnist1d",
        width_multiplier=0.125,
        base_width_multiplier=0.125,
        depth=4,
        heads=4,
        patch=[1, 4],
        base="adamw",
        lr=2**-9,
        rho=2**-7,
        weight_decay=0.05,
        label_smoothing=0.0,
        epochs=20,
        warmup_epochs=2,
        batch_size=64,
        workers=0,
    ),
}
WIDTH = {"resnet18": 64, "vit": 384, "mlp": 256}  # at width multiplier 1
GAIN = {"resnet18": 2**0.5, "vit": 1.0, "mlp": 2**0.5}  # of the weights at the start; sqrt(2) for ReLU, and ours
OUTPUT = {"resnet18": "head.weight", "vit": "head.weight", "mlp": "layers.2.weight"}
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
VARIANTS = ("none", "sam", "sam-on", "elementwise", "layerwise")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_SETTINGS = ("preset", "out", "root", "device")  # where a run takes place; the rest decides what comes out


class SettingsError(Exception):
    """The command asks for what cannot be done; the message says why."""


def width(args: argparse.Namespace, multiplier: float) -> int:
    return round(WIDTH[args.model] * multiplier)


def processes() -> tuple[int, int]:
    """(rank, how many): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that decides the result of a run."""
    return {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS} | {"processes": processes()[1]}


def run_folder(args: argparse.Namespace) -> Path:
    """OUT/NAME: what one looks for first in clear text, and a hash of all settings."""
    digest = hashlib.sha256(json.dumps(settings(args), sort_keys=True).encode()).hexdigest()
    parts = [args.model, args.data, args.parameterization, args.perturbation, args.variant, args.base]
    parts += [f"w{args.width_multiplier:g}", f"lr{args.lr:.4g}", args.rho is not None and f"rho{args.rho:.4g}"]
    parts += [f"epochs{args.epochs}", f"seed{args.seed}", digest[:8]]
    return args.out / "-".join(part for part in parts if part)


# ------------------------------------------------------------------------------------------------- model, optimizer


def build_model(args: argparse.Namespace, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """The model with its initial weights, and its shapes at the base width (on the meta device)."""
    mup = args.parameterization == "mup"

    def network(multiplier: float) -> nn.Module:
        if args.model == "resnet18":
            return networks.ResNet18(width(args, multiplier), classes, shape[0])
        if args.model == "mlp":
            return mup2_ref.MLP(math.prod(shape), width(args, multiplier), classes)
        base_head_dim = width(args, args.base_width_multiplier) // args.heads if mup else None
        sizes = (width(args, multiplier), args.depth, args.heads, shape[1:], tuple(args.patch), classes, shape[0])
        return networks.ViT(*sizes, base_head_dim=base_head_dim)

    model = network(args.width_multiplier)
    with torch.device("meta"):
        base = network(args.base_width_multiplier)
    mup2_ref.init_(
        model,
        base,
        parameterization=args.parameterization,
        zero_output=mup,
        gain=GAIN[args.model],
        roles={OUTPUT[args.model]: "output"},  # which shapes do not tell at the base width
    )
    if mup:
        networks.zero_queries_(model)
    return model, base


def has_fused(device: str) -> bool:
    return mup2_fused is not None and (torch.device(device).type == "cpu" or mup2_fused.built_with_cuda)


def build_optimizer(args: argparse.Namespace, model: nn.Module, base: nn.Module) -> torch.optim.Optimizer:
    """SAM around the base optimizer, or for variant "none" the latter alone; at the base width without any factor.

    The norm is the decoupled one for ResNet-18 too, where the paper takes the joint one: relative to a base width over
    1, that one is dominated by different layers at different widths.
    """
    variant = args.variant if args.variant in mup2_ref.VARIANTS else "sam"
    groups = mup2_ref.param_groups(
        model,
        base,
        lr=args.lr,
        rho=args.rho or 0.0,
        weight_decay=args.weight_decay,
        base_optimizer="sgd" if args.base == "sgd" else "adam",
        parameterization=args.parameterization,
        perturbation=args.perturbation or "naive",
        variant=variant,
        perturb="norm" if args.variant == "sam-on" else "all",
    )
    options = {"momentum": args.momentum} if args.base == "sgd" else {}
    if args.variant == "none":
        return BASES[args.base](groups, **options)
    kind = mup2_fused.SAM if has_fused(args.device) and not args.reference else mup2_ref.SAM
    return kind(groups, BASES[args.base], variant=variant, **options)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, mup2_ref.SAM) and type(optimizer) is not mup2_ref.SAM


def lr_factor(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """Of the learning rate at a step: linear warmup, then cosine to 0 or constant."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if args.schedule == "constant":
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))

    return factor


def precision(args: argparse.Namespace) -> tuple[Callable[[], Any], torch.amp.GradScaler]:
    """What train_epoch takes as autocast and scaler."""
    device = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")
    dtype = AMP[args.amp]
    # A weight is cast once per pass anyway; torch asks for no cache where a CUDA graph is captured.
    autocast = functools.partial(torch.autocast, device, dtype, cache_enabled=False)
    return autocast if dtype else contextlib.nullcontext, scaler


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"CPU {found[1] if found else 'unknown'}"


# ------------------------------------------------------------------------------------------------- a run


def stream(*key: int) -> int:
    """A seed that is different for every key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def summed(x: Tensor) -> Tensor:
    """Over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


class Run:
    """Everything that a run needs for its next epoch; rows are the metrics of the epochs so far."""

    def __init__(self, args: argparse.Namespace, data: datasets.Images) -> None:
        self.args, self.rows, (self.rank, self.processes) = args, [], processes()
        torch.manual_seed(stream(args.seed))
        self.model, base = build_model(args, data.shape, data.classes)
        self.model.to(args.device)
        self.optimizer = build_optimizer(args, self.model, base)
        sampler = DistributedSampler(data.train, self.processes, self.rank, seed=stream(args.seed))
        test = Subset(data.test, range(self.rank, len(data.test), self.processes))
        self.train_batches, self.test_batches = self.loader(data.train, sampler), self.loader(test, None)
        self.factor = lr_factor(args, len(self.train_batches))
        self.scheduler = LambdaLR(self.optimizer, self.factor)
        self.autocast, self.scaler = precision(args)
        self.loss_function = functools.partial(F.cross_entropy, label_smoothing=args.label_smoothing)
        self.trained = nn.parallel.DistributedDataParallel(self.model) if self.processes > 1 else self.model

    def loader(self, data: Any, sampler: Any) -> DataLoader:
        return DataLoader(
            data,
            self.args.batch_size // self.processes,
            sampler=sampler,
            num_workers=self.args.workers,  # new ones every epoch, so that the generator decides their seeds
            generator=torch.Generator(),
            pin_memory=torch.device(self.args.device).type == "cuda",
        )

    def epoch(self, quiet: bool) -> None:
        """Train for an epoch, evaluate, add a row."""
        epoch, seed = len(self.rows), stream(self.args.seed, len(self.rows), self.rank)
        torch.manual_seed(seed)
        self.train_batches.generator.manual_seed(seed)
        self.train_batches.sampler.set_epoch(epoch)
        start = time.perf_counter()
        loss = mup2_ref.train_epoch(
            self.trained,
            self.optimizer,
            tqdm(
                self.train_batches,
                desc=f"epoch {epoch + 1}/{self.args.epochs}",
                leave=False,
                disable=quiet or self.rank > 0,
            ),
            loss_function=self.loss_function,
            scheduler=self.scheduler,
            autocast=self.autocast,
            scaler=self.scaler,
        )
        train_loss = summed(loss).item() / self.processes
        seconds = time.perf_counter() - start
        if self.processes > 1:  # each process has seen other batches
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        test_loss, correct, samples = summed(mup2_ref.evaluate(self.model, self.test_batches, self.autocast)).tolist()
        self.rows.append(
            {
                "epoch": epoch + 1,
                "lr": self.args.lr * self.factor(epoch * len(self.train_batches)),  # in the first step
                "train_loss": train_loss,
                "test_loss": test_loss / samples,
                "test_accuracy": 100 * correct / samples,
                "seconds": round(seconds, 3),  # without evaluation
                "skipped_steps": getattr(self.optimizer, "skipped_steps", 0),  # since the start
            }
        )

    @property
    def diverged(self) -> bool:
        return bool(self.rows) and not math.isfinite(self.rows[-1]["train_loss"])

    @property
    def finished(self) -> bool:
        return self.diverged or len(self.rows) >= self.args.epochs

    def result(self) -> dict[str, Any]:
        return {
            "settings": settings(self.args),
            "best_test_accuracy": max(row["test_accuracy"] for row in self.rows),
            "last_test_accuracy": self.rows[-1]["test_accuracy"],
            "epochs": len(self.rows),
            "diverged": self.diverged,
            "seconds_per_epoch": statistics.median(row["seconds"] for row in self.rows),
            "device": device_name(self.args.device),
            "fused": is_fused(self.optimizer),
            "torch": torch.__version__,
        }

    def save(self, path: Path) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        state = {name: part.state_dict() for name, part in parts.items()} | {"rows": self.rows}
        write(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.rows = state["rows"]
        if isinstance(self.optimizer, mup2_ref.SAM):  # which does not save it
            self.optimizer.skipped_steps = self.rows[-1]["skipped_steps"]

    def __str__(self) -> str:
        args, parameters = self.args, sum(p.numel() for p in self.model.parameters())
        widths = [width(args, multiplier) for multiplier in (args.width_multiplier, args.base_width_multiplier)]
        method = f"{args.base} alone in {args.parameterization}, lr {args.lr:g}"
        if args.variant != "none":
            kind = "fused" if is_fused(self.optimizer) else "reference"
            method = (
                f"{args.variant} ({kind}) on {args.base} in {args.parameterization}, {args.perturbation} perturbation"
            )
            method += f", lr {args.lr:g}, rho {args.rho:g}"
        where = f"{self.processes} x " * (self.processes > 1) + device_name(args.device)
        return (
            f"{args.model} on {args.data}, width {widths[0]} (base {widths[1]}), {parameters / 1e6:.3g} M parameters; "
            f"{method}; {where}"
        )


# ------------------------------------------------------------------------------------------------- its files


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    """The file is there as a whole or as it was before, whenever the process is killed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time; it ends with the process. Raises SettingsError if another one is in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"another process is busy with {path.parent}") from None
        yield


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Settings are in the folder's name; this is for folders that were renamed, and for files that were changed."""
    if path.exists() and (found := json.loads(path.read_text())) != config:
        names = sorted(k for k in found.keys() | config.keys() if found.get(k) != config.get(k))
        raise SettingsError(f"{path} belongs to a run with other settings ({', '.join(names)}): remove its folder")
    write_json(path, config)


def tensorboard(folder: Path, epochs: int, quiet: bool) -> Any:
    """A SummaryWriter that goes on after so many epochs; None, and a note, if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if not quiet:
            print("no events for TensorBoard, which is not installed (pip install tensorboard)")
        return None
    return SummaryWriter(folder, purge_step=epochs + 1)


# ------------------------------------------------------------------------------------------------- commands


def finished(args: argparse.Namespace) -> dict[str, Any] | None:
    """The result of this run, if there is one."""
    path = run_folder(args) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def train(args: argparse.Namespace, data: datasets.Images, quiet: bool = False) -> dict[str, Any]:
    """From the last checkpoint to the end; returns the result. The run's folder must be locked by the caller.

    The result: settings, best_test_accuracy and last_test_accuracy in %, epochs that were trained, diverged (its last
    one had a loss that is not finite), seconds_per_epoch (median, without evaluation), device, fused, torch.
    """
    folder, first = run_folder(args), processes()[0] == 0
    try:
        run = Run(args, data)
    except ValueError as error:  # of a network or an optimizer that gets impossible numbers
        raise SettingsError(str(error)) from error
    if first:
        check_config(folder / "config.json", settings(args))
    if (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
    if first and not quiet:
        print(run, flush=True)
    writer = tensorboard(folder, len(run.rows), quiet) if first else None
    while not run.finished:
        run.epoch(quiet)
        if first:
            run.save(folder / "checkpoint.pt")
            write_metrics(folder / "metrics.csv", run.rows)
        for name, value in run.rows[-1].items() if writer else ():
            writer.add_scalar(name, value, run.rows[-1]["epoch"])
        if first and not quiet:
            print(
                "epoch {epoch}: lr {lr:.4g}, train loss {train_loss:.4f}, test loss {test_loss:.4f}, "
                "accuracy {test_accuracy:.2f} %, {seconds:.1f} s".format(**run.rows[-1]),
                flush=True,
            )
    if writer:
        writer.close()
    if first:
        write_metrics(folder / "metrics.csv", run.rows)  # in case it stopped between checkpoint and metrics
        write_json(folder / "result.json", run.result())
    return run.result()


def at_least(low: float, kind: type) -> Callable[[str], Any]:
    """The type of a flag whose values are numbers from low on."""

    def number(text: str) -> Any:
        if not low <= (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the preset's values where none is given, and None for what the others make irrelevant."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="resnet18-digits", help="defaults of the others")
    add("--model", choices=WIDTH)
    add("--data", choices=datasets.FACTS)
    add("--root", type=Path, help="folder with CIFAR's archive, or with ImageNet's train and val")
    add(
        "--width-multiplier",
        type=at_least(0, float),
        help="1: 64 channels in the first stage of ResNet-18, width 384 of ViT, 256 of the MLP",
    )
    add("--base-width-multiplier", type=at_least(0, float), help="where muP's factors are 1")
    add("--depth", type=at_least(1, int), help="layers of ViT")
    add("--heads", type=at_least(1, int), help="of ViT")
    add("--patch", type=at_least(1, int), nargs=2, metavar=("HEIGHT", "WIDTH"), help="of ViT, in pixels")
    add("--parameterization", choices=["sp", "mup"])
    add(
        "--perturbation", choices=mup2_ref.PERTURBATIONS, help="default effective in muP (then it is muP²), naive in SP"
    )
    add("--variant", choices=VARIANTS, help="none: the base optimizer alone; sam-on: normalization layers only")
    add("--base", choices=BASES)
    add("--lr", type=at_least(0, float))
    add("--rho", type=at_least(0, float))
    add("--momentum", type=at_least(0, float), help="of SGD")
    add("--weight-decay", type=at_least(0, float))
    add("--label-smoothing", type=at_least(0, float))
    add("--epochs", type=at_least(1, int))
    add("--warmup-epochs", type=at_least(0, int), help="in which the learning rate grows linearly")
    add("--batch-size", type=at_least(1, int), help="over all processes")
    add("--schedule", choices=["cosine", "constant"])
    add("--amp", choices=AMP, help="mixed precision; fp16 with a GradScaler")
    add("--seed", type=at_least(0, int))
    add("--workers", type=at_least(0, int), help="processes that read data, for each process that trains")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--reference", action="store_true", help="mup2_ref.SAM even where mup2_fused is built")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs, default ./runs")
    args = parser.parse_args(argv)
    for name, value in (COMMON | PRESETS[args.preset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.parameterization] if isinstance(value, dict) else value)
    args.perturbation = args.perturbation or ("effective" if args.parameterization == "mup" else "naive")
    irrelevant = {
        "perturbation": args.variant == "none",
        "rho": args.variant == "none",
        "momentum": args.base != "sgd",
        **dict.fromkeys(("depth", "heads", "patch"), args.model != "vit"),
    }
    for name in (name for name, so in irrelevant.items() if so):
        setattr(args, name, None)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.model == "vit" and None in (args.depth, args.heads, args.patch):
        parser.error("--model vit takes --depth, --heads and --patch")
    for name in ("width_multiplier", "base_width_multiplier"):
        n = WIDTH[args.model] * getattr(args, name)
        if n < 1 or abs(n - round(n)) > 1e-6 or round(n) % (args.heads or 1):
            parser.error(f"--{name.replace('_', '-')} makes a width of {n:g}, not a multiple of {args.heads or 1}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}")


def start_processes(args: argparse.Namespace) -> None:
    """Join the other processes of torchrun, each with its GPU."""
    # DDP imports this module. Imported only then, it would keep the group's threads running until the interpreter ends,
    # which may abort the process after all is done ("terminate called without an active exception").
    import torch._dynamo

    if torch.device(args.device).type == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if args.batch_size % dist.get_world_size():
        raise SettingsError(f"--batch-size {args.batch_size} cannot be divided over {dist.get_world_size()} processes")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
            raise SettingsError(f"--device {args.device}: torch {torch.__version__} sees no GPU")
        if "RANK" in os.environ:
            start_processes(args)
        folder, result = run_folder(args), finished(args)
        if result is None:
            data = datasets.images(args.data, args.root)
            with contextlib.nullcontext() if rank else locked(folder / "lock"):
                result = train(args, data)
    except (datasets.DataError, SettingsError) as error:
        print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print("\ninterrupted; the same command goes on after the last epoch that was finished", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP holds the group, in cycles
            dist.destroy_process_group()
    if rank == 0:
        state = f"diverged in epoch {result['epochs']}; " if result["diverged"] else ""
        accuracies = (
            f"best test accuracy {result['best_test_accuracy']:.2f} %, last {result['last_test_accuracy']:.2f} %"
        )
        print(f"{state}{accuracies}, {result['seconds_per_epoch']:.1f} s per epoch; files in {folder}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers end a job with it
    sys.exit(main())

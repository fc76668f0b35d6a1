"""One run of experiments.vision: its model and optimizer, its epochs, and training from a checkpoint to the end."""

import argparse
import csv
import functools
import io
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

import mup2_fused as mup2
from experiments import data, networks
from experiments.commands import SettingsError, read_json, reading, write, write_json
from experiments.presets import BASES, run_folder, settings, width
from experiments.training import Training, device_name, precision, processes
from mup2_fused.compiled_passes import CompiledPasses

GAIN = {"resnet18": 2**0.5, "vit": 1.0, "mlp": 2**0.5}  # of the initial weights; sqrt(2) is for ReLU; ours
OUTPUT = {"resnet18": "head.weight", "vit": "head.weight", "mlp": "layers.2.weight"}


def scaling_of(args: argparse.Namespace) -> mup2.Exponents:
    """The parameterization and variant of a run.

    The norm is the decoupled one for ResNet-18 too, where the paper takes the joint one: relative to a base width over
    1, different layers dominate the joint norm at different widths.
    """
    variant = args.variant if args.variant in ("elementwise", "layerwise") else "sam"
    base = "sgd" if args.base == "sgd" else "adam"
    return mup2.exponents(args.parameterization, args.perturbation or "naive", variant, base_optimizer=base)


def build_model(args: argparse.Namespace, shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """The model with its initial weights, and its shapes at the base width (on the meta device)."""
    mup = args.parameterization == "mup"

    def network(multiplier: float) -> nn.Module:
        if args.model == "resnet18":
            return networks.ResNet18(width(args, multiplier), classes, shape[0])
        if args.model == "mlp":
            return mup2.MLP(math.prod(shape), width(args, multiplier), classes)
        base_head_dim = width(args, args.base_width_multiplier) // args.heads if mup else None
        sizes = (width(args, multiplier), args.depth, args.heads, shape[1:], tuple(args.patch), classes, shape[0])
        return networks.ViT(*sizes, base_head_dim=base_head_dim)

    model = network(args.width_multiplier)
    with torch.device("meta"):
        base = network(args.base_width_multiplier)
    roles = {OUTPUT[args.model]: "output"}  # at the base width, shapes do not tell this
    mup2.init_(model, base, scaling_of(args), zero_output=mup, gain=GAIN[args.model], roles=roles)
    if mup:
        networks.zero_queries_(model)
    return model, base


def build_optimizer(
    args: argparse.Namespace, model: nn.Module, base: nn.Module, kind: Any = mup2.SAM
) -> torch.optim.Optimizer:
    """SAM around the base optimizer, or for variant "none" the latter alone; at the base width without any factor.

    kind: mup2.SAM, or another class that is called like it.
    """
    perturb = "norm" if args.variant == "sam-on" else "all"
    rates = dict(lr=args.lr, rho=args.rho or 0.0, weight_decay=args.weight_decay)
    groups = mup2.param_groups(model, base, scaling_of(args), **rates, perturb=perturb)
    options = {"momentum": args.momentum} if args.base == "sgd" else {}
    if args.variant == "none":
        return BASES[args.base](groups, **options)
    if kind is mup2.SAM:
        options["backend"] = args.backend
    return kind(groups, BASES[args.base], **options)


def is_compiled(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, mup2.SAM) and isinstance(optimizer.passes, CompiledPasses)


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


def stream(*key: int) -> int:
    """A seed that is different for every key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class VisionRun:
    """Everything that a run needs for its next epoch; rows are the metrics of the epochs so far."""

    def __init__(self, args: argparse.Namespace, images: data.Images) -> None:
        self.args, self.rows, (self.rank, self.processes) = args, [], processes()
        torch.manual_seed(stream(args.seed))
        self.model, base = build_model(args, images.shape, images.classes)
        self.model.to(args.device)
        self.optimizer = build_optimizer(args, self.model, base)
        self.skipped_before = 0  # steps that were skipped before the checkpoint
        sampler = DistributedSampler(images.train, self.processes, self.rank, seed=stream(args.seed))
        test = Subset(images.test, range(self.rank, len(images.test), self.processes))
        self.train_batches, self.test_batches = self.loader(images.train, sampler), self.loader(test, None)
        self.factor = lr_factor(args, len(self.train_batches))
        scheduler, (autocast, scaler) = LambdaLR(self.optimizer, self.factor), precision(args.device, args.amp)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": scheduler, "scaler": scaler}
        model = nn.parallel.DistributedDataParallel(self.model) if self.processes > 1 else self.model
        loss = functools.partial(F.cross_entropy, label_smoothing=args.label_smoothing)
        options = dict(scheduler=scheduler, autocast=autocast, scaler=scaler, loss_function=loss)
        self.training = Training(model, self.optimizer, **options)

    def loader(self, images: Any, sampler: Any) -> DataLoader:
        return DataLoader(
            images,
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
        bar = dict(desc=f"epoch {epoch + 1}/{self.args.epochs}", leave=False, disable=quiet or self.rank > 0)
        result = self.training.epoch(tqdm(self.train_batches, **bar), self.test_batches)
        lr = self.args.lr * self.factor(epoch * len(self.train_batches))  # in the first step
        skipped = self.skipped_before + getattr(self.optimizer, "skipped_steps", 0)
        row = {"epoch": epoch + 1, "lr": lr, **result._asdict(), "skipped_steps": skipped}
        self.rows.append(row | {"seconds": round(result.seconds, 3)})

    @property
    def diverged(self) -> bool:
        return bool(self.rows) and not math.isfinite(self.rows[-1]["train_loss"])

    def result(self) -> dict[str, Any]:
        accuracies, seconds = ([row[key] for row in self.rows] for key in ("test_accuracy", "seconds"))
        result = {"settings": settings(self.args)}
        result |= {"best_test_accuracy": max(accuracies), "last_test_accuracy": accuracies[-1]}
        result |= {"epochs": len(self.rows), "diverged": self.diverged, "seconds_per_epoch": statistics.median(seconds)}
        result |= {"device": device_name(self.args.device), "fused": is_compiled(self.optimizer)}
        return result | {"torch": torch.__version__}

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"rows": self.rows}
        write(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        with reading(path, "remove this file, and the run starts again"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.rows = state["rows"]
            self.skipped_before = self.rows[-1]["skipped_steps"]

    def __str__(self) -> str:
        args, parameters = self.args, sum(p.numel() for p in self.model.parameters())
        widths = [width(args, multiplier) for multiplier in (args.width_multiplier, args.base_width_multiplier)]
        method = f"{args.base} alone in {args.parameterization}, lr {args.lr:g}"
        if args.variant != "none":
            kind = "compiled" if is_compiled(self.optimizer) else "torch"
            method = f"{args.variant} ({kind}) on {args.base} in {args.parameterization}, "
            method += f"{args.perturbation} perturbation, lr {args.lr:g}, rho {args.rho:g}"
        where = f"{self.processes} x " * (self.processes > 1) + device_name(args.device)
        return (
            f"{args.model} on {args.data}, width {widths[0]} (base {widths[1]}), {parameters / 1e6:.3g} M parameters; "
            f"{method}; {where}"
        )


def finished(args: argparse.Namespace) -> dict[str, Any] | None:
    """The result of this run, if there is one."""
    path = run_folder(args) / "result.json"
    if not path.exists():
        return None
    keys = "best_test_accuracy", "last_test_accuracy", "epochs", "diverged", "seconds_per_epoch"
    return read_json(path, keys, "remove this file, and the same command goes on after the run's last epoch")


def train(args: argparse.Namespace, images: data.Images, quiet: bool = False) -> dict[str, Any]:
    """From the last checkpoint to the end; returns the result. The run's folder must be locked by the caller.

    The result: settings, best_test_accuracy and last_test_accuracy in %, epochs that were trained, diverged (the loss
    of the last epoch was not finite), seconds_per_epoch (median, without evaluation), device, fused (SAM's compiled
    passes were used), torch.
    """
    folder, first = run_folder(args), processes()[0] == 0
    try:
        run = VisionRun(args, images)
    except ValueError as error:  # a network or an optimizer gets impossible numbers
        raise SettingsError(str(error)) from error
    if first:
        check_config(folder / "config.json", settings(args))
    if (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
    if first and not quiet:
        print(run, flush=True)
    writer = tensorboard(folder, len(run.rows), quiet) if first else None
    while not run.diverged and len(run.rows) < args.epochs:
        run.epoch(quiet)
        if first:
            record(run, folder, writer, quiet)
    if writer:
        writer.close()
    if first:
        write_csv(folder / "metrics.csv", run.rows)  # in case an earlier process ended between checkpoint and metrics
        write_json(folder / "result.json", run.result())
    return run.result()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Write the settings of a run, or raise SettingsError if the folder has those of another one.

    The folder's name has a hash of the settings: this finds folders that were renamed, and files that were changed.
    """
    found = read_json(path, (), "remove this file") if path.exists() else config
    if found != config:
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


def record(run: VisionRun, folder: Path, writer: Any, quiet: bool) -> None:
    """Write and print the last epoch."""
    run.save(folder / "checkpoint.pt")
    write_csv(folder / "metrics.csv", run.rows)
    row = run.rows[-1]
    for name, value in row.items() if writer else ():
        writer.add_scalar(name, value, row["epoch"])
    if not quiet:
        print(
            "epoch {epoch}: lr {lr:.4g}, train loss {train_loss:.4f}, test loss {test_loss:.4f}, "
            "accuracy {test_accuracy:.2f} %, {seconds:.1f} s".format(**row),
            flush=True,
        )

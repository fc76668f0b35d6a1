"""The flags of experiments.vision: what a run is made of, and the presets that set their defaults."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from experiments.commands import at_least
from experiments.data import FACTS
from experiments.training import AMP, BACKENDS, processes
from mup2_ref import PERTURBATIONS

WIDTH = {"resnet18": 64, "vit": 384, "mlp": 256}  # at width multiplier 1
VARIANTS = ("none", "sam", "sam-on", "elementwise", "layerwise")
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
PLACE = ("preset", "out", "root", "device", "backend")  # where a run takes place; the rest decides its result

COMMON = dict(parameterization="mup", variant="sam", momentum=0.9, schedule="cosine", amp="none", seed=0)
RESNET = dict(model="resnet18", base="sgd", weight_decay=5e-4, label_smoothing=0.1, warmup_epochs=0)
VIT = dict(model="vit", base="adamw")
# The paper's text does not give these settings of its ViTs. They are common values, and ours.
OURS = dict(lr=1e-3, rho=0.1, label_smoothing=0.1, warmup_epochs=10)
PRESETS: dict[str, dict[str, Any]] = {
    "resnet18-cifar10": RESNET  # the paper's
    | dict(data="cifar10", width_multiplier=0.5, base_width_multiplier=0.5, epochs=200, batch_size=128, workers=4)
    | dict(lr={"mup": 2**-4, "sp": 0.05}, rho={"mup": 2**-4, "sp": 0.1}),
    "vit-s4-cifar100": VIT
    | dict(data="cifar100", width_multiplier=1.0, base_width_multiplier=1.0, depth=12, heads=12, patch=[4, 4])
    | OURS
    | dict(weight_decay=0.05, epochs=100, batch_size=128, workers=4),
    "vit-s16-imagenet": VIT
    | dict(data="imagenet", width_multiplier=1.0, base_width_multiplier=1.0, depth=6, heads=12, patch=[16, 16])
    | OURS
    | dict(weight_decay=0.1, epochs=100, batch_size=1024, workers=8),
    # The network, data, optimizer and batch of the paper's Figure 1; lr and rho are ours.
    "mlp-cifar10": dict(model="mlp", data="cifar10", width_multiplier=1.0, base_width_multiplier=1.0, base="sgd")
    | dict(lr=0.1, rho=0.1, momentum=0.0, weight_decay=0.0, label_smoothing=0.0, schedule="constant")
    | dict(epochs=20, warmup_epochs=0, batch_size=64, workers=4),
    # The next two are ours, for trying out. The ViT's lr and rho are near the best of a few trials of the search.
    "resnet18-digits": RESNET
    | dict(data="digits", width_multiplier=0.125, base_width_multiplier=0.125, lr=2**-4, rho=2**-4)
    | dict(epochs=10, batch_size=64, workers=0),
    "vit-mnist1d": VIT
    | dict(data="mnist1d", width_multiplier=0.125, base_width_multiplier=0.125, depth=4, heads=4, patch=[1, 4])
    | dict(lr=2**-9, rho=2**-7, weight_decay=0.05, label_smoothing=0.0)
    | dict(epochs=20, warmup_epochs=2, batch_size=64, workers=0),
}


def width(args: argparse.Namespace, multiplier: float) -> int:
    return round(WIDTH[args.model] * multiplier)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that decides the result of a run. "reference": its optimizer uses torch's operations, not the kernels."""
    of_place = {"processes": processes()[1], "reference": args.backend == "torch"}
    return {k: v for k, v in vars(args).items() if k not in PLACE} | of_place


def run_folder(args: argparse.Namespace) -> Path:
    """OUT/NAME. The name has in clear text what one looks for first, and a hash of all settings."""
    digest = hashlib.sha256(json.dumps(settings(args), sort_keys=True).encode()).hexdigest()
    parts = [args.model, args.data, args.parameterization, args.perturbation, args.variant, args.base]
    parts += [f"w{args.width_multiplier:g}", f"lr{args.lr:.4g}", args.rho is not None and f"rho{args.rho:.4g}"]
    parts += [f"epochs{args.epochs}", f"seed{args.seed}", digest[:8]]
    return args.out / "-".join(part for part in parts if part)


def parse_args(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The flags, with the preset's values where none is given, and None for those that others make irrelevant."""
    parser = make_parser(description)
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
    check(parser, args)
    return args


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="resnet18-digits", help="defaults of the others")
    add("--model", choices=WIDTH)
    add("--data", choices=FACTS)
    add("--root", type=Path, help="folder with CIFAR's or Fashion-MNIST's files, or with ImageNet's train and val")
    sizes = "1: 64 channels in the first stage of ResNet-18, width 384 of ViT, 256 of the MLP"
    add("--width-multiplier", type=at_least(0, float), help=sizes)
    add("--base-width-multiplier", type=at_least(0, float), help="where muP's factors are 1")
    add("--depth", type=at_least(1, int), help="layers of ViT")
    add("--heads", type=at_least(1, int), help="of ViT")
    add("--patch", type=at_least(1, int), nargs=2, metavar=("HEIGHT", "WIDTH"), help="of ViT, in pixels")
    add("--parameterization", choices=["sp", "mup"])
    add("--perturbation", choices=PERTURBATIONS, help="default effective in muP (then it is muP²), naive in SP")
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
    add("--backend", choices=BACKENDS, default="auto", help="of the optimizer; torch needs no compiled part")
    add("--out", type=Path, default=Path("runs"), help="folder of all runs, default ./runs")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.model == "vit" and None in (args.depth, args.heads, args.patch):
        parser.error("--model vit takes --depth, --heads and --patch")
    for name in ("width_multiplier", "base_width_multiplier"):
        n = WIDTH[args.model] * getattr(args, name)
        if n < 1 or abs(n - round(n)) > 1e-6 or round(n) % (args.heads or 1):
            parser.error(f"--{name.replace('_', '-')} makes a width of {n:g}, not a multiple of {args.heads or 1}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} must be fewer than --epochs {args.epochs}")

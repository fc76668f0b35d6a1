"""Training runs at several widths: how each one is trained, and a file of finished runs to which a sweep adds."""

import argparse
import functools
import json
import math
import os
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mup2_fused as mup2
from experiments import data, networks
from experiments.commands import at_least, reading, worker_processes
from experiments.training import Training, device_name

BATCH = 64
HEADS = 4  # of the ViT, at every width


class Method(NamedTuple):
    """A row of Tables D.1 and D.2."""

    parameterization: str
    perturbation: str
    variant: str = "sam"
    perturb: str = "all"


METHODS = {
    "SP-naive": Method("sp", "naive"),
    "muP-naive": Method("mup", "naive"),
    "muP-global": Method("mup", "global"),
    "muP²": Method("mup", "effective"),
    "SP-LP": Method("sp", "effective"),
}
VARIANTS = {  # of SAM, the rows of Table 2
    f"{name}{title}": Method(*scaling, variant=variant, perturb=perturb)
    for title, variant, perturb in (
        (" SAM-ON", "sam", "norm"),
        (" elementwise", "elementwise", "all"),
        (" layerwise", "layerwise", "all"),
    )
    for name, scaling in {"SP-naive": ("sp", "naive"), "muP²": ("mup", "effective")}.items()
}
ALL_METHODS = METHODS | VARIANTS
ALONE = {"sp": "SP-SGD", "mup": "muP-SGD"}  # the base optimizer alone, which may also be AdamW


class Way(NamedTuple):
    """Which passes SAM takes. The cheaper ways leave out a part of the first ones, and take a larger rho."""

    title: str
    interval: int = 1  # SAM in every so many-th step
    part: int = 1  # the first pass takes 1 / part of the batch
    ascent: str = "gradient"  # or "momentum", without a first pass
    late: float = 1.0  # the last part of the epochs, in which SAM is used; the base optimizer alone before
    factor: float = 1.0  # of SAM's best rho: about where this way's best one is

    @property
    def passes(self) -> float:
        """Forward and backward passes over a whole batch, per step."""
        return 1.0 if self.ascent == "momentum" else 1 + self.late / (self.interval * self.part)

    def first_epoch(self, epochs: int) -> int:
        """The first epoch with SAM."""
        return round(epochs * (1 - self.late))


WAYS = {
    "sam": Way("SAM"),
    "interval-2": Way("every 2nd step", interval=2, factor=2),
    "interval-4": Way("every 4th step", interval=4, factor=4),
    "interval-8": Way("every 8th step", interval=8, factor=8),
    "part-4": Way("1/4 of the batch", part=4, factor=1.4),
    "part-16": Way("1/16 of the batch", part=16, factor=2),
    "part-32": Way("1/32 of the batch", part=32, factor=2),
    "interval-4-part-4": Way("every 4th step, 1/4 of the batch", interval=4, part=4, factor=4),
    "momentum": Way("climb by momentum", ascent="momentum", factor=4),
    "late-2": Way("last half", late=1 / 2),
    "late-4": Way("last quarter", late=1 / 4),
}


class Network(NamedTuple):
    """A network, and how it is trained."""

    title: str
    base_width: int  # 1: widths enter as in Definition 4
    base_optimizer: str
    norm: str
    schedule: str  # "cosine" to the last epoch, or "constant"
    score: str  # which epoch's test accuracy counts: "best" or "last"
    momentum: float = 0.0
    gain: float = 2**0.5  # of the initial weights; sqrt(2) for ReLU
    cost_width: int = 250  # the width at which matrix products take as long as everything else


NETWORKS = {
    "mlp": Network("3-layer MLP", 1, "sgd", "joint", "constant", "best"),
    "mlp-momentum": Network("3-layer MLP", 1, "sgd", "joint", "constant", "best", momentum=0.9),
    "mlp-cosine": Network("3-layer MLP", 1, "sgd", "joint", "cosine", "last", momentum=0.9),
    "mlp-base-64": Network("3-layer MLP", 64, "sgd", "decoupled", "cosine", "last", momentum=0.9),
    "mlp-adamw": Network("3-layer MLP", 64, "adam", "decoupled", "constant", "last"),
    "resnet": Network("ResNet-18", 8, "sgd", "decoupled", "cosine", "last", momentum=0.9, cost_width=10),
    "resnet-28": Network("ResNet-18", 4, "sgd", "decoupled", "cosine", "last", momentum=0.9, cost_width=10),
    "vit": Network("ViT with two layers", 16, "adam", "decoupled", "cosine", "last", gain=1.0, cost_width=30),
    "vit-28": Network("ViT with two layers", 16, "adam", "decoupled", "cosine", "last", gain=1.0, cost_width=30),
}


class Run(NamedTuple):
    """One training run. rho 0 is the base optimizer alone, which the methods of a parameterization share."""

    data: str
    method: str
    width: int
    lr: float
    rho: float
    seed: int
    epochs: int
    network: str = "mlp"
    way: str = "sam"  # of WAYS; it counts for rho > 0 only


Rows = dict[Run, dict[str, Any]]  # of finished runs, as train() returns them


class Place(NamedTuple):
    """Where and how runs take place. The results differ by rounding only."""

    root: str | None = None  # folder of the data
    device: str = "cpu"
    graph: bool = False  # SAM's whole iterations as one CUDA graph
    jobs: int = 2  # runs at once


def add_place(parser: argparse.ArgumentParser) -> None:
    """The flags by which commands say where runs take place."""
    add = parser.add_argument
    add("--jobs", type=at_least(1, int), default=2, help="runs at once")
    add("--device", default="cpu")


@functools.cache
def data_on(name: str, root: str | None, device: str) -> tuple[data.Split, data.Split]:
    return tuple(tuple(t.to(device) for t in split) for split in data.load(name, root))


def make_network(name: str, width: int, x: Tensor, d_out: int, parameterization: str) -> nn.Module:
    """For inputs like x. Attention is scaled by 1/d in muP, by 1/sqrt(d) in SP; at the base width they agree."""
    if name.startswith("mlp"):
        return mup2.MLP(x[0].numel(), width, d_out)
    channels, *image = x.shape[1:]
    if name.startswith("resnet"):
        return networks.ResNet18(width, d_out, channels, small_images=name != "resnet-28")
    head_dim = NETWORKS[name].base_width // HEADS if parameterization == "mup" else None
    patch = 7 if name == "vit-28" else 2
    return networks.ViT(width, 2, HEADS, tuple(image), patch, d_out, channels, base_head_dim=head_dim)


def build(run: Run, x: Tensor, d_out: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model on x's device, and SAM, or its base optimizer alone for rho 0."""
    alone = {name: Method(parameterization, "naive") for parameterization, name in ALONE.items()}
    method = alone.get(run.method) or ALL_METHODS[run.method]
    network = NETWORKS[run.network]
    names = dict(base_optimizer=network.base_optimizer, norm=network.norm)
    scaling = mup2.exponents(method.parameterization, method.perturbation, method.variant, **names)
    torch.manual_seed(run.seed)
    widths = (run.width, network.base_width)
    model, base = (make_network(run.network, width, x, d_out, method.parameterization) for width in widths)
    mup2.init_(model, base, scaling, gain=network.gain)
    model.to(x.device, memory_format=torch.channels_last)  # convolutions take a sixth less time on a CPU
    groups = mup2.param_groups(model, base, scaling, lr=run.lr, rho=run.rho, perturb=method.perturb)
    kind = torch.optim.AdamW if network.base_optimizer == "adam" else torch.optim.SGD
    options = dict(momentum=network.momentum) if network.momentum else {}
    if run.rho == 0:
        return model, kind(groups, **options)
    way = WAYS[run.way]
    return model, mup2.SAM(groups, kind, interval=way.interval, ascent=way.ascent, **options)


def trainings(run: Run, train: data.Split, place: Place) -> tuple[Training, Training]:
    """Of one model, which share a scheduler: before SAM is used, and with SAM. The same one for the base optimizer."""
    x, y = train
    model, optimizer = build(run, x, int(y.max()) + 1)
    steps = run.epochs * math.ceil(len(x) / BATCH)
    cosine = NETWORKS[run.network].schedule == "cosine"
    base = getattr(optimizer, "base_optimizer", optimizer)  # which makes every step, with SAM and before
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(base, steps) if cosine else None
    example = (x[:BATCH], y[:BATCH]) if place.graph and run.rho else None
    part = {} if WAYS[run.way].part == 1 or run.rho == 0 else {"ascent_samples": BATCH // WAYS[run.way].part}
    before = Training(model, base, scheduler=scheduler)
    return before, Training(model, optimizer, scheduler=scheduler, example=example, **part)


def train(run: Run, place: Place) -> dict[str, Any]:
    """Train once. Returns the run with its best and its last accuracy in %, the epochs it lasted, where and when.

    Where only the last epoch counts, only this one is tested. The run ends early when the loss is not finite; with no
    epoch tested, the accuracy is that of guessing.
    """
    (x, y), test = data_on(run.data, place.root, place.device)
    start, first = time.perf_counter(), WAYS[run.way].first_epoch(run.epochs)
    before, with_sam = trainings(run, (x, y), place)
    accuracies, finished, shuffle = [], 0, torch.Generator().manual_seed(run.seed)
    tested = range(run.epochs) if NETWORKS[run.network].score == "best" else [run.epochs - 1]
    for i in range(run.epochs):
        training = before if i < first else with_sam
        if not math.isfinite(training.train_epoch(data.batches((x, y), BATCH, shuffle)).item()):
            break
        finished += 1
        if i in tested:
            accuracies.append(training.evaluate([test])[1])
    accuracies = accuracies or [100 / (int(y.max()) + 1)]
    row = run._asdict() | {"best": round(max(accuracies), 2), "last": round(accuracies[-1], 2), "finished": finished}
    row |= {"seconds": round(time.perf_counter() - start, 1)}
    return row | {"device": device_name(place.device), "date": time.strftime("%Y-%m-%d")}


def score(runs: Rows, run: Run) -> float:
    """The test accuracy in % that counts."""
    return runs[run][NETWORKS[run.network].score] or 0.0


def read_runs(path: Path) -> Rows:
    """The finished runs of earlier commands. A line that an interruption cut off is dropped from the file.

    Raises DataError for any other damaged line.
    """
    runs: Rows = {}
    *lines, cut_off = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        with reading(f"line {number} of {path}", "remove this line, and the same command trains its run again"):
            row = json.loads(line)
            run = Run(**{field: row[field] for field in Run._fields if field in row})
            runs[run] = row
            float(score(runs, run))  # an error where there is no accuracy
    if cut_off:
        os.truncate(path, path.stat().st_size - len(cut_off))
    return runs


def sweep(runs: list[Run], path: Path, place: Place, title: str) -> Rows:
    """Train the runs that the file does not have yet, seed by seed, long ones first. Returns all that it has then."""
    from tqdm import tqdm

    done = read_runs(path)
    todo = sorted((run for run in dict.fromkeys(runs) if run not in done), key=lambda run: (run.seed, -cost(run)))
    if not todo:
        return done
    path.parent.mkdir(parents=True, exist_ok=True)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with (
        worker_processes(place.jobs) as pool,
        path.open("a") as file,
        tqdm(total=sum(map(cost, todo)), desc=title, bar_format=bar_format) as bar,
    ):
        futures = {pool.submit(train, run, place): run for run in todo}
        for n, future in enumerate(as_completed(futures), 1):
            run, row = futures[future], future.result()
            file.write(json.dumps(row) + "\n")
            file.flush()
            done[run] = row
            bar.set_postfix_str(f"run {n} of {len(todo)}", refresh=False)
            bar.update(cost(run))
    return done


def cost(run: Run) -> int:
    """The expected time of one epoch, in arbitrary units: overhead plus matrix products. SAM takes two passes."""
    matrix_products = (run.width / NETWORKS[run.network].cost_width) ** 2
    first_passes = WAYS[run.way].passes - 1 if run.rho else 0
    return round(100 * (1 + matrix_products) * (0.4 + 0.6 * first_passes))

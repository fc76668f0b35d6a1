"""Does SAM reach every layer of my network at every width? `python -m mup2_fused.check module:factory` measures it.

factory(width) returns the model, or (model, loss) with loss(model) a scalar on fixed data; without loss, the data are
random. The model is built at each width and takes a few SAM steps; in the last one we measure, for every parameter, by
what power of the width these grow:

    init          standard deviation of its initial weights (muP: 0 input, -1/2 hidden, -1 output)
    update        change of its module's output by its update
    perturbation  change of its module's output by its perturbation e
    norm share    its part s ||T g|| of the joint norm ||v||

In muP² update and perturbation have power 0: no layer stands still and none blows up as the network gets wider. The
two changes are the rms over samples and coordinates of f(w + change, x) - f(w, x), f being the module that owns the
parameter and x its input in the (perturbed) network. The last row is the same for the output of the whole network.

Without --groups the model gets mup2_ref.param_groups with the narrowest width as base, and mup2_ref.init_ with zero
output weights (random outputs at the start change the errors in a way that depends on the width); a power far from 0
then means that a role is wrong, or that the model is one that muP does not make alike at all widths. --groups
module:function checks your own groups and initial weights: function(model) returns what you give to SAM. They are
compared with muP² groups on the same model, so that powers which small networks have anyway cancel.

Models of the mup package (with set_base_shapes called by the factory) are recognised. Exit status 1 if something is
wrong: the layer is named, with what to change.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mup2_fused
import mup2_ref
from mup2_fused.verify import attribute

QUANTITIES = ("init", "update", "perturbation", "norm share")
WHOLE = "(network output)"
# Theory's powers are multiples of 1/2, so that half of that separates them; but only where a measurement with muP²
# groups is there to compare with. Without it, layers that are not aligned with each other yet (a few steps after the
# start) and finite widths are up to 0.7 off; a wrong role is 1 off.
TOLERANCE = {"init": 0.25, "compared": 0.25, "alone": 0.8}
NEGLIGIBLE = 1e-5  # of the joint norm: a bias before a normalization, or of keys, has no gradient but rounding errors
Loss = Callable[[nn.Module], Tensor]
Values = dict[str, dict[str, float]]  # parameter -> quantity -> value


class Slope(NamedTuple):
    """Power of the width, with its standard error over seeds, and what it should be. nan: nothing changes."""

    value: float
    error: float
    expected: float
    tolerance: float

    @property
    def excess(self) -> float:
        return self.value - self.expected

    @property
    def off(self) -> bool:
        return abs(self.excess) > self.tolerance

    @property
    def sure(self) -> bool:
        return abs(self.excess) - 2 * self.error > self.tolerance / 2

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        value = f"{self.value:+.2f}"
        return value if self.tolerance == TOLERANCE["alone"] else f"{value} ({self.expected:+.2f})"


class Row(NamedTuple):
    name: str
    shape: tuple[int, ...]  # at the largest width
    role: str
    slopes: dict[str, Slope]  # by quantity
    values: dict[str, list[float]]  # geometric mean over seeds, by width
    wrong: tuple[str, ...]  # quantities with the wrong power
    unclear: tuple[str, ...]  # and those that may have
    advice: tuple[str, ...]


class Report(NamedTuple):
    """What was measured; print(report) shows the table and the advice."""

    widths: list[int]
    rows: list[Row]
    notes: list[str]  # on what the rows have in common

    @property
    def passed(self) -> bool:
        return not any(row.wrong for row in self.rows)

    def __str__(self) -> str:
        return text(self)


# ------------------------------------------------------------------------------------- one model at one width


def probe(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, tuple], Tensor]:
    """Arguments of the first call of every module, by name, and the network's output."""
    inputs: dict[str, tuple] = {}
    outputs: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda m, a, k, name=name: inputs.setdefault(name, (a, k)) and None, with_kwargs=True
        )
        for name, m in model.named_modules()
    ]
    hooks.append(model.register_forward_hook(lambda m, args, out: outputs.append(_tensor(out))))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, outputs[0]


def _tensor(out: Any) -> Tensor:
    """The output that counts, of modules that return more than one, and of Hugging Face's models."""
    while not isinstance(out, Tensor):
        out = out.logits if hasattr(out, "logits") else out[0]
    return out.detach()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def effect(model: nn.Module, name: str, role: str, after: Tensor, inputs: dict[str, tuple]) -> float:
    """rms change of the module's output when this parameter alone changes to after; nothing in the model is changed."""
    p, owner = model.get_parameter(name), name.rpartition(".")[0]
    if any(model.get_submodule(owner).children()) and role in ("input", "finite"):
        return _rms(after - p)  # a raw vector, such as a class token, is added to what flows through the module
    while owner not in inputs:  # a module whose parameters another one reads is never called itself
        owner = owner.rpartition(".")[0]
    module = model.get_submodule(owner)
    args, kwargs = inputs[owner]
    before, buffers = p.detach().clone(), [(b, b.clone()) for b in module.buffers()]
    outs = []
    for value in (after, before):
        p.copy_(value)
        torch.manual_seed(0)  # the same dropout
        outs.append(_tensor(module(*args, **kwargs)).clone())
    for b, old in buffers:
        b.copy_(old)
    return _rms(outs[0] - outs[1])


def measure(model: nn.Module, loss: Loss, opt: mup2_ref.SAM, roles: dict[str, str], steps: int) -> Values:
    """Takes steps SAM steps and measures in one more: QUANTITIES by parameter, and how the network's output moves."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values: Values = {n: {"init": p.detach().double().std(correction=0).item()} for n, p in params.items()}

    def weights() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in params.items()}

    def run() -> Tensor:
        torch.manual_seed(1)
        return loss(model)

    def closure() -> Tensor:
        opt.zero_grad()
        value = run()
        value.backward()
        if not value.isfinite():
            raise FloatingPointError("the loss is no longer finite: lower lr or rho")
        return value.detach()

    for _ in range(steps):
        opt.step(closure)
    closure()
    group_of = {p: g for g in opt.param_groups for p in g["params"]}
    perturbed = {n: p for n, p in params.items() if p.grad is not None and group_of.get(p, {}).get("perturb")}
    parts = {n: [(p, p.grad, group_of[p]["gradnorm_scaling"])] for n, p in perturbed.items()}
    norm = mup2_ref.joint_norm([x for part in parts.values() for x in part], opt.variant)
    share = {n: (mup2_ref.joint_norm(part, opt.variant) / norm).item() for n, part in parts.items()}
    before = weights()
    inputs, output = probe(model, run)
    opt.first_step()
    climbed = weights()
    climbed_inputs, climbed_output = probe(model, run)
    closure()
    opt.second_step()
    after = weights()
    _, after_output = probe(model, run)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])

    for name in params:
        values[name]["update"] = effect(model, name, roles[name], after[name], inputs)
        if name in perturbed:
            values[name]["perturbation"] = effect(model, name, roles[name], climbed[name], climbed_inputs)
            values[name]["norm share"] = share[name]
    values[WHOLE] = {"update": _rms(after_output - output), "perturbation": _rms(climbed_output - output)}
    return values


# -------------------------------------------------------------------------------------- all widths, all seeds


def random_data(model: nn.Module, shape: tuple[int, ...] | None, vocabulary: int | None, batch: int, seed: int) -> Loss:
    """Cross entropy on random inputs; labels follow from the inputs, so that there is something to learn.

    shape: of one sample; None: guessed from the first layer. vocabulary: inputs are token numbers below it.
    """
    first = next(
        (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))), None
    )
    if isinstance(first, nn.Embedding):
        vocabulary = vocabulary or first.num_embeddings
        shape = shape or (16,)
    elif isinstance(first, nn.modules.conv._ConvNd):
        shape = shape or (first.in_channels, *[32] * len(first.kernel_size))
    elif isinstance(first, nn.Linear):
        shape = shape or (first.in_features,)
    if shape is None:
        raise ValueError(
            "cannot guess what the inputs look like: pass --input, or let the factory return (model, loss)"
        )
    p = next(model.parameters())
    g = torch.Generator().manual_seed(seed)
    if vocabulary:
        x = torch.randint(vocabulary, (batch, *shape), generator=g)
        features = F.one_hot(x, vocabulary).float()
    else:
        x = torch.randn(batch, *shape, generator=g)
        features = x.flatten(1)
    teacher = torch.randn(features.shape[-1], 4096, generator=g)
    x = x.to(p.device, None if vocabulary else p.dtype)

    def loss(model: nn.Module) -> Tensor:
        out = model(x)
        out = out.logits if hasattr(out, "logits") else out
        classes = out.shape[-1]
        labels = (features @ teacher[:, :classes]).argmax(-1).to(out.device)
        if out.ndim == 2 and labels.ndim > 1:  # one label for a sequence
            labels = (features.mean(1) @ teacher[:, :classes]).argmax(-1).to(out.device)
        return F.cross_entropy(out.flatten(0, -2).float(), labels.flatten())

    return loss


def check(
    factory: Callable[[int], Any],
    widths: list[int],
    *,
    groups: Callable[[nn.Module], Any] | None = None,
    own_init: bool = False,
    roles: dict[str, str] | None = None,
    base_optimizer: str = "sgd",
    variant: str = "sam",
    lr: float | None = None,
    rho: float | None = None,
    steps: int = 5,
    seeds: int = 3,
    input_shape: tuple[int, ...] | None = None,
    vocabulary: int | None = None,
    batch: int = 32,
    device: str = "cpu",
    progress: Callable[[list], Any] = iter,
) -> Report:
    """Measures a model at several widths; see the top of this file for what.

    factory(width) -> model or (model, loss); groups(model) -> parameter groups for SAM, own ones. own_init: keep the
    weights as the factory draws them (always so with groups). roles: as in mup2_ref.param_groups. variant and
    base_optimizer ("sgd", "adam") are used with both kinds of groups, lr and rho with muP²'s; default: the median of
    your groups at the narrowest width, otherwise lr 0.05, Adam's 0.001, and rho 0.02. steps: before the one that is
    measured. progress: wraps the list of runs to work through, as tqdm does.
    Raises ValueError for fewer than two widths and for what param_groups refuses.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise ValueError(f"an exponent takes at least two widths, not {widths}")
    own_init = own_init or groups is not None
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[base_optimizer]
    base = _build(factory, widths[0])[0]
    if all(hasattr(p, "infshape") for p in base.parameters()):
        base = None
    defaults = [{"lr": {"sgd": 0.05, "adam": 0.001}[base_optimizer], "rho": 0.02}]
    if groups:
        defaults = mup2_fused.SAM(groups(_build(factory, widths[0])[0]), kind, variant=variant).param_groups
    lr, rho = (
        float(statistics.median(g[key] for g in defaults)) if value is None else value
        for key, value in (("lr", lr), ("rho", rho))
    )
    widest = _build(factory, widths[-1])[0]
    described = mup2_ref._tensors(widest, base, roles)
    role_of = {n: t.role for n, t in described.items()}
    readouts = {n: role for n, role in role_of.items() if role == "output"}

    measured: dict[tuple[bool, int, int], Values] = {}  # by (own groups?, seed, width)
    own_groups: dict[int, list[dict[str, Any]]] = {}
    sides = [False, True] if groups else [False]
    for own, seed, width in progress([(o, s, w) for s in range(seeds) for w in widths for o in sides]):
        torch.manual_seed(seed)
        model, loss = _build(factory, width)
        model = model.to(device)
        if not own_init:
            mup2_ref.init_(model, base, roles=(roles or {}) | readouts, gain=1.0, zero_output=bool(readouts))
        options = dict(lr=lr, rho=rho, roles=roles, base_optimizer=base_optimizer, variant=variant)
        made = groups(model) if groups else None  # which may draw initial weights too, on either side
        made = made if own else mup2_ref.param_groups(model, base, **options)
        opt = mup2_fused.SAM(made, kind, variant=variant)
        if own:
            own_groups[width] = opt.param_groups
        loss = loss or random_data(model, input_shape, vocabulary, batch, seed)
        measured[own, seed, width] = measure(model, loss, opt, role_of, steps)
    rows = [_row(name, widths, seeds, measured, described.get(name)) for name in measured[sides[-1], 0, widths[-1]]]
    return Report(widths, rows, _notes(rows, own_groups, widths) if groups else [])


def _build(factory: Callable[[int], Any], width: int) -> tuple[nn.Module, Loss | None]:
    made = factory(width)
    return made if isinstance(made, tuple) else (made, None)


def _slopes(widths: list[int], y: Tensor) -> Tensor:
    """(seeds, widths) -> least-squares slope of log y against log width, per seed."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    x = x - x.mean()
    return y.log() @ x / x.square().sum()


def _row(name: str, widths: list[int], seeds: int, measured: dict, tensor: Any) -> Row:
    """Slopes of one parameter, in the own groups if there are any, then compared with those in muP² groups."""
    compared = any(own for own, *_ in measured)
    slopes, values, advice = {}, {}, {}
    for quantity in QUANTITIES:
        y, y0 = (
            torch.tensor(
                [[measured[own, s, w][name].get(quantity, 0.0) for w in widths] for s in range(seeds)]
            ).double()
            for own in (compared, False)
        )  # (seeds, widths)
        share = [m[name].get("norm share", 1.0) for (own, *_), m in measured.items() if own == compared]
        if (y <= 0).any() or (quantity != "init" and max(share) < NEGLIGIBLE):
            slopes[quantity], values[quantity] = Slope(math.nan, math.nan, math.nan, math.nan), []
            if quantity == "update" and (y == 0).all() and (y0 > 0).all():
                advice[quantity] = "never updated: it is in no parameter group, or its learning rate is 0"
            continue
        values[quantity] = y.log().mean(0).exp().tolist()
        each = _slopes(widths, y)
        expected, tolerance = torch.zeros_like(each), TOLERANCE["alone"]
        if quantity == "init" and tensor is not None:
            growth = mup2_ref._init_scale(tensor, "mup") * tensor.divisor
            expected, tolerance = expected + math.log(growth) / math.log(widths[-1] / widths[0]), TOLERANCE["init"]
        elif compared and (y0 > 0).all():
            expected, tolerance = _slopes(widths, y0), TOLERANCE["compared"]
        error = (each - expected).std().item() / seeds**0.5 if seeds > 1 else 0.0
        slopes[quantity] = Slope(each.mean().item(), error, expected.mean().item(), tolerance)
    if tensor is None:  # the network's output: for information
        return Row(name, (), "", slopes, values, (), (), ())
    off = [q for q in ("init", "update", "perturbation") if slopes[q].off]
    advice |= {q: _advice(q, slopes[q].excess, compared) for q in off if slopes[q].sure}
    unclear = tuple(q for q in off if q not in advice)
    return Row(
        name, tuple(tensor.param.shape), tensor.role, slopes, values, tuple(advice), unclear, tuple(advice.values())
    )


# ------------------------------------------------------------------------------------------- what it means


def _power(x: float) -> str:
    """n^(1/2), n^-1: measured powers rounded to theory's halves."""
    halves = round(2 * x)
    return f"n^{halves // 2}" if halves % 2 == 0 else f"n^({halves}/2)"


def _advice(quantity: str, excess: float, compared: bool) -> str:
    way = "grows" if excess > 0 else "vanishes"
    remedy = _power(-excess)
    if quantity == "init":
        return f"initial weights are {_power(excess)} times what muP has: call mup2_ref.init_(model, base_model)"
    if quantity == "update":
        advice = f"update {way} as {_power(excess)}: multiply the learning rate by {remedy} (n: width / base width)"
    else:
        end = "it will blow up" if excess > 0 else "SAM does not reach this layer in a wide network"
        advice = f"perturbation {way} as {_power(excess)}, {end}: multiply rho by {remedy}"
    return advice if compared else advice + ", or is the role wrong? roles={name: role} settles it"


def _notes(rows: list[Row], own_groups: dict[int, list[dict[str, Any]]], widths: list[int]) -> list[str]:
    """What the rows have in common, and how that comes about."""
    rows = [r for r in rows if r.name != WHOLE]
    perturbed = [r for r in rows if not math.isnan(r.slopes["perturbation"].value)]
    bad_e, bad_u = ([r for r in rows if q in r.wrong] for q in ("perturbation", "update"))

    def settings(key: str, width: int) -> list[float]:
        return sorted({float(g[key]) for g in own_groups[width] if g["perturb"]})

    narrow, wide = ({k: settings(k, w) for k in ("lr", "rho", "gradnorm_scaling")} for w in (widths[0], widths[-1]))
    notes = []
    if any("init" in r.wrong for r in rows):
        notes.append(
            "initial weights are not muP's: correct them first, as gradients and all that follows change with them"
        )
    if bad_u and narrow == wide:
        notes.append(
            f"learning rates and radii are the same at widths {widths[0]} and {widths[-1]}: either these are no muP² "
            "groups, or their base model is as wide as the model. Build the base model at one fixed width."
        )
    elif len(bad_u) > 1 and len(wide["lr"]) == 1:
        notes.append("all layers have one learning rate: in muP it depends on the role, as in mup2_ref.param_groups")
    if bad_e and len(wide["rho"]) == 1 and len(wide["gradnorm_scaling"]) == 1:
        notes.append(
            "all layers have one radius: this is SAM without muP². Use the groups of mup2_ref.param_groups(model, "
            "base_model, lr=..., rho=...), with perturbation='effective'."
        )
    common = statistics.median([r.slopes["perturbation"].excess for r in perturbed] or [0.0])
    together = [r for r in perturbed if abs(r.slopes["perturbation"].excess - common) < TOLERANCE["compared"]]
    if bad_e and abs(common) > TOLERANCE["compared"] and len(together) == len(perturbed):
        top = max(perturbed, key=lambda r: r.slopes["norm share"].excess)
        notes.append(
            f"all perturbations change alike, as {_power(common)}: it is the norm that they are divided by, of which "
            f"'{top.name}' has a growing share. gradnorm_scaling must go with rho, as in mup2_ref.param_groups."
        )
    return notes


def text(report: Report) -> str:
    """The table, and below it what to change."""
    lines = [("parameter", "shape", "role", *QUANTITIES, "")]
    for r in report.rows:
        if r.wrong or r.unclear:
            verdict = ", ".join([f"{q} wrong" for q in r.wrong] + [f"{q} unclear" for q in r.unclear])
        elif all(math.isnan(r.slopes[q].value) for q in ("update", "perturbation")):
            verdict = "no gradient"
        else:
            verdict = "" if r.name == WHOLE else "ok"
        slopes = [str(r.slopes[q]) for q in QUANTITIES]
        lines.append((r.name, "x".join(map(str, r.shape)), r.role, *slopes, verdict))
    sizes = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join(c.ljust(n) for c, n in zip(line, sizes)).rstrip() for line in lines]
    out = [
        f"powers of the width, measured at {', '.join(map(str, report.widths))} (in brackets: with muP²)",
        *table,
        "",
    ]

    wrong = [r for r in report.rows if r.wrong]
    out += [f"* {note}" for note in report.notes]
    for advice in dict.fromkeys(a for r in wrong for a in r.advice):
        names = [r.name for r in wrong if advice in r.advice]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        out.append(f"* {', '.join(names[:4])}{more}: {advice}")
    if unclear := sum(bool(r.unclear) for r in report.rows):
        out.append(f"* {unclear} rows are too noisy to tell: use more --seeds, a larger --batch or more --widths")
    count = len(report.rows) - 1
    out.append(f"Passed: {count} parameters" if report.passed else f"FAILED: {len(wrong)} of {count} parameters")
    return "\n".join(out)


def plot(report: Report, path: str | Path) -> None:
    """Each quantity against the width, relative to the narrowest, one line per parameter; wrong ones dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"input": "tab:blue", "hidden": "tab:orange", "output": "tab:green", "finite": "tab:gray", "": "black"}
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, QUANTITIES):
        seen = set()
        for r in report.rows:
            if not r.values[quantity]:
                continue
            wrong, label = quantity in r.wrong, r.role or "network output"
            if wrong:
                label += ", wrong"
            y = r.values[quantity]
            axis.loglog(
                report.widths,
                [v / y[0] for v in y],
                "x--" if wrong else "o-",
                color=colors[r.role],
                alpha=0.9 if wrong else 0.5,
                markersize=4,
                label=None if label in seen else label,
            )
            seen.add(label)
        axis.set_title(quantity)
        axis.set_xlabel("width")
        axis.set_xticks(report.widths, [str(w) for w in report.widths])
        axis.minorticks_off()
        if seen:
            axis.legend(fontsize=8)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0.3), max(high, 3))
    ticks = [t for t in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if min(low, 0.3) <= t <= max(high, 3)]
    axes[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].set_ylabel(f"relative to width {report.widths[0]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- the command


def _progress() -> Callable[[list], Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter
    return lambda runs: tqdm(runs, desc="measuring", leave=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(separator: str) -> Callable[[str], tuple[int, ...]]:
        return lambda s: tuple(int(x) for x in s.split(separator))

    def pairs(s: str) -> dict[str, str]:
        return dict(pair.split("=") for pair in s.split(","))

    parser.add_argument("factory", help="module:factory; factory(width) returns the model or (model, loss)")
    parser.add_argument("--widths", type=numbers(","), default=(64, 128, 256, 512), help="such as 128,256,512,1024")
    parser.add_argument("--groups", help="module:function; function(model) returns your parameter groups")
    parser.add_argument("--own-init", action="store_true", help="keep the factory's initial weights")
    parser.add_argument("--roles", type=pairs, help="as in param_groups: embed.weight=input,head.weight=output")
    parser.add_argument("--base-optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--variant", choices=mup2_ref.VARIANTS, default="sam")
    parser.add_argument(
        "--lr", type=float, help="muP²'s; default: your groups' at the narrowest width, or 0.05 (0.001)"
    )
    parser.add_argument("--rho", type=float, help="the same; default 0.02")
    parser.add_argument("--steps", type=int, default=5, help="SAM steps before the one that is measured")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--input", type=numbers("x"), dest="input_shape", help="shape of one sample, such as 3x32x32")
    parser.add_argument("--vocabulary", type=int, help="inputs are token numbers below this")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", help="file for the log-log plots, such as check.png (needs matplotlib)")
    args = vars(parser.parse_args(arguments))
    factory, groups, picture = attribute(args.pop("factory")), args.pop("groups"), args.pop("picture")
    try:
        report = check(
            factory, args.pop("widths"), groups=attribute(groups) if groups else None, progress=_progress(), **args
        )
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    if picture:
        plot(report, picture)
        print(f"picture: {picture}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())

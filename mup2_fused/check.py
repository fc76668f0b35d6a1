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
# groups is there to compare with. Without it, a wrong role is 1 off or more, while layers that are not aligned with
# each other yet, a few steps after the start, fall by up to n^-1 (queries and keys of deep ViTs did, to -1.2).
TOLERANCE = {  # above, below
    "init": (0.25, 0.25),
    "compared": (0.25, 0.25),
    "alone": (0.8, 1.3),
    "output": (0.5, math.inf),
}
NEGLIGIBLE = 1e-5  # of the joint norm: a bias before a normalization, or of keys, has no gradient but rounding errors
Loss = Callable[[nn.Module], Tensor]
Values = dict[str, dict[str, float]]  # parameter -> quantity -> value


class Slope(NamedTuple):
    """Power of the width, with its standard error over seeds, and what it should be. nan: nothing changes."""

    value: float
    error: float
    expected: float
    kind: str  # of TOLERANCE

    @property
    def excess(self) -> float:
        return self.value - self.expected

    def off(self, margin: float = 0.0) -> bool:
        """Beyond the tolerance, by more than the margin."""
        above, below = TOLERANCE[self.kind]
        return self.excess - margin > above or -self.excess - margin > below

    @property
    def sure(self) -> bool:
        return self.off(2 * self.error - 0.1)

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        value = f"{self.value:+.2f}"
        return f"{value} ({self.expected:+.2f})" if self.kind in ("init", "compared") else value


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
        return not any(row.wrong or row.unclear for row in self.rows)

    def __str__(self) -> str:
        return text(self)


# ------------------------------------------------------------------------------------- one model at one width


def probe(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, tuple], Tensor | None]:
    """Arguments of every module's first call, by name, and the network's output (None if only parts are called)."""
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
    return inputs, outputs[0] if outputs else None


def _tensor(out: Any) -> Tensor:
    """The output that counts, of modules that return more than one, and of Hugging Face's models."""
    while not isinstance(out, Tensor):
        parts = [out.logits] if hasattr(out, "logits") else list(out.values()) if isinstance(out, dict) else list(out)
        out = next(part for part in parts if part is not None)
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
        if not owner:
            return 0.0
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
    parts: dict[str, list[Any]] = {n: [(p, p.grad, group_of[p]["gradnorm_scaling"])] for n, p in perturbed.items()}
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
    moves: dict[str, Any] = {"update": after_output, "perturbation": climbed_output}
    values[WHOLE] = {} if output is None else {q: _rms(moved - output) for q, moved in moves.items()}
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
        if not isinstance(out, Tensor) or out.ndim not in (2, features.ndim) or out.shape[-1] < 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"random data are for classifiers, with an output (batch, classes) or, for tokens, (batch, length, "
                f"classes), not {got}: let the factory return (model, loss)"
            )
        classes = out.shape[-1]
        signal = features if out.ndim == features.ndim else features.mean(1)  # one label for a sequence
        labels = (signal @ teacher[:, :classes]).argmax(-1).to(out.device)
        return F.cross_entropy(out.flatten(0, -2).float(), labels.flatten())

    return loss


KEYS = ("lr", "rho", "gradnorm_scaling")
Settings = dict[str, dict[str, float]]  # parameter -> KEYS


def _settings(model: nn.Module, opt: mup2_ref.SAM) -> Settings:
    """What the optimizer's groups say of each parameter."""
    names = {p: n for n, p in model.named_parameters()}
    groups = opt.param_groups
    return {names[p]: {k: float(g[k]) for k in (*KEYS, "perturb")} for g in groups for p in g["params"] if p in names}


@torch.random.fork_rng()
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
    rho: float = 0.02,
    steps: int = 5,
    seeds: int = 3,
    input_shape: tuple[int, ...] | None = None,
    vocabulary: int | None = None,
    batch: int = 32,
    device: str = "cpu",
    progress: Callable[[list], Any] = iter,
) -> Report:
    """Measures a model at several widths; see the top of this file for what.

    factory(width) -> a new model or (model, loss); groups(model) -> own parameter groups for SAM. own_init: keep the
    weights as the factory draws them (always so with groups). roles: as in mup2_ref.param_groups. variant and
    base_optimizer ("sgd", "adam") are used with both kinds of groups. lr (default 0.05, Adam's 0.001) and rho: without
    groups; those that own groups are compared with start from the same values at the narrowest width. steps: before
    the one that is measured. progress: wraps the list of runs to work through, as tqdm does.

    Raises ValueError for fewer than two widths, models that do not get wider or learn nothing, and for what
    param_groups refuses; FloatingPointError for a loss that is not finite. Random states are as before afterwards.
    """
    widths = sorted(set(widths))
    if len(widths) < 2 or seeds < 1:
        raise ValueError(f"an exponent takes at least two widths and one seed, not {widths} and {seeds}")
    options: dict[str, Any] = dict(roles=roles, base_optimizer=base_optimizer, variant=variant)
    own_init = own_init or groups is not None
    lr = lr or {"sgd": 0.05, "adam": 0.001}[base_optimizer]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[base_optimizer]

    def optimizer(groups: Any) -> mup2_ref.SAM:
        if isinstance(groups, torch.optim.Optimizer) or not hasattr(groups, "__iter__"):
            raise TypeError(f"groups(model) returns parameter groups, as for SAM, not {type(groups).__name__}")
        return mup2_fused.SAM(groups, kind, variant=variant)

    narrow, wide = (_build(factory, width)[0] for width in (widths[0], widths[-1]))
    if [p.shape for p in narrow.parameters()] == [p.shape for p in wide.parameters()]:
        raise ValueError(f"the factory makes models of the same shapes at widths {widths[0]} and {widths[-1]}")
    base = None if all(hasattr(p, "infshape") for p in narrow.parameters()) else narrow
    described = [mup2_ref._tensors(model, base, roles) for model in (narrow, wide)]
    role_of = {n: t.role if t.role != "finite" else described[0][n].role for n, t in described[1].items()}
    everywhere = [n for n, _ in wide.named_parameters(remove_duplicate=False)]
    tied = {n for n in role_of if sum(wide.get_parameter(m) is wide.get_parameter(n) for m in everywhere) > 1}
    readouts = {n: role for n, role in role_of.items() if role == "output" and n not in tied}

    def factors(model: nn.Module) -> Settings:
        return _settings(model, optimizer(mup2_ref.param_groups(model, base, lr=1.0, rho=1.0, **options)))

    def mup_groups(model: nn.Module) -> list[dict[str, Any]]:
        """muP²'s, with the values that own groups have at the narrowest width."""
        now, made = factors(model), []
        for n, p in model.named_parameters():
            if p.requires_grad:
                start = at_start.get(n, {"lr": lr, "rho": rho, "gradnorm_scaling": 1.0, "perturb": 1.0})
                made.append({"params": [p], "perturb": bool(start["perturb"])})
                made[-1] |= {k: start[k] * now[n][k] / first[n][k] for k in KEYS}
        return made

    first = factors(narrow)
    at_start = _settings(narrow, optimizer(groups(narrow))) if groups else {}
    measured: dict[tuple[bool, int, int], Values] = {}  # by (own groups?, seed, width)
    own: dict[int, Settings] = {}
    sides = [False, True] if groups else [False]
    for mine, seed, width in progress([(side, s, w) for s in range(seeds) for w in widths for side in sides]):
        torch.manual_seed(seed)
        model, loss = _build(factory, width)
        model = model.to(device)
        if not own_init:
            words = (roles or {}) | readouts
            mup2_ref.init_(model, base, roles=words, gain=1.0, zero_output=bool(readouts))
        made = groups(model) if groups else None  # on both sides, as it may draw initial weights too
        opt = optimizer(made if mine else mup_groups(model))
        if mine:
            own[width] = _settings(model, opt)
        measured[mine, seed, width] = measure(
            model, loss or random_data(model, input_shape, vocabulary, batch, seed), opt, role_of, steps
        )
    rows = [
        _row(name, widths, seeds, measured, described[0].get(name), described[1].get(name), role_of.get(name, ""))
        for name in measured[sides[-1], 0, widths[-1]]
    ]
    if not any(row.values["update"] for row in rows if row.name != WHOLE):
        hint = "" if own_init else "; if its output must not start at zero, use own_init (--own-init)"
        raise ValueError(f"no parameter has a gradient: the model learns nothing from this loss{hint}")
    if any(row.wrong for row in rows[:-1]):  # which the network's output follows
        rows[-1] = rows[-1]._replace(wrong=(), advice=())
    if not groups:
        return Report(widths, rows, [])
    grown = {  # by how much more than muP²'s factors, as a power of the width
        n: {
            k: math.log((own[widths[-1]][n][k] / own[widths[0]][n][k]) / (factors(wide)[n][k] / first[n][k]))
            / math.log(widths[-1] / widths[0])
            for k in ("rho", "gradnorm_scaling")
        }
        for n in own[widths[-1]]
        if own[widths[0]][n]["rho"] > 0 and own[widths[-1]][n]["rho"] > 0
    }
    rows = [_judge_norm(row, grown) for row in rows]
    return Report(widths, rows, _notes(rows, own, widths))


def _judge_norm(row: Row, grown: dict[str, dict[str, float]]) -> Row:
    """A part of the norm that grows faster than all radii makes every perturbation vanish in the end."""
    if row.name not in grown or not row.values["norm share"]:
        return row
    excess = grown[row.name]["gradnorm_scaling"] - max(g["rho"] for g in grown.values())
    if excess <= TOLERANCE["compared"][0]:
        return row
    advice = (
        f"its part of the norm grows as {_power(excess)}, and all perturbations vanish once it dominates: multiply "
        f"gradnorm_scaling by {_power(-excess)}"
    )
    return row._replace(wrong=(*row.wrong, "norm share"), advice=(*row.advice, advice))


def _build(factory: Callable[[int], Any], width: int) -> tuple[nn.Module, Loss | None]:
    made = factory(width)
    return made if isinstance(made, tuple) else (made, None)


def _slopes(widths: list[int], y: Tensor) -> Tensor:
    """(seeds, widths) -> least-squares slope of log y against log width, per seed."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    x = x - x.mean()
    return y.log() @ x / x.square().sum()


def _row(name: str, widths: list[int], seeds: int, measured: dict, narrow: Any, wide: Any, role: str) -> Row:
    """Slopes of one parameter (narrow and wide: its description), in own groups if there are any, then compared."""
    compared = any(own for own, *_ in measured)
    slopes: dict[str, Slope] = {}
    values: dict[str, list[float]] = {}
    advice: dict[str, str] = {}
    for quantity in QUANTITIES:
        y, y0 = (
            torch.tensor(
                [[measured[own, s, w][name].get(quantity, 0.0) for w in widths] for s in range(seeds)]
            ).double()
            for own in (compared, False)
        )  # (seeds, widths)
        share = [m[name].get("norm share", 1.0) for (own, *_), m in measured.items() if own == compared]
        if (y <= 0).any() or (quantity != "init" and max(share) < NEGLIGIBLE):
            slopes[quantity], values[quantity] = Slope(math.nan, math.nan, math.nan, "alone"), []
            if quantity == "update" and (y == 0).all() and (y0 > 0).all():
                advice[quantity] = "never updated: it is in no parameter group, or its learning rate is 0"
            continue
        values[quantity] = y.log().mean(0).exp().tolist()
        each = _slopes(widths, y)
        expected, kind = torch.zeros_like(each), "alone"
        if wide is None:
            kind = "output"
        elif quantity == "init":
            scale = [mup2_ref._init_scale(t, "mup") * t.divisor for t in (narrow, wide)]
            expected, kind = expected + math.log(scale[1] / scale[0]) / math.log(widths[-1] / widths[0]), "init"
        elif compared and (y0 > 0).all():
            expected, kind = _slopes(widths, y0), "compared"
        error = (each - expected).std().item() / seeds**0.5 if seeds > 1 else 0.0
        slopes[quantity] = Slope(each.mean().item(), error, expected.mean().item(), kind)
    off = [q for q in ("init", "update", "perturbation") if slopes[q].off()]
    if wide is None:
        wrong = tuple(q for q in off if slopes[q].sure)
        advice = {q: _output_advice(q, slopes[q].excess) for q in wrong}
        return Row(name, (), "", slopes, values, wrong, (), tuple(advice.values()))
    if wide.param.ndim < 2 and slopes["init"].excess < 0 and "init" in off:
        off.remove("init")  # a bias that starts smaller in wide networks is as good as one that starts at 0
    advice |= {q: _advice(q, slopes[q].excess, wide.base_fan_in is not None) for q in off if slopes[q].sure}
    unclear = tuple(q for q in off if q not in advice)
    shape = tuple(wide.param.shape)
    return Row(name, shape, role, slopes, values, tuple(advice), unclear, tuple(advice.values()))


# ------------------------------------------------------------------------------------------- what it means


def _power(x: float) -> str:
    """n^(1/2), n^-1: measured powers rounded to theory's halves."""
    halves = round(2 * x)
    return f"n^{halves // 2}" if halves % 2 == 0 else f"n^({halves}/2)"


def _advice(quantity: str, excess: float, drawn: bool) -> str:
    """drawn: by init_, which leaves embeddings and raw parameters to the model's author."""
    way = "grows" if excess > 0 else "vanishes"
    remedy = _power(-excess)
    if quantity == "init":
        how = "call mup2_ref.init_(model, base_model)" if drawn else f"multiply them by {remedy}"
        advice = f"initial weights are {_power(excess)} times what muP has: {how}"
    elif quantity == "update":
        advice = f"update {way} as {_power(excess)}: multiply the learning rate by {remedy} (n: width / base width)"
    else:
        end = "it will blow up" if excess > 0 else "SAM does not reach this layer in a wide network"
        advice = f"perturbation {way} as {_power(excess)}, {end}: multiply rho by {remedy}"
    return advice


def _output_advice(quantity: str, excess: float) -> str:
    what = {"update": "an update", "perturbation": "the perturbation"}[quantity]
    return (
        f"{what} moves it by {_power(excess)}, too far in a wide network: look for a sum over the "
        "width without 1/n, such as a readout tied to the embedding (mup.MuSharedReadout divides its input by n)"
    )


def _notes(rows: list[Row], own: dict[int, Settings], widths: list[int]) -> list[str]:
    """What the rows have in common, and how that comes about."""
    rows = [r for r in rows if r.name != WHOLE]
    perturbed = [r for r in rows if not math.isnan(r.slopes["perturbation"].value)]
    bad_e, bad_u = ([r for r in rows if q in r.wrong] for q in ("perturbation", "update"))

    def settings(key: str, width: int) -> list[float]:
        return sorted({g[key] for g in own[width].values() if g["perturb"]})

    narrow, wide = ({k: settings(k, w) for k in KEYS} for w in (widths[0], widths[-1]))
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
    together = [r for r in perturbed if abs(r.slopes["perturbation"].excess - common) < TOLERANCE["compared"][0]]
    if bad_e and abs(common) > TOLERANCE["compared"][0] and len(together) == len(perturbed):
        top = max(perturbed, key=lambda r: r.slopes["norm share"].excess)
        notes.append(
            f"all perturbations change alike, as {_power(common)}: it is the norm that they are divided by, of which "
            f"'{top.name}' has a growing share. gradnorm_scaling must go with rho, as in mup2_ref.param_groups."
        )
    return notes


def text(report: Report) -> str:
    """The table, and below it what to change."""
    lines: list[tuple[str, ...]] = [("parameter", "shape", "role", *QUANTITIES, "")]
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
    if any(r.wrong for r in report.rows[:-1]):
        out.append("* or a role in the table is wrong: roles={name: role} (--roles name=role) settles it")
    unclear = sum(bool(r.unclear) for r in report.rows)
    if unclear:
        out.append(f"* {unclear} rows are too noisy to tell: use more --seeds, a larger --batch or more --widths")
    count, bad = len(report.rows) - 1, sum(bool(r.wrong) for r in report.rows[:-1])
    if wrong:
        out.append(f"FAILED: {bad} of {count} parameters" if bad else "FAILED: the network's output")
    else:
        out.append(f"UNCLEAR: {unclear} of {count} parameters" if unclear else f"Passed: {count} parameters")
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
    parser.add_argument("--lr", type=float, help="without --groups; default 0.05, Adam 0.001")
    parser.add_argument("--rho", type=float, default=0.02, help="without --groups")
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
    except (ValueError, TypeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    if picture:
        plot(report, picture)
        print(f"picture: {picture}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())

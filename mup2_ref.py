"""muP² for sharpness-aware minimization: the method in one file, to be read from top to bottom.

Haas, Xu, Cevher, Vankadara, "muP²: Effective Sharpness Aware Minimization Requires Layerwise Perturbation
Scaling", NeurIPS 2024, arXiv:2411.00075. Numbers of definitions, tables, algorithms below are the paper's.

SAM climbs from the weights w to w + e, takes the gradient there, returns to w and descends with that gradient:

    e = rho g / ||g||                g the gradient at w, ||g|| ONE norm over all parameters

As a network gets wider, a few layers dominate that joint norm and the perturbation of all others vanishes. muP²
scales it layer by layer, so that every layer's perturbation changes its output by an amount that does not depend on
the width n. For an MLP without biases, h_1 = W_1 x, x_l = relu(h_l), h_{l+1} = W_{l+1} x_l, f = W_{L+1} x_L, and the
three roles input (l = 1), hidden (l = 2..L), output (l = L+1), a bcd-parameterization (Definition 4) is

    init       W_l ~ N(0, sigma² n^(-2 b_l))
    update     W_l <- W_l - eta n^(-c_l) dL/dW_l   with the gradient at W + e
    perturb    e_l = rho n^(-d) v_l / ||v||,   v_l = n^(-d_l) dL/dW_l,   ||v||² = sum_l ||v_l||_F²

muP has b = (0, 1/2, 1), c = (-1, 0, 1); muP² adds d = -1/2, d_l = (-1/2, 1/2, 3/2). For any architecture the same
reads: with r = (fan_out / fan_in) relative to a base model, the radius of a tensor and SGD's learning rate (Adam's: 1 /
fan_in) are multiplied by r, its part of the norm by sqrt(r) (Appendix F.7, Algorithm 1). At the base width muP² is
plain SAM: learning rate and rho that were tuned there are the ones to use at every other width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F

# --------------------------------------------------------------- 1. exponents: what theory says of each layer

ROLES = ("input", "hidden", "output")
PARAMETERIZATIONS = {  # b and c of Table D.1, by role
    "sp": ((0, 0.5, 0.5), (0, 0, 0)),
    "sp-stable": ((0, 0.5, 0.5), (1, 1, 1)),
    "ntp": ((0, 0.5, 0.5), (0, 1, 1)),
    "mup": ((0, 0.5, 1), (-1, 0, 1)),
}
PERTURBATIONS = ("naive", "global", "effective", "balanced", "first-layer")
VARIANTS = ("sam", "elementwise", "layerwise")
Triple = tuple[float, ...]  # (input, hidden, output)


class Exponents(NamedTuple):
    """A bcd-parameterization (Definition 4) with SAM variant."""

    b: Triple  # initial standard deviation n^(-b_l)
    c: Triple  # learning rate n^(-c_l)
    dl: Triple  # perturbation n^(-d_l), in the numerator and in the joint norm
    d: float  # radius rho n^(-d)
    variant: str = "sam"
    perturbed: tuple[str, ...] = ROLES  # the other roles stay out of the perturbation and of the norm


class Prediction(NamedTuple):
    """What the exponents imply; a quantity with exponent a is Theta(n^a)."""

    gradient: Triple  # ||dL/dW_l||_F
    update: Triple  # rms coordinate of (update of W_l) x_{l-1}
    effect: Triple  # rms coordinate of e_l x_{l-1}. 0: effective, < 0: vanishes, > 0: blows up; -inf: not perturbed
    r: float  # features move by n^(-r) (Definition 5)
    stable: bool  # neither training nor the perturbation makes activations or outputs blow up
    feature_learning: bool
    effective: tuple[str, ...]  # roles with effect 0
    dominating: tuple[str, ...]  # roles that make up ||v||


def _check_name(what: str, name: Any, known: Any) -> None:
    if name not in tuple(known):
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(map(repr, known))}")


def _add(*xs: Triple) -> Triple:
    return tuple(map(sum, zip(*xs)))


def _raw(b: Triple, c_grad: float, variant: str) -> tuple[Triple, Triple, Triple]:
    """Exponents of ||g_l||_F, of T, and of the rms coordinate of T² g_l x_{l-1}, all before any scaling (F.1).

    dL/dh has coordinates n^(-c_grad) below the last layer and 1 in it; a hidden or output layer sums over n
    correlated inputs. T is 1, |w| (elementwise) or ||W_l||_F (layerwise adaptive SAM).
    """
    gradient = (0.5 - c_grad, 1 - c_grad, 0.5)
    t = {"sam": (0, 0, 0), "elementwise": (-b[0], -b[1], -b[2]), "layerwise": (0.5 - b[0], 1 - b[1], 0.5 - b[2])}
    return gradient, t[variant], _add((-c_grad, 1 - c_grad, 1), t[variant], t[variant])


def exponents(
    parameterization: str = "mup",
    perturbation: str | tuple[float, Triple] = "effective",
    variant: str = "sam",
    perturbed: tuple[str, ...] = ROLES,
) -> Exponents:
    """The rows of Tables D.1 and D.2, and their counterparts for adaptive SAM, in closed form.

    perturbation: "naive" (d = d_l = 0), "global" (the largest stable radius), "effective" (with muP this is muP²:
    every layer effectively perturbed), "balanced" (every layer contributes to the norm), "first-layer" (only the
    input layer is effectively perturbed) or your own (d, (d_in, d_hid, d_out)).
    variant: "sam", "elementwise" or "layerwise". perturbed: roles that are perturbed at all (SAM-ON: ("input",)).
    Raises ValueError for an unknown name.
    """
    _check_name("parameterization", parameterization, PARAMETERIZATIONS)
    _check_name("variant", variant, VARIANTS)
    active = [i for i, role in enumerate(ROLES) if role in perturbed]
    if not active or not set(perturbed) <= set(ROLES):
        raise ValueError(f"perturbed must name some of {ROLES}, not {perturbed!r}")
    b, c = PARAMETERIZATIONS[parameterization]
    gradient, t, effect = _raw(b, min(b[2], c[2]), variant)
    norm = _add(gradient, t)
    room = [effect[i] - norm[i] for i in active]
    early = (1 - b[2], 1 - b[2], 0)  # what e_1..e_L do to f must stay bounded too
    if not isinstance(perturbation, str):
        d, dl = perturbation
        if len(dl) != 3:
            raise ValueError(f"your own perturbation is (d, (d_in, d_hid, d_out)), not {perturbation!r}")
    else:
        _check_name("perturbation", perturbation, PERTURBATIONS)
        d, dl = {
            "naive": (0, (0, 0, 0)),
            "global": (max(effect[i] + early[i] for i in active) - max(norm[i] for i in active), (0, 0, 0)),
            "effective": (min(room), _add(effect, (-min(room),) * 3)),
            "balanced": (max(room), norm),
            "first-layer": (min(room), _add(effect, (-min(room),) * 3, (0, 1, 1))),
        }[perturbation]
    return Exponents(b, c, tuple(dl), d, variant, tuple(perturbed))


def predict(exponents: Exponents, at_init: bool = False) -> Prediction:
    """Width exponents of gradient, update and perturbation effect, and the verdicts of Appendix F.1.

    at_init: before the first update the output weights are n^(-b_out), after it n^(-min(b_out, c_out)); this differs
    for the unstable "sp" only.
    """
    b, c, dl, d, variant, perturbed = exponents
    c_grad = b[2] if at_init else min(b[2], c[2])
    gradient, t, raw_effect = _raw(b, c_grad, variant)
    active = [i for i, role in enumerate(ROLES) if role in perturbed]
    contribution = [round(gradient[i] + t[i] - dl[i], 9) for i in range(3)]  # rounded: users add constants like 0.1
    norm = max(contribution[i] for i in active)
    effect = tuple(round(raw_effect[i] - d - dl[i] - norm, 9) if i in active else -math.inf for i in range(3))
    update = (-c[0] - c_grad, 1 - c[1] - c_grad, 1 - c[2])
    r = -max(update[:2])
    trains_stably = r >= 0 and c[2] >= 1 and b[2] + r >= 1
    perturbs_stably = max(effect) <= 0 and b[2] - max(effect[:2]) >= 1
    effective = tuple(ROLES[i] for i in active if effect[i] == 0)
    dominating = tuple(ROLES[i] for i in active if contribution[i] == norm)
    stable, learns = trains_stably and perturbs_stably, trains_stably and r == 0
    return Prediction(gradient, update, effect, r, stable, learns, effective, dominating)


# ---------------------------------------------------------- 2. roles and scales: the same for any architecture


class _Tensor(NamedTuple):
    """A parameter, its role, and by what factor its fans grew from the base model to this one."""

    param: nn.Parameter
    module: nn.Module  # its owner
    role: str  # one of ROLES (vectors are input-like: fan_in 1), or "finite": nothing grows with the width
    fan_out: float
    fan_in: float
    base_fan_in: int | None  # inputs of one output at the base width; None: init_ leaves this tensor alone
    divisor: float  # of the module's input, by which mup.MuReadout keeps its weights at the base width's size; else 1


_MATRIX_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _fans(module: nn.Module, shape: torch.Size, width_dims: list[int]) -> tuple[int, int] | None:
    """(fan_out, fan_in) of a tensor; None if neither module type nor shape tells."""
    if isinstance(module, nn.modules.conv._ConvNd) and len(shape) > 1:  # grouped and transposed ones too
        fan_out = shape[1] * module.groups if module.transposed else shape[0]
        return fan_out, shape.numel() // fan_out
    if isinstance(module, _MATRIX_MODULES) and len(shape) == 2:
        return shape[0], shape[1]
    if isinstance(module, _NORM_MODULES):
        return shape.numel(), 1
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return shape[1], 1  # one-hot input: every output coordinate is one weight
    if not width_dims:
        return 1, 1
    if len(shape) == 1 or (len(shape) > 2 and shape.numel() == max(shape)):  # gains, biases, layer scales, class tokens
        return shape.numel(), 1
    if len(shape) > 2 and shape[0] == 1 and width_dims == [len(shape) - 1]:  # (1, positions, width): added to x
        return shape[-1], 1
    return None  # a matrix that some forward() multiplies with, we cannot know from which side


def _describe(name: str, p: nn.Parameter, shape0: torch.Size, module: Any, module0: Any, word: str | None) -> _Tensor:
    """Role and fans, from the module's type and the dimensions that differ, or from the user's word.

    module0: of the base model; None if only shapes are known (mup); there a raw matrix means what it means to mup.
    """
    ratios = [n / n0 if n0 else 1.0 for n, n0 in zip(p.shape, shape0)]
    width_dims = [i for i, ratio in enumerate(ratios) if ratio != 1]
    fans, fans0 = _fans(module, p.shape, width_dims), _fans(module0 or module, shape0, width_dims)
    if module0 is None and p.ndim > 1 and getattr(module, "transposed", False) and module.groups > 1:
        fans = None  # as its groups at the base width are not known
    elif module0 is None and fans is None and p.ndim == 2:
        word = word or ("input", "hidden")[sum(dim.isinf() for dim in p.infshape) - 1]  # type: ignore[attr-defined]
    if word not in (None, *ROLES, "finite") or (fans is None and word is None) or (word == "hidden" and p.ndim < 2):
        raise ValueError(
            f"cannot tell the role of '{name}' (shape {tuple(p.shape)}, base {tuple(shape0)}, in "
            f"{type(module).__name__}, roles says {word!r}). Pass roles={{'{name}': role}} with role 'input' "
            "(fan_in does not grow with the width), 'hidden' (shape (fan_out, fan_in), both grow), 'output' (fan_out "
            "does not grow) or 'finite'."
        )
    fan_out, fan_in = (fans[0] / fans0[0], fans[1] / fans0[1]) if fans and fans0 else (ratios[0], math.prod(ratios[1:]))
    if word in ("input", "output", "finite"):  # what grows, grows on the side that the word names
        grown_out, grown_in = (fan_out, fan_in) if word == "input" else (fan_in, fan_out)
        grown = grown_out if grown_out != 1 else grown_in
        fan_out, fan_in = {"input": (grown, 1.0), "output": (1.0, grown), "finite": (1.0, 1.0)}[word]
    role = word or ("finite", "output", "input", "hidden")[2 * (fan_out != 1) + (fan_in != 1)]
    drawn = p.ndim > 1 and isinstance(module, _MATRIX_MODULES)
    divisor = 1.0
    if role == "output" and any(c.__name__ == "MuReadout" for c in type(module).__mro__):
        divisor = module.width_mult()
        if module0 is not None and hasattr(module0.weight, "infshape"):
            divisor /= module0.width_mult()
        if divisor != fan_in:
            raise ValueError(
                f"'{name}' divides its input by {module.width_mult():g} (mup.set_base_shapes), but grows by {fan_in:g} "
                "from base_model: call set_base_shapes on both with the same base, or leave base_model out"
            )
    return _Tensor(p, module, role, fan_out, fan_in, fans0[1] if drawn and fans0 else None, divisor)


def _base_shapes(model: nn.Module, base_model: nn.Module | None) -> dict[str, torch.Size]:
    """Shapes at the base width, of base_model's parameters or as mup.set_base_shapes() noted them in p.infshape."""
    if base_model is not None:
        return {name: p.shape for name, p in base_model.named_parameters(remove_duplicate=False)}
    shapes = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if not hasattr(p, "infshape"):
            raise ValueError(
                f"'{name}' has no infshape: pass base_model, or call mup.set_base_shapes(model, base, delta=...) first "
                "(copies of a model lose what that notes)"
            )
        shapes[name] = torch.Size(dim.base_dim or dim.dim for dim in p.infshape)
    return shapes


def _agree(a: _Tensor, b: _Tensor) -> bool:
    """Whether two places of a tied tensor ask for the same factors; mup.MuSharedReadout is made so that they do."""
    if {a.role, b.role} == {"input", "output"}:
        return a.divisor * b.divisor == a.fan_out * b.fan_out
    return (a.role, a.fan_out, a.fan_in) == (b.role, b.fan_out, b.fan_in)


def _tensors(model: nn.Module, base_model: nn.Module | None, roles: dict[str, str] | None) -> dict[str, _Tensor]:
    """Every parameter by name, a tied one by its first; raises ValueError where a role cannot be told."""
    roles = roles or {}
    base_shapes = _base_shapes(model, base_model)
    names: dict[Tensor, str] = {}
    found: dict[str, _Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in base_shapes or len(base_shapes[name]) != p.ndim:
            raise ValueError(
                f"'{name}' with shape {tuple(p.shape)} has no counterpart in base_model. Build base_model with the "
                "same code at another width, and pass both models as they are (not wrapped in DDP or torch.compile)."
            )
        first, owner = names.setdefault(p, name), name.rpartition(".")[0]
        module0 = None if base_model is None else base_model.get_submodule(owner)
        tensor = _describe(name, p, base_shapes[name], model.get_submodule(owner), module0, roles.get(first))
        if not _agree(found.setdefault(first, tensor), tensor):
            raise ValueError(
                f"'{first}' ({found[first].role}) and '{name}' ({tensor.role}) are one tied tensor in two roles. Say "
                f"which one counts: roles={{'{first}': '{found[first].role}'}}; with 'input' the logits must be "
                "divided by the growth of the width (as mup.MuSharedReadout does), or they blow up."
            )
    if missing := base_shapes.keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        raise ValueError(f"base_model has parameters that the model lacks: {sorted(missing)}")
    if unknown := set(roles) - set(found):
        raise ValueError(f"roles names parameters that the model does not have: {sorted(unknown)}")
    return found


def _scale(x: Triple, t: _Tensor, width: float | None) -> float:
    """n^(x_role), for tensors whose fans grow by different factors: fan_out^p fan_in^q width^g.

    p, q, g follow from p + g, p + q + g, q + g being the exponents of input, hidden, output; a finite tensor gets
    width^g. For muP² g is 0. width is the model's multiplier; None if it has several.
    """
    g = x[0] + x[2] - x[1]
    if g and width is None:
        raise ValueError(
            "dimensions of this model grow by different factors, but this scaling is defined for one width multiplier; "
            "use perturbation='effective' with norm='decoupled', or 'naive'."
        )
    return t.fan_out ** (x[0] - g) * t.fan_in ** (x[2] - g) * (width or 1.0) ** g


def _init_scale(t: _Tensor, parameterization: str) -> float:
    """Initial standard deviation relative to the base model: n^(-b_l), and for muP min(1, sqrt(fan_out/fan_in))."""
    if t.role in ("input", "finite"):
        return 1.0
    if parameterization == "mup":
        return 1 / t.fan_in if t.role == "output" else t.fan_in**-0.5 * min(1.0, t.fan_out / t.fan_in) ** 0.5
    return t.fan_in**-0.5


def _perturbation_scales(
    e: Exponents, t: _Tensor, width: float | None, init_scale: float, decoupled: bool
) -> tuple[float, float]:
    """(factor of rho, gradnorm_scaling) of one tensor: n^(-d - d_l) and n^(-d_l), or Algorithm 1's for the latter.

    They are those of the matrix V that is applied. Where the module divides its input by a, the parameter is W = a V:
    e_W = a e_V and dL/dV = a dL/dW put a² into rho's factor and a into the norm's. T² g and T g of the adaptive
    variants contain them.
    """
    if not any(e.dl):
        return _scale((-e.d,) * 3, t, width), 1.0
    gradient, t_exponents, _ = _raw(e.b, min(e.b[2], e.c[2]), e.variant)
    # The growth of T is taken from the initial weights, not from one power of the width: a bias has T ~ 1.
    growth_of_t = {"sam": 1, "elementwise": init_scale, "layerwise": init_scale * (t.fan_out * t.fan_in) ** 0.5}
    T = growth_of_t[e.variant]
    joint = _add(tuple(-x for x in e.dl), t_exponents, t_exponents)
    rho_factor = _scale(_add(joint, (-e.d,) * 3), t, width) / T**2
    if decoupled:  # every layer contributes Theta(1) to the norm
        norm_factor = _scale(tuple(-x for x in gradient), t, width) / T
    else:
        norm_factor = _scale(joint, t, width) / T**2
    a = t.divisor if e.variant == "sam" else 1
    return rho_factor * a**2, norm_factor * a


def _in_norm(t: _Tensor) -> bool:
    """Of a normalization layer, by type; vectors of other libraries' classes (LlamaRMSNorm) by their type's name."""
    return isinstance(t.module, _NORM_MODULES) or ("norm" in type(t.module).__name__.lower() and t.param.ndim == 1)


def param_groups(
    model: nn.Module,
    base_model: nn.Module | None = None,
    *,
    lr: float | None,
    rho: float,
    weight_decay: float = 0.0,
    base_optimizer: str = "sgd",
    parameterization: str = "mup",
    perturbation: str | tuple[float, Triple] = "effective",
    variant: str = "sam",
    norm: str = "decoupled",
    perturb: str | Callable[[str, Tensor], bool] = "all",
    roles: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for SAM (or for any torch optimizer) with the learning rate, radius and norm factor of every tensor.

    base_model: the same architecture at the base width, where lr and rho were tuned; it may live on the meta device.
    A dimension that differs is a width dimension. At the base width every factor is 1. None: what mup.set_base_shapes()
    of the mup package noted is taken; its MuReadout, which divides by the width, gets the factors that go with it.
    lr: None leaves lr and weight_decay to an optimizer that scales them by itself, as mup.MuSGD and mup.MuAdam do.
    weight_decay: lr * weight_decay is kept independent of the width. base_optimizer: "sgd" or "adam" (AdamW).
    norm, of perturbation="effective": "decoupled" (Algorithm 1: every layer contributes Theta(1) to the norm) or
    "joint" (Definition 4: the numerator's n^(-d_l); as in the paper, take a base model of width 1 with it, as with a
    larger one the norm changes its dominating layer on the way up). The other perturbations use the joint norm.
    perturb: "all", "norm" (normalization layers, by module type: SAM-ON) or f(name, parameter) -> bool.
    roles: {parameter name: "input", "hidden", "output" or "finite"} where shapes and modules cannot tell.

    Groups carry params, names, role, lr, weight_decay, rho, gradnorm_scaling, perturb, and where something is scaled
    the variant; tensors that agree in all of them share one. Raises ValueError for an ambiguous role, an unknown name,
    or models that differ in more than width.
    """
    _check_name("base_optimizer", base_optimizer, ("sgd", "adam"))
    _check_name("norm", norm, ("decoupled", "joint"))
    if base_optimizer == "adam" and parameterization not in ("sp", "mup"):
        raise ValueError(f"the learning rates of {parameterization!r} are SGD's; for Adam use 'sp' or 'mup'")
    if not callable(perturb):
        _check_name("perturb", perturb, ("all", "norm"))
    if lr is None and weight_decay:
        raise ValueError("with lr=None, weight_decay goes to the optimizer too: SAM(groups, MuSGD, weight_decay=...)")
    tensors = {name: t for name, t in _tensors(model, base_model, roles).items() if t.param.requires_grad}
    perturbed = {
        name
        for name, t in tensors.items()
        if (perturb(name, t.param) if callable(perturb) else perturb == "all" or _in_norm(t))
    }
    if not perturbed:
        raise ValueError(f"perturb={perturb!r} selects no trainable parameter")
    active = {tensors[name].role for name in perturbed}
    # At the base width every tensor is finite and every exponent is raised from 1: any choice will do.
    e = exponents(parameterization, perturbation, variant, tuple(r for r in ROLES if r in active) or ROLES)
    multipliers = {ratio for t in tensors.values() for ratio in (t.fan_out, t.fan_in)} - {1.0}
    width = None if len(multipliers) > 1 else max(multipliers, default=1.0)
    if perturbation == "global" and variant == "sam" and any(t.divisor != 1 for t in tensors.values()):
        if parameterization != "mup" or not active >= set(ROLES):
            raise ValueError("with MuReadout, perturbation='global' is known for 'mup' and all of ROLES perturbed only")
        e = exponents(parameterization, "naive")  # the division takes 1/n off the readout's gradient: hidden dominates

    groups: dict[tuple, dict[str, Any]] = {}
    for name, t in tensors.items():
        if base_optimizer == "sgd":
            lr_factor = _scale(tuple(-x for x in e.c), t, width)
        else:
            lr_factor = 1 / t.fan_in if parameterization == "mup" else 1.0
        lr_factor *= t.divisor**2 if base_optimizer == "sgd" else t.divisor  # W = a V, as in _perturbation_scales
        decoupled = norm == "decoupled" and perturbation == "effective"
        init_scale = _init_scale(t, parameterization)
        rho_factor, norm_factor = _perturbation_scales(e, t, width, init_scale, decoupled)
        settings = {
            "role": t.role,
            "rho": rho * rho_factor,
            "gradnorm_scaling": norm_factor,
            "perturb": name in perturbed,
        }
        if lr is not None:
            settings |= {"lr": lr * lr_factor, "weight_decay": weight_decay / lr_factor}
        if (rho_factor, norm_factor) != (1, 1):
            settings["variant"] = variant  # these factors hold for it alone; SAM checks
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": []} | settings)
        group["params"].append(t.param)
        group["names"].append(name)
    return list(groups.values())


@torch.no_grad()
def init_(
    model: nn.Module,
    base_model: nn.Module | None = None,
    *,
    parameterization: str = "mup",
    zero_output: bool = False,
    gain: float = 2**0.5,
    roles: dict[str, str] | None = None,
) -> nn.Module:
    """Draw the initial weights of an existing module in place, and return it.

    Matrices become N(0, gain² / fan_in) at the base width and n^(-b_l) times that elsewhere (gain as in
    torch.nn.init.calculate_gain: sqrt(2) for ReLU); their biases 0. Embeddings, norms and other vectors have no
    width-dependent scale and keep their values, and so do raw parameters, which only the model's author can draw.
    Nothing that is drawn depends on the values before, so twice is the same as once.
    zero_output: output weights start at 0; at the base width name them, roles={"head.weight": "output"}.
    """
    _check_name("parameterization", parameterization, PARAMETERIZATIONS)
    tensors = _tensors(model, base_model, roles)
    if zero_output and all(t.role != "output" for t in tensors.values()):
        raise ValueError("zero_output: no tensor has the role 'output'. Name it: roles={'head.weight': 'output'}.")
    for t in tensors.values():
        if zero_output and t.role == "output":
            t.param.zero_()
        elif t.base_fan_in is not None:
            t.param.normal_(0, gain * t.base_fan_in**-0.5 * _init_scale(t, parameterization) * t.divisor)
        elif t.param.ndim == 1 and isinstance(t.module, _MATRIX_MODULES):
            t.param.zero_()
    return model


def report(groups: list[dict[str, Any]]) -> str:
    """A table with one row per parameter: name, shape, role, lr, rho, gradnorm_scaling ("-": not perturbed)."""
    rows = [("name", "shape", "role", "lr", "rho", "gradnorm_scaling")]
    for g in groups:
        for name, p in zip(g["names"], g["params"]):
            radius = (f"{g['rho']:.4g}", f"{g['gradnorm_scaling']:.4g}") if g["perturb"] else ("-", "-")
            lr = f"{g['lr']:.4g}" if "lr" in g else "-"
            rows.append((name, "x".join(map(str, p.shape)), g["role"], lr, *radius))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows)


# ------------------------------------------------------------------------- 3. the optimizer: functions of tensors


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm, a float64 scalar; of a DTensor over all its shards."""
    norm = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def normalizer(w: Tensor, variant: str) -> Tensor | float:
    """T of the variant: 1 (sam), |w| (elementwise) or ||w||_F (layerwise), in the shape of w or a scalar."""
    if variant == "sam":
        return 1.0
    return w.abs() if variant == "elementwise" else _norm(w)


def joint_norm(tensors: list[tuple[Tensor, Tensor, float]], variant: str) -> Tensor:
    """sqrt(sum_l (s_l ||T g_l||)²) of (w_l, g_l, s_l), a float64 scalar: neither overflows nor loses small terms."""
    norms = []
    for w, g, s in tensors:
        T = normalizer(_wide(w), variant)
        if variant == "elementwise":
            norms.append(s * _norm(_wide(g) * T))
        else:  # T is a number: ||T g|| = T ||g||
            norms.append(s * T * _norm(g))
    return (
        torch.linalg.vector_norm(torch.stack([x.to(norms[0].device) for x in norms]))
        if norms
        else torch.zeros(()).double()
    )


def perturb_(w: Tensor, g: Tensor, coefficient: Tensor, variant: str) -> None:
    """w <- w + coefficient T² g: climb to the local maximum. In float32 or wider, then rounded to w's dtype."""
    T = normalizer(_wide(w), variant)
    w.copy_(_wide(w) + _wide(g) * (T * T * coefficient.to(w.device)))


def _values(g: Tensor) -> Tensor:
    """The numbers of a gradient, which may be sparse or complex."""
    g = g.coalesce().values() if g.is_sparse else g
    return torch.view_as_real(g) if g.is_complex() else g


# For torch.compile to leave alone: what it makes of these methods loses the weights that they restore. Unlike
# torch.compiler.disable, this does not take seconds to import.
_uncompiled = _disable_dynamo


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any torch optimizer, with muP² factors per parameter group.

    Groups may carry rho, gradnorm_scaling (default 1) and perturb (default True), as param_groups() makes them
    (Algorithm 1). Over all perturbed tensors l that have a gradient:

        norm = sqrt(sum_l (gradnorm_scaling_l ||T g_l||)²)        e_l = rho_l T² g_l / (norm + 1e-12)

    rho: radius of groups without their own, in units of the weights' Euclidean norm for variant "sam", relative to
    it for the adaptive ones. variant: "sam", "elementwise" or "layerwise". base_kwargs go to base_optimizer, a class or
    a function that makes an optimizer from groups, such as mup.MuSGD.
    skip_nonfinite: also skip the update if a gradient of the second pass is not finite (one more read of them all).
    same_randomness: step(closure) gives both passes the same random numbers, and so the same dropout masks.

    Use step(closure), or first_step() and second_step() after a backward each. A first gradient that is not finite
    perturbs nothing and makes the following update a no-op, counted in skipped_steps. Weights are perturbed and
    restored in place, bit for bit, and whatever was perturbed is restored, with or without a second gradient.
    Momentum and learning rate live in this object, shared with .base_optimizer: schedulers, hooks, state_dict, deepcopy
    and pickle see one optimizer. GradScaler.step(sam) takes the place of second_step(); first_step() needs no
    unscale_(), as e does not depend on the scale. On a GPU each first_step reads one flag, and so waits for the device.
    """

    EPS = 1e-12
    _step_supports_amp_scaling = True  # GradScaler.step calls step() even on overflow, so that weights are restored

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        variant: str = "sam",
        skip_nonfinite: bool = False,
        same_randomness: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, type):
            self._check_base(base_optimizer)
        elif isinstance(base_optimizer, torch.optim.Optimizer) or not callable(base_optimizer):
            raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, not {base_optimizer!r}")
        if base_kwargs.get("differentiable"):
            raise ValueError("SAM changes weights in place and cannot be differentiable=True")
        _check_name("variant", variant, VARIANTS)
        self.variant, self.skip_nonfinite, self.skipped_steps = variant, skip_nonfinite, 0
        self.same_randomness = same_randomness
        self._backup: list[tuple[Tensor, Tensor]] | None = None  # what is perturbed, and its weights before
        self._finite = True
        own = {"rho": rho, "gradnorm_scaling": 1.0, "perturb": True, "variant": variant}
        if not isinstance(params, Tensor):  # which torch refuses with a clear message
            params = [dict(p) if isinstance(p, dict) else p for p in params]
        super().__init__(params, own)
        given = {p: g["lr"] for g in self.param_groups if "role" in g and "lr" in g for p in g["params"]}
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self._check_base(type(self.base_optimizer))
        groups = self.base_optimizer.param_groups
        if any("rho" not in g or "perturb" not in g for g in groups):
            raise ValueError(f"{base_optimizer} must make its optimizer from the groups that it is given")
        if any(given[p] != g["lr"] for g in groups for p in g["params"] if p in given):
            raise ValueError(
                f"{base_optimizer} scales learning rates, and those of these groups are scaled already: make them with "
                "param_groups(lr=None) and give lr to SAM"
            )
        self.defaults = self.base_optimizer.defaults | own
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @staticmethod
    def _check_base(kind: type) -> None:
        if not issubclass(kind, torch.optim.Optimizer):
            raise TypeError(f"base_optimizer is a class such as torch.optim.SGD, or returns one's object, not {kind!r}")
        if issubclass(kind, (torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.SparseAdam)):
            raise TypeError(
                f"{kind.__name__} cannot be the base: LBFGS evaluates the loss inside its step, Adadelta has a rho of "
                "its own in its groups, SparseAdam takes sparse gradients only"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for a bad rho or gradnorm_scaling, or groups made for another variant."""
        if isinstance(param_group, dict):
            group = self.defaults | param_group
            if not (0 <= group["rho"] < math.inf and 0 < group["gradnorm_scaling"] < math.inf):
                raise ValueError(
                    f"rho must be finite and >= 0, not {group['rho']}; gradnorm_scaling must be finite and > 0, not "
                    f"{group['gradnorm_scaling']} (perturb=False keeps a group out of perturbation and norm)"
                )
            self._check_variant(group)
        super().add_param_group(param_group)

    def _check_variant(self, group: dict[str, Any]) -> None:
        if group.get("variant", self.variant) != self.variant:
            raise ValueError(
                f"this group is scaled for variant {group['variant']!r}, but the optimizer's is {self.variant!r}: "
                "give param_groups() and SAM() the same variant"
            )

    # -- the two passes

    def _require_restored(self, what: str) -> None:
        if self._backup:
            raise RuntimeError(f"weights are perturbed: call second_step() or restore() before {what}")

    @_uncompiled
    def first_step(self, zero_grad: bool = False, process_group: Any = None) -> None:
        """Climb: w <- w + e. RuntimeError if weights are perturbed already or a gradient is sparse or complex.

        process_group: of processes that climb by gradients of their own (m-sharpness), such as torch.distributed.group.
        WORLD. If the gradient is not finite in one of them, none climbs or updates, or their weights would part.
        """
        if "_backup" not in vars(self):  # Lightning's wrapper is a SAM too, but the backup would be its own
            raise RuntimeError("this wraps the optimizer: call step(closure), or first_step() on the optimizer itself")
        self._require_restored("the next first_step()")
        self._climb(process_group)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def _climb(self, process_group: Any) -> None:
        """Perturb every perturbed parameter that has a gradient, and keep its weights."""
        self._place_gradients()
        perturbed = self._perturbed()
        for p, _ in perturbed:
            if p.grad.layout != torch.strided or p.grad.is_complex():
                raise RuntimeError(
                    f"SAM cannot perturb by a {'complex' if p.grad.is_complex() else 'sparse'} gradient (shape "
                    f"{tuple(p.shape)}): use sparse=False in embeddings, torch.view_as_real for complex weights, or "
                    "perturb=False"
                )
        norm = joint_norm([(p, p.grad, group["gradnorm_scaling"]) for p, group in perturbed], self.variant)
        broken = norm.isfinite().logical_not().int()
        if process_group is not None:
            broken = broken.to(self.param_groups[0]["params"][0].device)
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX, group=process_group)
        self._finite = not broken
        perturbed = perturbed if self._finite else []
        self._backup = [(p, p.detach().clone()) for p, _ in perturbed]
        with self._restored_on_error():
            for p, group in perturbed:
                perturb_(p, p.grad, self._rho(group) / (norm + self.EPS), self.variant)

    def _perturbed(self) -> list[tuple[Any, dict[str, Any]]]:
        """What first_step() perturbs, each with its group."""
        return [(p, g) for g in self.param_groups if g["perturb"] for p in g["params"] if p.grad is not None]

    @staticmethod
    def _rho(group: dict[str, Any]) -> float:
        return -group["rho"] if group.get("maximize") else group["rho"]  # climb in what is minimized

    def _place_gradients(self) -> None:
        """Give gradients the layout of their parameters: tensor parallelism leaves partial sums and copies."""
        for p in [p for group in self.param_groups for p in group["params"] if p.grad is not None]:
            if getattr(p.grad, "placements", None) != getattr(p, "placements", None):
                p.grad = p.grad.redistribute(placements=p.placements)

    @contextmanager
    def perturbed(self, process_group: Any = None) -> Iterator[None]:
        """Weights are at w + e inside, and at w again however it is left, also by an exception or Ctrl-C.

        For passes that may fail, and to look at the loss at w + e. step() or second_step() then updates, with the
        gradient of a pass inside; as restoring and updating are apart, memory is read once more than without.
        """
        self.first_step(process_group=process_group)
        try:
            yield
        finally:
            updated = self._backup is None  # inside already
            self.restore()
        if not updated:
            self._backup = []  # perturbed and back: an update may follow

    def second_step(self, zero_grad: bool = False) -> None:
        """Return to w and let the base optimizer step. Raises RuntimeError if first_step() has not been called."""
        self.step()
        if zero_grad:
            self.zero_grad()

    @_uncompiled
    @torch.no_grad()
    def restore(self) -> None:
        """Put every perturbed weight back, bit for bit; nothing happens if none is."""
        for w, backup in self._backup or ():
            w.copy_(backup)
        self._backup = None

    @_uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One SAM step. closure: zero_grad, forward, backward, return loss; it runs twice, the first loss is returned.

        Without closure this is second_step(). Raises RuntimeError when called in the wrong phase.
        """
        loss, scale, found_inf = None, getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        try:
            if closure is not None:
                self._require_restored("step(closure)")
                if found_inf is not None:
                    raise RuntimeError("GradScaler cannot unscale in a closure; use first_step() and scaler.step(opt)")
                random = self._random_states() if self.same_randomness else []
                with torch.enable_grad():
                    loss = closure()
                self.first_step()
                with self._restored_on_error(), torch.enable_grad():
                    for set_state, state in random:
                        set_state(state)
                    closure()
            elif self._backup is None and self._only_makes_state():
                with torch.no_grad():
                    self.base_optimizer.step()
                return None
            elif self._backup is None:
                raise RuntimeError("nothing is perturbed: call first_step() after the first backward, or step(closure)")
            try:  # as in _restored_on_error(), which would take a microsecond of every step
                self._descend(scale, found_inf)
            except BaseException:
                self.restore()
                raise
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # set by GradScaler.step, which leaves them when the step fails
                vars(self).pop(name, None)
            raise
        return loss

    def _only_makes_state(self) -> bool:
        """Whether this is how torch.distributed.checkpoint prepares for loading: gradients and learning rates are 0."""
        gradients = self._gradients()
        if self.state or not gradients or any(group.get("lr", 1) for group in self.param_groups):
            return False
        return not self._gradient_norm(gradients)

    def _random_states(self) -> list[tuple[Callable[[Tensor], None], Tensor]]:
        """(setter, state) of the random number generators of the CPU and of the parameters' GPUs."""
        gpus = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        states: list[Any] = [(torch.set_rng_state, torch.get_rng_state())]
        return states + [(partial(torch.cuda.set_rng_state, device=d), torch.cuda.get_rng_state(d)) for d in gpus]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    @staticmethod
    def _gradient_norm(gradients: list[Tensor]) -> Tensor:
        return joint_norm([(_values(g), _values(g), 1.0) for g in gradients], "sam")

    @torch.no_grad()
    def _descend(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Restore, undo the scale of the loss, and update unless a gradient is not finite."""
        self.restore()
        self._place_gradients()
        gradients = self._gradients()
        if scale is not None:
            for g in gradients:
                g.div_(scale.to(g.device))
        skip = not self._finite or (found_inf is not None and found_inf.item() > 0)
        if skip or (self.skip_nonfinite and not self._gradient_norm(gradients).isfinite()):
            self.skipped_steps += 1
        else:
            self.base_optimizer.step()

    @contextmanager
    def _restored_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    # -- one optimizer to the outside

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and all groups; never a backup. RuntimeError between the passes."""
        self._require_restored("state_dict(), or a checkpoint would hold w + e")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a SAM or of a bare base optimizer (rho stays). RuntimeError between the passes."""
        self._require_restored("load_state_dict()")
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            saved = [mine | theirs for mine, theirs in zip(self.param_groups, saved)]
        for group in saved:
            self._check_variant(group)
        super().load_state_dict(state_dict | {"param_groups": saved})

    def __getstate__(self) -> dict[str, Any]:
        own = ("base_optimizer", "variant", "skip_nonfinite", "same_randomness", "skipped_steps", "_backup", "_finite")
        return super().__getstate__() | {key: getattr(self, key) for key in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of copies and of load_state_dict
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})


# ----------------------------------------------------------------------------------------- 4. a model, and training


class MLP(nn.Module):
    """ReLU MLP without biases, as in the paper: (batch, ...) with d_in values per sample -> (batch, d_out)."""

    def __init__(self, d_in: int, width: int, d_out: int, hidden_layers: int = 2) -> None:
        super().__init__()
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """The model's buffers are afterwards what they were before. Put it around the second pass of batch norms.

    Running statistics and counters, of custom and synchronized normalization too, then come from the weights w alone,
    while batches are normalized as ever. Buffers keep their addresses. It may be nested.
    """
    saved = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in saved:
                buffer.copy_(before)
                module._buffers[name] = buffer  # where a module assigns instead of changing in place


class Seen(NamedTuple):
    """What rounding leaves of a perturbation; nan where none was intended."""

    norm: float  # of the perturbation that is left, over the norm of the intended one
    cosine: float  # between the two


@torch.no_grad()
def seen_perturbation(optimizer: SAM, dtype: torch.dtype | None = None) -> tuple[Seen, list[Seen]]:
    """What the forward pass at w + e sees of e: of all tensors together, and of each perturbed one in their order.

    Call it after a backward at w, whose gradients it uses and keeps. dtype: of autocast, to which the forward rounds
    weights (taken here to be all; it leaves normalization and embeddings alone); None: only the weights' own.

    (1, 1) is all of it. Weights in 16 bits do not move where e is below their last digit; with float32 weights under
    autocast, w and w + e are rounded each, and what is seen is e plus the noise of both. Where the cosine is small,
    SAM climbs in a direction that is mostly noise: keep float32 weights, and take autocast to float16 or none.
    Raises RuntimeError if there are no gradients or weights are perturbed already, TypeError for DTensors.
    """
    perturbed = optimizer._perturbed()
    if any(hasattr(p, "placements") for p, _ in perturbed):
        raise TypeError("of DTensors it is not known: use the model before it is spread over processes")
    if not perturbed:
        raise RuntimeError("there are no gradients: call this after a backward at w")
    before = [p.clone() for p, _ in perturbed]
    norm = joint_norm([(p, p.grad, g["gradnorm_scaling"]) for p, g in perturbed], optimizer.variant) + optimizer.EPS
    sums = []  # of each tensor: <seen, seen>, <seen, intended>, <intended, intended>
    with optimizer.perturbed():
        for (p, group), w in zip(perturbed, before):
            coefficient = (optimizer._rho(group) / norm).to(p.device)
            intended = normalizer(w.double(), optimizer.variant) ** 2 * p.grad.double() * coefficient
            seen = p.to(dtype or p.dtype).double() - w.to(dtype or p.dtype).double()
            sums.append(torch.stack([(x * y).sum() for x, y in ((seen, seen), (seen, intended), (intended, intended))]))
    optimizer.restore()  # nothing is perturbed, and no update may follow

    def summary(s: Tensor) -> Seen:
        ss, si, ii = s.tolist()
        return Seen(math.sqrt(ss / ii) if ii else math.nan, si / math.sqrt(ss * ii) if ss and ii else math.nan)

    return summary(torch.stack([s.cpu() for s in sums]).sum(0)), [summary(s) for s in sums]


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    *,
    synchronize: bool = True,
) -> Tensor:
    """Add the gradient of the mean loss over all samples of some micro-batches to .grad, and return that loss.

    loss_function: a mean over samples. It is one pass of SAM, for a batch that does not fit in memory:

        def closure():
            opt.zero_grad()
            return accumulate(model, micro_batches)

    With DistributedDataParallel gradients are exchanged once, in the last micro-batch; with synchronize=False not at
    all, which in the first pass makes each process climb by its own gradient (m-sharpness, Foret et al. 2021).
    """
    micro_batches = [(x, y) for x, y in micro_batches if len(y)]  # the mean of none is not a number
    if not micro_batches:
        raise ValueError("no micro-batches, or only empty ones")
    samples = sum(len(y) for _, y in micro_batches)
    total: Any = 0.0
    for i, (x, y) in enumerate(micro_batches, 1):
        exchanged = synchronize and i == len(micro_batches)
        with nullcontext() if exchanged else getattr(model, "no_sync", nullcontext)():
            loss = loss_function(model(x), y) * (len(y) / samples)  # forward inside: DDP prepares the exchange there
            loss.backward()
        total = total + loss.detach()
    return total


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss_function: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    scheduler: Any = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """One epoch, with SAM or any torch optimizer; returns the mean loss of its batches (at w), a scalar on the device.

    batches: of (inputs, targets). scheduler: steps after every batch. autocast: context for the forward passes, such as
    partial(torch.autocast, "cuda", torch.bfloat16). scaler: of the loss, for float16.
    """
    device = next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    losses = []
    model.train()
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)

        def backward() -> Tensor:
            optimizer.zero_grad()
            with autocast():
                loss = loss_function(model(x), y)
            scaler.scale(loss).backward()
            return loss.detach()

        losses.append(backward())
        if isinstance(optimizer, SAM):
            optimizer.first_step()
            with optimizer._restored_on_error():
                backward()
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
    if not losses:
        raise ValueError("no batches: is the data set smaller than a batch, or the iterator used up?")
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Tensor:
    """(cross entropy, correct predictions, samples), each summed over all samples, as one tensor on the device."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    model.eval()
    for x, y in batches:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with autocast():
            f = model(x)
        loss = F.cross_entropy(f.float(), y, reduction="sum")
        sums += torch.stack([loss.double(), (f.argmax(1) == y).sum().double(), loss.new_tensor(len(y)).double()])
    return sums


def main() -> None:
    """What theory predicts for muP, and the groups of an MLP."""
    print("Width exponents in muP of the perturbation's effect on each layer's output (0: effective, < 0: vanishes):")
    for name in PERTURBATIONS:
        e = exponents("mup", name)
        effect = "  ".join(f"{role} {x:+.1f}" for role, x in zip(ROLES, predict(e).effect))
        print(f"  {name:<12} d = {e.d:+.1f}   d_l = ({', '.join(f'{x:+.1f}' for x in e.dl)})   {effect}")

    base = MLP(40, 128, 10)
    print("\nmuP² for an MLP of width 1024, tuned at width 128 with lr 0.1 and rho 0.1:")
    print(report(param_groups(MLP(40, 1024, 10), base, lr=0.1, rho=0.1)))


if __name__ == "__main__":
    main()

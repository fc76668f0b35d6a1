"""The role of every parameter of a model, and how its fans grow from the base model to the model, for any architecture.

The type of the module tells which dimensions of a tensor are fan_out and fan_in; the difference from the base model
tells which of them grow. Where this is ambiguous, the user says the role. mup2_ref.growths does the same for the few
modules of its own examples.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mup2_ref import ROLES, Growth

MATRIX_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Weight(NamedTuple):
    """A parameter with its role in the network, which decides how it scales with the width."""

    parameter: nn.Parameter
    module: nn.Module  # the module that owns the parameter
    role: str  # one of ROLES, where vectors count as input layers, or "finite": the tensor does not grow
    growth: Growth
    base_fan_in: int | None  # at the base width; None: init_ does not draw this parameter
    divisor: float  # mup.MuReadout divides its input by this growth of the width; 1.0 elsewhere

    @property
    def in_norm(self) -> bool:
        """Whether a normalization layer owns the parameter, or a class of another library such as LlamaRMSNorm."""
        called_norm = "norm" in type(self.module).__name__.lower()
        return isinstance(self.module, NORM_MODULES) or (called_norm and self.parameter.ndim == 1)


class _Place(NamedTuple):
    """Where a parameter is found in the model and in the base model."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    base_shape: torch.Size
    base_module: nn.Module | None  # None: only shapes are known, from p.infshape

    @property
    def ratios(self) -> list[float]:
        return [n / n0 if n0 else 1.0 for n, n0 in zip(self.parameter.shape, self.base_shape)]


def describe(model: nn.Module, base: nn.Module | None = None, roles: dict[str, str] | None = None) -> dict[str, Weight]:
    """Every parameter of the model by its name; a tied parameter is listed once, by its first name.

    base: the same architecture at the base width; None: p.infshape, which mup.set_base_shapes() sets, is read.
    roles: {parameter name: role} where modules and shapes do not tell the role.
    Raises ValueError for a role that cannot be told, and for models that differ in more than their width.
    """
    roles = roles or {}
    base_shapes = _base_shapes(model, base)
    first_names: dict[Tensor, str] = {}
    found: dict[str, Weight] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in base_shapes or len(base_shapes[name]) != p.ndim:
            raise ValueError(
                f"'{name}' with shape {tuple(p.shape)} has no counterpart in the base model. Build the base model with "
                "the same code at another width, and pass both models as they are, not wrapped in DDP or torch.compile."
            )
        owner = name.rpartition(".")[0]
        base_module = None if base is None else base.get_submodule(owner)
        place = _Place(name, p, model.get_submodule(owner), base_shapes[name], base_module)
        first = first_names.setdefault(p, name)
        weight = _weight(place, roles.get(first))
        if not _agree(found.setdefault(first, weight), weight):
            raise ValueError(
                f"'{first}' ({found[first].role}) and '{name}' ({weight.role}) are one tied tensor in two roles. Say "
                f"which role counts: roles={{'{first}': '{found[first].role}'}}. With 'input' the model must divide "
                "its logits by the growth of the width, as mup.MuSharedReadout does, or they blow up."
            )
    if missing := base_shapes.keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        raise ValueError(f"the base model has parameters that the model lacks: {sorted(missing)}")
    if unknown := set(roles) - set(found):
        raise ValueError(f"roles names parameters that the model does not have: {sorted(unknown)}")
    return found


def tied(model: nn.Module) -> set[str]:
    """First names of the parameters that the model uses in several places."""
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return {several[0] for several in names.values() if len(several) > 1}


def fans(module: nn.Module, shape: torch.Size, growing: list[int]) -> tuple[int, int] | None:
    """(fan_out, fan_in) of a tensor; None if neither the module's type nor the shape tells.

    growing: the dimensions that grow with the width.
    """
    if isinstance(module, nn.modules.conv._ConvNd) and len(shape) > 1:  # with groups, too
        fan_out = shape[1] * module.groups if module.transposed else shape[0]
        return fan_out, shape.numel() // fan_out
    if isinstance(module, MATRIX_MODULES) and len(shape) == 2:
        return shape[0], shape[1]
    if isinstance(module, NORM_MODULES):
        return shape.numel(), 1
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and len(shape) == 2:
        return shape[1], 1  # its input is one-hot: each coordinate of the output is a single weight
    if not growing:
        return 1, 1
    if len(shape) == 1 or (len(shape) > 2 and shape.numel() == max(shape)):  # gains, biases, layer scales, class tokens
        return shape.numel(), 1
    if len(shape) > 2 and shape[0] == 1 and growing == [len(shape) - 1]:  # (1, positions, width): added to activations
        return shape[-1], 1
    return None  # a matrix that some forward() multiplies with, from the left or from the right


def _base_shapes(model: nn.Module, base: nn.Module | None) -> dict[str, torch.Size]:
    if base is not None:
        return {name: p.shape for name, p in base.named_parameters(remove_duplicate=False)}
    shapes = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if not hasattr(p, "infshape"):
            raise ValueError(
                f"'{name}' has no infshape. Pass the base model, or call mup.set_base_shapes(model, base, delta=...) "
                "first; copies of a model lose their infshapes, so call it on the copy."
            )
        shapes[name] = torch.Size(dim.base_dim or dim.dim for dim in p.infshape)
    return shapes


def _weight(place: _Place, word: str | None) -> Weight:
    """word: the role that the user gives to this parameter."""
    if word not in (None, *ROLES, "finite"):
        raise ValueError(f"roles gives '{place.name}' the role {word!r}; take 'input', 'hidden', 'output' or 'finite'.")
    p, module = place.parameter, place.module
    fans_now, fans_at_base = _both_fans(place)
    if place.base_module is None and fans_now is None and p.ndim == 2 and not _groups_unknown(module):
        word = word or _word_of_mup(p)
    if (fans_now is None and word is None) or (word == "hidden" and p.ndim < 2):
        raise _ambiguous(place, word)
    if fans_now and fans_at_base:
        growth = Growth(fans_now[0] / fans_at_base[0], fans_now[1] / fans_at_base[1])
    else:
        growth = Growth(place.ratios[0], math.prod(place.ratios[1:]))
    growth = _as_told(growth, word)
    role = word or growth.role
    drawn = p.ndim > 1 and isinstance(module, MATRIX_MODULES)
    base_fan_in = fans_at_base[1] if drawn and fans_at_base else None
    return Weight(p, module, role, growth, base_fan_in, _divisor(place, growth) if role == "output" else 1.0)


def _both_fans(place: _Place) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Fans in the model and in the base model; both are None, or neither is."""
    if place.base_module is None and _groups_unknown(place.module) and place.parameter.ndim > 1:
        return None, None  # an infshape does not tell how many groups the base model has
    growing = [i for i, ratio in enumerate(place.ratios) if ratio != 1]
    now = fans(place.module, place.parameter.shape, growing)
    at_base = fans(place.base_module or place.module, place.base_shape, growing)
    return (now, at_base) if now and at_base else (None, None)


def _groups_unknown(module: nn.Module) -> bool:
    """Whether fan_out depends on the number of groups, which a base model may have chosen differently."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.transposed and module.groups > 1


def _word_of_mup(p: nn.Parameter) -> str:
    """The mup package treats a raw matrix by its number of dimensions that grow."""
    return ("input", "hidden")[sum(dim.isinf() for dim in p.infshape) - 1]  # type: ignore[attr-defined]


def _as_told(growth: Growth, word: str | None) -> Growth:
    """What grows, grows on the side that the user's word names."""
    if word is None or word == "hidden":
        return growth
    wanted, other = growth if word == "input" else (growth.fan_in, growth.fan_out)
    grown = wanted if wanted != 1 else other
    return {"input": Growth(grown, 1.0), "output": Growth(1.0, grown), "finite": Growth(1.0, 1.0)}[word]


def _ambiguous(place: _Place, word: str | None) -> ValueError:
    told = f", and roles says {word!r}" if word else ""
    return ValueError(
        f"cannot tell the role of '{place.name}' (shape {tuple(place.parameter.shape)}, in the base model "
        f"{tuple(place.base_shape)}, owned by a module of type {type(place.module).__name__}{told}). Pass "
        f"roles={{'{place.name}': role}}, with the role 'input' (fan_in does not grow with the width), 'hidden' (a "
        "matrix of shape (fan_out, fan_in), and both grow), 'output' (fan_out does not grow) or 'finite' (nothing "
        "grows)."
    )


def _divisor(place: _Place, growth: Growth) -> float:
    """The growth of the width by which a mup.MuReadout divides its input; 1.0 for all other modules."""
    if all(kind.__name__ != "MuReadout" for kind in type(place.module).__mro__):
        return 1.0
    divisor = own = float(place.module.width_mult())  # type: ignore[operator]
    if place.base_module is not None and hasattr(place.base_module.weight, "infshape"):
        divisor /= place.base_module.width_mult()  # type: ignore[operator]
    if divisor != growth.fan_in:
        raise ValueError(
            f"'{place.name}' divides its input by {own:g}, as mup.set_base_shapes noted, but its fan_in grows by "
            f"{growth.fan_in:g} from the base model. Call mup.set_base_shapes on both models with the same base, or "
            "leave the base model out."
        )
    return divisor


def _agree(a: Weight, b: Weight) -> bool:
    """Whether two places of a tied tensor need the same factors, as the embedding and a mup.MuSharedReadout do."""
    if {a.role, b.role} == {"input", "output"}:
        return a.divisor * b.divisor == a.growth.fan_out * b.growth.fan_out
    return (a.role, a.growth) == (b.role, b.growth)

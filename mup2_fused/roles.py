"""The role of every parameter of a model, and how its fans grow from the base model to the model, for any architecture.

The type of the module tells which dimensions of a tensor are fan_out and fan_in; the difference from the base model
tells which of them grow. Where this is ambiguous, the user says the role. mup2_ref.growths does the same for the few
modules of its own examples.
"""

from __future__ import annotations

from math import isclose
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mup2_fused.bases import Base, base_module, require_same_counts
from mup2_fused.layouts import (
    EMBEDDINGS,
    NORM_MODULES,
    Layout,
    fans,
    may_contract,
    of_matrix_module,
    of_role,
    of_shape,
    of_type,
    read,
)
from mup2_fused.multipliers import logits_divisor, mu_readout_divisor, require_same_numbers
from mup2_ref import Growth


class Weight(NamedTuple):
    """A parameter with its role in the network, which decides how it scales with the width."""

    parameter: nn.Parameter
    module: nn.Module  # the module that owns the parameter
    role: str  # one of ROLES, where vectors count as input layers, or "finite": the tensor does not grow
    growth: Growth
    base_fan_in: int | None  # at the base width; None: init_ does not draw this parameter
    divisor: float  # by how much more than the base model the model divides the input of the last layer; 1.0 elsewhere
    bias: bool  # of a matrix whose module is known: init_ makes it 0
    assumed: bool  # "input" is a guess, for a raw vector v that may be used as x @ v

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
    divisor: float  # by how much more than the base model the model divides the logits that p makes

    @property
    def ratios(self) -> list[float]:
        return [n / n0 if n0 else 1.0 for n, n0 in zip(self.parameter.shape, self.base_shape)]

    @property
    def growing(self) -> list[int]:
        """The dimensions that grow with the width."""
        return [i for i, ratio in enumerate(self.ratios) if ratio != 1]


def describe(model: nn.Module, base: Base = None, roles: dict[str, str] | None = None) -> dict[str, Weight]:
    """Every parameter of the model by its name; a tied parameter is listed once, by its first name.

    base, roles: see param_groups.
    Raises ValueError for a role that cannot be told, and for models that differ in more than their width.
    """
    base, roles = base_module(model, base), roles or {}
    _refuse_old_norms(model, roles)
    base_shapes = _base_shapes(model, base)
    if base is not None:
        require_same_counts(model, base)
        require_same_numbers(model, base)
    readout, divisor = logits_divisor(model, base)
    first_names: dict[Tensor, str] = {}
    found: dict[str, Weight] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in base_shapes or len(base_shapes[name]) != p.ndim:
            raise ValueError(
                f"'{name}' with shape {tuple(p.shape)} has no counterpart in the base model. Build the base model with "
                "the same code at another width, and pass both models as they are, not wrapped in DDP or torch.compile."
            )
        owner = name.rpartition(".")[0]
        of_base = None if base is None else base.get_submodule(owner)
        divided = divisor if p is readout else 1.0
        place = _Place(name, p, model.get_submodule(owner), base_shapes[name], of_base, divided)
        first = first_names.setdefault(p, name)
        weight = _weight(place, roles.get(first))
        if not _agree(found.setdefault(first, weight), weight):
            raise ValueError(
                f"'{first}' ({found[first].role}) and '{name}' ({weight.role}) are one tied tensor in two roles. Untie "
                "both models (tie_word_embeddings=False in transformers), or say which role counts: "
                f"roles={{'{first}': 'output'}}. 'input' is for models that divide their logits by the growth of the "
                "width, as mup.MuSharedReadout does. In others the logits blow up."
            )
    if missing := base_shapes.keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        raise ValueError(f"the base model has parameters that the model lacks: {sorted(missing)}")
    if unknown := set(roles) - set(found):
        raise ValueError(f"roles names parameters that the model does not have: {sorted(unknown)}")
    return found


def _refuse_old_norms(model: nn.Module, roles: dict[str, str]) -> None:
    """The old weight_norm and spectral_norm leave nothing but a hook. A user may give roles to their tensors."""
    for owner, module in model.named_modules():
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        for hook in module._forward_pre_hooks.values() if trainable else ():
            old = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}.get(type(hook))
            name = f"{owner}.{getattr(hook, 'name', '')}".lstrip(".")
            if old and not any(said.startswith(f"{name}_") for said in roles):
                raise ValueError(
                    f"'{name}' is normalized by torch.nn.utils.{old}, so that muP's scales do not reach it. Call "
                    f"torch.nn.utils.remove_{old} in both models, and put a normalization layer behind this one."
                )


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
    """word: the role or the layout that the user gives to this parameter."""
    p, module, base_module = place.parameter, place.module, place.base_module
    role, said = read(word, place.name, p.ndim)
    typed = of_type(module, place.name, p.shape)
    # An infshape does not tell how many groups the base model has.
    unknown_groups = base_module is None and typed is not None and _groups(module, typed) > 1
    if base_module is None and p.ndim == 2 and word is None and not typed and of_shape(p.shape, place.growing) is None:
        role = _word_of_mup(p)
    assumed = not (role or said or typed) and bool(place.growing) and may_contract(module, place.name)
    layout = said or _layout(place, role, typed)
    if layout is None and word is None and not p.requires_grad:  # nobody asks for its role
        layout = ("batch",) * p.ndim
    if layout is None or (unknown_groups and word is None):
        raise _ambiguous(place, word)
    if "in" in layout and (layout is said or layout is typed):
        _require_same_batch(place, layout)
    now, at_base = (
        fans(layout, shape, _groups(m, layout) if layout is typed and not unknown_groups else 1)
        for shape, m in ((p.shape, module), (place.base_shape, base_module or module))
    )
    growth = _as_told(Growth(*(n / n0 if n0 else 1.0 for n, n0 in zip(now, at_base))), role)
    role = role or growth.role
    base_fan_in = at_base[1] if "in" in layout and not unknown_groups else None
    bias = "in" not in layout and of_matrix_module(module, place.name, p.shape) is not None
    return Weight(p, module, role, growth, base_fan_in, _divisor(place, role, growth), bias, assumed)


def _layout(place: _Place, role: str | None, typed: Layout | None) -> Layout | None:
    """The layout that the module's type, the shape or the user's role tells; None if they do not."""
    if typed is None:
        shape = place.parameter.shape
        return of_role(role, shape, place.ratios) if role else of_shape(shape, place.growing)
    if isinstance(place.module, EMBEDDINGS) and role == "output" and "in" not in typed:
        return "out", "in"  # tied to a readout
    return typed if "in" in typed or role != "hidden" else None


def _groups(module: nn.Module, layout: Layout) -> int:
    """Over how many groups the fan_out of this tensor is spread."""
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) and layout[:1] == ("in",) else 1


def _require_same_batch(place: _Place, layout: Layout) -> None:
    for i in place.growing:
        if layout[i] == "batch":
            other = " ".join((*layout[:i], "out", *layout[i + 1 :]))
            raise ValueError(
                f"dimension {i} of '{place.name}' (shape {tuple(place.parameter.shape)}, in the base model "
                f"{tuple(place.base_shape)}) only counts matrices, and a count, such as the number of experts, is no "
                "width: build both models with the same one. If these are blocks on the diagonal of one matrix, say "
                f"roles={{'{place.name}': '{other}'}}."
            )


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
    more = ""
    if isinstance(place.module, ParametrizationList):
        more = (
            " A parametrization makes the weight from it. If that normalizes the weight, as weight_norm, spectral_norm "
            "and orthogonal do, muP's scales do not reach it: call torch.nn.utils.parametrize.remove_parametrizations, "
            "and put a normalization layer behind. If it only adds to it, as LoRA does, the role is the weight's own."
        )
    return ValueError(
        f"cannot tell the role of '{place.name}' (shape {tuple(place.parameter.shape)}, in the base model "
        f"{tuple(place.base_shape)}, owned by a module of type {type(place.module).__name__}{told}). Pass "
        f"roles={{'{place.name}': role}}, with the role 'input' (fan_in does not grow with the width), 'hidden' (both "
        "grow, the last two dimensions are fan_out and fan_in, and those before do not grow), 'output' (fan_out does "
        "not grow) or 'finite' (nothing grows). Or pass a layout in place of the role, a word for each dimension: 'out "
        f"in' for F.linear(x, w), 'in out' for x @ w, 'batch in out' for a stack of such matrices.{more}"
    )


def _divisor(place: _Place, role: str, growth: Growth) -> float:
    """By how much more than the base model the model divides the input of the last layer; 1.0 for all other weights."""
    if role != "output":
        return 1.0
    return place.divisor * mu_readout_divisor(place.name, place.module, place.base_module, growth.fan_in)


def _agree(a: Weight, b: Weight) -> bool:
    """Whether two places of a tied tensor need the same factors, as the embedding and a mup.MuSharedReadout do."""
    if {a.role, b.role} == {"input", "output"}:
        return isclose(a.divisor * b.divisor, a.growth.fan_out * b.growth.fan_out, rel_tol=1e-6)
    return (a.role, a.growth) == (b.role, b.growth)

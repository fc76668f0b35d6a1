"""The base model from what the user gives for it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn


class Config(Protocol):
    """A config of the transformers library, such as LlamaConfig."""

    def to_dict(self) -> dict[str, Any]: ...


Base = nn.Module | Callable[[], nn.Module] | Config | None


def base_module(model: nn.Module, base: Base) -> nn.Module | None:
    """The base model. A config or a function makes it on the meta device, where it takes no memory.

    TypeError for anything else, and for a config of another class than the model's. RuntimeError for a model that
    cannot be made on the meta device.
    """
    if base is None or isinstance(base, nn.Module):
        return base
    kind: Any = getattr(type(model), "config_class", None)
    make: Any = partial(type(model), deepcopy(base)) if isinstance(kind, type) and isinstance(base, kind) else base
    if not callable(make):
        config = f"a {kind.__name__}, " if kind else ""
        raise TypeError(
            f"base is a model, {config}or a function without arguments that makes the base model, and not of type "
            f"{type(base).__name__}"
        )
    try:
        with torch.device("meta"):
            made = make()
    except RuntimeError as error:
        raise RuntimeError(
            f"the base model cannot be made on the meta device ({error}): make it yourself, and pass the model"
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"base() must return the base model, but returned something of type {type(made).__name__}")
    return made

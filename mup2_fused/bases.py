"""The base model from what the user gives for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Config(Protocol):
    """A config of the transformers library, such as LlamaConfig."""

    def to_dict(self) -> dict[str, Any]: ...


Base = nn.Module | Callable[[], nn.Module] | Config | None


class _NumbersKeepTheirValues(TorchFunctionMode):
    """torch.tensor(number) is on the CPU: on the meta device, the number by which a model multiplies would be lost."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and args and isinstance(args[0], (int, float)) and options.get("device") is None:
            options["device"] = "cpu"
        return func(*args, **options)


def base_module(model: nn.Module, base: Base) -> nn.Module | None:
    """The base model. A config or a function makes it on the meta device, where it takes no memory.

    The global state of random numbers stays as it is.
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
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=gpus), torch.device("meta"), _NumbersKeepTheirValues():
            made = make()
    except RuntimeError as error:
        raise RuntimeError(
            f"the base model cannot be made on the meta device ({error}): make it yourself, and pass the model"
        ) from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"base() must return the base model, but returned something of type {type(made).__name__}")
    return made


def require_same_counts(model: nn.Module, base: nn.Module) -> None:
    """ValueError if models of transformers have different numbers of tokens or labels, which would look like widths."""
    for tokens, of_base in zip(_tokens(model), _tokens(base)):
        if tokens and of_base and tokens != of_base:
            raise ValueError(
                f"the model has {tokens} tokens and the base model {of_base}: give both configs the same vocab_size. "
                "model.resize_token_embeddings changes that of model.config"
            )
    labels, of_base = (getattr(getattr(m, "config", None), "num_labels", 0) for m in (model, base))
    shapes = {name: p.shape for name, p in base.named_parameters()} if labels != of_base else {}
    for name, p in model.named_parameters():
        # Detectors have one class more, for the background.
        if p.ndim and shapes.get(name) and 0 <= p.shape[0] - labels == shapes[name][0] - of_base <= 1:
            raise ValueError(
                f"the model has {labels} labels ('{name}') and the base model {of_base}: give both configs the same "
                "num_labels"
            )


def _tokens(model: Any) -> list[int]:
    """How many tokens the embeddings at the input and at the output of a model of transformers know; 0 without them."""
    counts = []
    for end in ("input", "output"):
        try:
            embedding = getattr(model, f"get_{end}_embeddings")()
        except (AttributeError, NotImplementedError):
            embedding = None
        weight = getattr(embedding, "weight", None)
        of_features = end == "input" and isinstance(embedding, nn.Linear)  # has as many rows as the model is wide
        counts.append(weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 and not of_features else 0)
    return counts

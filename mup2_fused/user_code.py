"""The user's functions, which commands are given as "module:name"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


def attribute(name: str) -> Any:
    """The object that "module:name" names; modules of the current folder are found, too.

    If there is none, the command says so and ends with status 2.
    """
    module, _, attribute_name = name.partition(":")
    if not attribute_name:
        raise _ends(f"expected module:name, such as torchvision.models:resnet18, not {name!r}")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute_name)
    except (ImportError, AttributeError) as error:
        raise _ends(f"{name}: {error}; the module must be importable from here") from error


def _ends(message: str) -> SystemExit:
    print(f"error: {message}", file=sys.stderr)
    return SystemExit(2)


def model_and_loss(made: Any) -> tuple[nn.Module, Loss | None]:
    """What a factory made: a model, or (model, loss) with loss(model) a scalar."""
    return made if isinstance(made, tuple) else (made, None)

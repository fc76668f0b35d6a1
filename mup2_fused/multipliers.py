"""Numbers by which a model multiplies inside forward(), beside its tensors.

A number that is the same in the model and in the base model is a constant, which the lr and rho that were tuned on the
base model have seen. If the numbers by which logits are multiplied differ, the factors of the last layer take this up.
Others that differ raise an error. What multiplies the logits of attention is the model's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# In configs of transformers. A model with mup_enabled multiplies its embeddings by the square root of the width.
NUMBERS = {
    *("embedding_multiplier", "residual_multiplier", "attention_in_multiplier", "attention_out_multiplier"),
    *("mlp_multipliers", "ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers"),
    *("output_multiplier", "mup_enabled"),
}

OF_LOGITS = {"logits_scaling", "lm_head_multiplier", "logit_scale"}
# They divide by the square root of the width, if their embedding is the readout, or if scale_decoder_outputs says so.
T5 = {"t5", "umt5", "longt5", "pop2piano", "udop", "switch_transformers"}


def require_same_numbers(model: nn.Module, base: nn.Module) -> None:
    """ValueError if the model multiplies by other numbers than the base model, where no tensor takes this up."""
    theirs, lines = dict(_numbers(base)), []
    for name, number in _numbers(model):
        if not _same(number, other := theirs.get(name, number)):
            lines.append(f"{name} is {number} here and {other} in the base model: {_advice(name, other)}")
    if lines:
        raise ValueError(
            "the model multiplies by numbers that differ from those of the base model. muP² needs the same ones at all "
            "widths.\n" + "\n".join(lines)
        )


def _advice(name: str, other: Any) -> str:
    """How the number becomes that of the base model."""
    if name.startswith("config."):
        of_width = name.endswith("mup_enabled")
        return "set mup_enabled=False in both configs" if of_width else "give both configs the same one"
    owner, _, attribute = name.rpartition(".")
    module = f"model.get_submodule('{owner}')" if owner else "model"
    more = "; where the config has scale_embedding, False is enough" if attribute == "embed_scale" else ""
    return f"make the model, and set {module}.{attribute} = torch.tensor({other}){more}"


def _same(a: Any, b: Any) -> bool:
    """Up to the rounding of bfloat16."""
    numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=0.01) if numbers else a == b


def _numbers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, number) for those that must be the same at all widths. Embeddings have an embed_scale in many models."""
    config: Any = getattr(model, "config", None)
    of_transformers = hasattr(config, "get_text_config")
    for owner, module in model.named_modules():
        # Training changes no buffer that checkpoints lack.
        fixed: dict[str, Any] = {name: module._buffers[name] for name in sorted(module._non_persistent_buffers_set)}
        found = {name: b for name, b in fixed.items() if of_transformers and b is not None and b.is_floating_point()}
        found["embed_scale"] = getattr(module, "embed_scale", None)
        if isinstance(found["embed_scale"], Tensor) and found["embed_scale"].is_meta:
            found["embed_scale"] = getattr(module, "scalar_embed_scale", None)
        for attribute, number in found.items():
            if isinstance(number, (int, float)) or _is_fixed(number):
                yield f"{owner}.{attribute}".lstrip("."), float(number)
    if of_transformers:
        yield from _in_config(config.to_dict(), "config")


def _is_fixed(value: Any) -> bool:
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    return one and not isinstance(value, nn.Parameter)


def _in_config(settings: dict[str, Any], owner: str) -> Iterator[tuple[str, Any]]:
    """Of a part of the model, also the numbers of its logits: they may not be the model's."""
    names = NUMBERS if owner == "config" else NUMBERS | OF_LOGITS
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _in_config(value, f"{owner}.{name}")
        elif name in names and value is not None:
            of_width = name == "mup_enabled" and value
            yield f"{owner}.{name}", settings["hidden_size"] ** 0.5 if of_width else value


def logits_divisor(model: Any, base: Any) -> tuple[Tensor | None, float]:
    """(weight of the last layer, by how much more the model divides its logits than the base model does).

    (None, 1.0) for models that are not of transformers, or have no readout of words.
    """
    configs: list[Any] = [getattr(m, "config", None) for m in (model, base)]
    of_transformers = all(hasattr(config, "get_text_config") for config in configs)
    readout = model.get_output_embeddings() if of_transformers and hasattr(model, "get_output_embeddings") else None
    if readout is None:
        return None, 1.0
    now, at_base = (_of_logits(config) for config in configs)
    return readout.weight, at_base / now


def _of_logits(config: Any) -> float:
    """The number by which a model multiplies its logits, or the input of its last layer."""
    scaling, multiplies = getattr(config, "logits_scaling", None) or 1.0, config.model_type.startswith("hyperclovax")
    number: float = scaling if multiplies else 1 / scaling  # of Granite and MiniCPM3
    for name in ("lm_head_multiplier", "logit_scale"):  # of Falcon-H1 and Cohere
        factor = getattr(config, name, None)
        number *= factor if isinstance(factor, (int, float)) else 1.0
    scaled = getattr(config, "scale_decoder_outputs", config.model_type in T5 and config.tie_word_embeddings)
    return number * (config.hidden_size**-0.5 if scaled else 1.0)


def mu_readout_divisor(name: str, module: Any, base_module: Any, growth: float) -> float:
    """The growth of the width by which a mup.MuReadout divides its input; 1.0 for other modules.

    growth: that of the weight's fan_in. ValueError if they differ.
    """
    if all(kind.__name__ != "MuReadout" for kind in type(module).__mro__):
        return 1.0
    divisor = own = float(module.width_mult())
    if base_module is not None and hasattr(base_module.weight, "infshape"):
        divisor /= base_module.width_mult()
    if not math.isclose(divisor, growth, rel_tol=1e-6):
        raise ValueError(
            f"'{name}' divides its input by {own:g}, as mup.set_base_shapes noted, but its fan_in grows by {growth:g} "
            "from the base model. Call mup.set_base_shapes on both models with the same base, or leave the base model "
            "out."
        )
    return divisor

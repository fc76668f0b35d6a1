"""Which dimensions of a tensor are its fan_out and its fan_in: by its module's type, by its shape, or by a role.

A layout has one word for each dimension. fan_out is the product of the dimensions "out", fan_in that of "in". A "batch"
dimension counts separate matrices, such as experts, or the rows of an embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor, nn

from mup2_ref import ROLES

Layout = tuple[str, ...]
WORDS = ("batch", "out", "in")
MATRIX_MODULES = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LORA = re.compile(r"\blora_(embedding_)?[AB]\b")  # names that peft and loralib give
# Usual names of vectors that are added to activations or scale them, and of modules that do so.
ELEMENTWISE = re.compile(
    r"bias|gain|gamma|beta|scal|alpha|lambda_?\d|norm|magnitude|token|cls|class_?(emb|tok)|mask|emb|pos|prompt|latent|"
    r"register|sink|shift|slope|temp|mix|time|decay|^dt|a_log|init|state|newline|sep|pad|bos|eos|begin|end$|residual|"
    r"gate|^[bd]\d?$|^ls"
)
ELEMENTWISE_MODULE = re.compile("norm|scale|affine|grn|bias|embed|prelu")


def read(word: str | None, name: str, ndim: int) -> tuple[str | None, Layout | None]:
    """(role, layout) that the user's word gives to a parameter; at most one of them is not None.

    Leading dimensions that a layout leaves out are batch dimensions. Raises ValueError for an unknown word.
    """
    if word is None or word in (*ROLES, "finite"):
        return word, None
    words = tuple(word.split())
    if not set(words) <= set(WORDS) or not set(words) & {"out", "in"} or len(words) > ndim:
        raise ValueError(
            f"roles gives '{name}' the role {word!r}; take 'input', 'hidden', 'output' or 'finite'. Or take a layout "
            f"with 'batch', 'out' or 'in' for each of its {ndim} dimensions, such as 'out in'."
        )
    return None, ("batch",) * (ndim - len(words)) + words


def fans(layout: Layout, shape: Sequence[int], groups: int = 1) -> tuple[int, int]:
    """(fan_out, fan_in) of a tensor. groups: of a transposed convolution, whose fan_out is spread over them."""
    fan_out, fan_in = (math.prod(n for n, word in zip(shape, layout) if word == side) for side in ("out", "in"))
    return fan_out * groups, fan_in // groups


def of_type(module: nn.Module, name: str, shape: Sequence[int]) -> Layout | None:
    """The layout that the module's type tells. name: the parameter's full name."""
    if isinstance(module, NORM_MODULES) and name.rpartition(".")[2] in ("weight", "bias"):
        return ("out",) * len(shape)  # LayerNorm's may have several dimensions
    if isinstance(module, EMBEDDINGS) and name.endswith("weight") and len(shape) == 2:
        return "batch", "out"  # its input is one-hot: each coordinate of the output is a single weight
    return of_matrix_module(module, name, shape)


def of_matrix_module(module: nn.Module, name: str, shape: Sequence[int]) -> Layout | None:
    """The layout of a matrix, or of its bias, in a module that multiplies its input by matrices."""
    n, local, kind, bias = len(shape), name.rpartition(".")[2], type(module), getattr(module, "bias", None)
    conv1d = any(k.__name__ == "Conv1D" for k in kind.__mro__)  # the linear layer of GPT-2
    router = kind.__name__.endswith("Router") and _of_transformers(module)
    if n == 1:
        return ("out",) if "bias" in local and (isinstance(module, MATRIX_MODULES) or conv1d or router) else None
    named = "weight" in local  # others that the user adds to a class derived from torch's may be used in any way
    if isinstance(module, nn.modules.conv._ConvNd) and n > 2 and named:
        return ("in", "out", *["in"] * (n - 2)) if module.transposed else ("out", *["in"] * (n - 1))
    of_lora = "lora_embedding_" in name or any(k.__module__.startswith("loralib") for k in kind.__mro__)
    if n == 2 and ((isinstance(module, MATRIX_MODULES) and named) or (of_lora and LORA.search(name))):
        return "out", "in"
    if n == 2 and local == "weight" and conv1d and isinstance(bias, Tensor) and bias.shape == shape[1:]:
        return "in", "out"
    if n == 2 and local == "weight" and router:  # of a mixture of experts: (experts, width)
        return "out", "in"
    return _of_experts(module, local, n)


def _of_experts(module: nn.Module, local: str, n: int) -> Layout | None:
    """Of transformers' experts, whose weights are stacks of matrices: some (out, in), some (in, out)."""
    if local.removesuffix("_bias") not in ("gate_up_proj", "up_proj", "down_proj"):
        return None
    transposed = getattr(module, "is_transposed", None) if _of_transformers(module) else None
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if transposed is None and isinstance(up, Tensor) and isinstance(down, Tensor) and up.ndim == down.ndim == 3:
        ways = {2: True, 1: False}  # two matrices from n to m, side by side in one dimension, and one back from m to n
        transposed = next((way for i, way in ways.items() if up.shape[i] == 2 * down.shape[3 - i]), None)
    if transposed is None or n != (2 if local.endswith("_bias") else 3):
        return None
    return ("batch", "out") if n == 2 else ("batch", "in", "out") if transposed else ("batch", "out", "in")


def _of_transformers(module: nn.Module) -> bool:
    """Also after fully_shard or a parametrization, which put a class of their own before the module's."""
    return any(kind.__module__.startswith("transformers") for kind in type(module).__mro__)


def of_shape(shape: Sequence[int], growing: list[int]) -> Layout | None:
    """The layout of what is usually added to activations, or multiplies them elementwise; None for all else.

    growing: the dimensions that grow with the width.
    """
    n = len(shape)
    if not growing:
        return ("batch",) * n
    if is_vector(shape):  # gains, biases, layer scales, class tokens
        return ("out",) * n
    if n > 2 and shape[0] == 1 and growing == [n - 1]:  # (1, positions, width)
        return (*["batch"] * (n - 1), "out")
    return None  # a matrix that some forward() multiplies with, from the left or from the right


def is_vector(shape: Sequence[int]) -> bool:
    return len(shape) == 1 or (len(shape) > 2 and math.prod(shape) == max(shape))


def of_role(role: str, shape: Sequence[int], ratios: list[float]) -> Layout | None:
    """The layout of a raw tensor with the role that the user says; None if it must be said, too.

    ratios: by how much the dimensions grow. The last two dimensions are (fan_out, fan_in), those before are batch
    dimensions. But the single dimension that grows is fan_out for the role "input", and fan_in for "output".
    """
    n, growing = len(shape), [i for i, ratio in enumerate(ratios) if ratio != 1]
    if role == "hidden":
        alike = n == 2 or (n > 2 and ratios[-2] == ratios[-1])
        return (*["batch"] * (n - 2), "out", "in") if alike and set(growing) <= {n - 2, n - 1} else None
    if role == "finite":
        return ("batch",) * n
    side, last = ("out", n - 2) if role == "input" else ("in", n - 1)
    if is_vector(shape):
        return (side,) * n
    if len(growing) > 1 and growing != [n - 2, n - 1]:
        return None
    square = n > 1 and shape[-2] == shape[-1]  # where nothing grows, the fan_in of other tensors is unknown
    where = growing[0] if len(growing) == 1 else last if growing or square else None
    return tuple(side if i == where else "batch" for i in range(n))


def may_contract(module: nn.Module, name: str) -> bool:
    """Whether a raw vector may be multiplied with activations and summed over, as in x @ v.

    That is assumed unless its name or its module's is usual for what is added to activations or scales them.
    """
    if "lora_" in name:
        return False
    used = name.split(".")[-1:]
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        used = name.split(".")[-2:]
    elif type(module).__module__.startswith("torch.nn.") or ELEMENTWISE_MODULE.search(type(module).__name__.lower()):
        return False
    return not any(ELEMENTWISE.search(part.lower()) for part in used)

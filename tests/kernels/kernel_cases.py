"""Tensors for the tests of the kernels, and the bound of their errors."""

import torch

from mup2_fused import _C
from mup2_fused.verify import error_and_bound

CHUNK = _C.chunk
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 255, 257, 1023, 1024, 1025, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F64, F32), (BF16, F32), (F16, F32)]  # weight, gradient
TYPE_IDS = [f"{w}-{g}".replace("torch.", "") for w, g in TYPES]


def tensors(dtype, device, sizes=SIZES, scale=1.0, offset=0):
    """Random tensors, each in an allocation of its own that begins `offset` elements before the tensor."""
    return [(scale * torch.randn(n + offset, dtype=F64)).to(device, dtype)[offset:] for n in sizes]


def some_unaligned(dtype, device):
    """As tensors(), but every second tensor begins where no vector access can."""
    return [x for pair in zip(tensors(dtype, device)[::2], tensors(dtype, device, offset=1)[1::2]) for x in pair]


def clones(xs):
    return [x.clone() for x in xs]


def assert_as_accurate(ours, reference, exact):
    """Each tensor keeps the bound by itself."""
    for x, y, z in zip(ours, reference, exact, strict=True):
        error, bound = error_and_bound([x], [y], [z])
        assert error <= bound

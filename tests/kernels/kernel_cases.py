"""Tensors for the tests of the kernels, and how to compare results."""

import torch

from mup2_fused import _C

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


def equal(xs, ys):
    """Whether two lists of tensors have the same bits."""
    bits = lambda t: t.detach().reshape(-1).contiguous().view(torch.uint8)
    return len(xs) == len(ys) and all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys))


def assert_as_accurate(ours, reference, exact):
    """The worst error against float64 may be twice the error of the reference in the same dtype, plus one last digit.

    An error of the reference in float64 cannot be seen: there, two last digits.
    """
    for x, y, z in zip(ours, reference, exact):
        digits = 2 if y.dtype == F64 else 1
        bound = 2 * (y.double() - z).abs().max() + digits * torch.finfo(y.dtype).eps * z.abs().max()
        assert (x.double() - z).abs().max().nan_to_num(torch.inf) <= bound

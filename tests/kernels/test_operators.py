"""torch.ops.mup2: against mup2_ref, torch.optim and float64, and bit for bit where that is due."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import F32, F64, TYPE_IDS, TYPES, assert_as_accurate, clones, some_unaligned, tensors
from small_problems import equal
from test_unusual_tensors import KINDS
from torch import nn

import mup2_fused
import mup2_ref

ops = torch.ops.mup2
VARIANTS = mup2_ref.VARIANTS
rounds_as_torch = mup2_fused.instruction_set != "baseline"  # torch's own kernels use fused multiply-add


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_norm(device, types, variant):
    w, g = (some_unaligned(dtype, device) for dtype in types)
    scalings = [0.5 + 0.1 * i for i in range(len(w))]
    rhos = [0.1 * i for i in range(len(w))]
    results = norm, coefficients, norms, nonfinite = ops.joint_norm(w, g, rhos, scalings, variant)
    expected = [mup2_ref.contribution(a, b, s, variant) for a, b, s in zip(w, g, scalings)]
    joint = mup2_ref.joint_norm(list(zip(w, g, scalings)), variant)
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-13, atol=0)
    torch.testing.assert_close(norm, joint, rtol=1e-13, atol=0)
    T = [mup2_ref.normalizer(a.double(), variant) if variant == "layerwise" else 1 for a in w]
    c = torch.stack([torch.as_tensor(r * t**2 / (joint + 1e-12)).to(joint) for r, t in zip(rhos, T)])
    torch.testing.assert_close(coefficients, c, rtol=1e-13, atol=0)
    assert nonfinite.item() == 0
    assert equal(results, ops.joint_norm(w, g, rhos, scalings, variant)), "the same bits every time"
    assert equal(results, ops.joint_norm(clones(w), clones(g), rhos, scalings, variant)), "wherever tensors begin"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_gives_coefficients_of_zero(device, value):
    w, g = tensors(F32, device), tensors(F32, device)
    g[-1][-1] = value
    norm, coefficients, _, nonfinite = ops.joint_norm(w, g, [0.1] * len(w), [1.0] * len(w), "sam")
    assert not norm.isfinite() and nonfinite.item() == 1 and not coefficients.any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_perturb_and_restore(device, types, variant):
    w, g = (some_unaligned(dtype, device) for dtype in types)
    before, gradients, versions = clones(w), clones(g), [x._version for x in w]
    backup = [torch.full_like(x, math.nan) for x in w]
    coefficients = torch.linspace(0, 0.3, len(w), dtype=F64, device=device)
    ops.perturb_(w, g, backup, coefficients, variant)
    assert equal(backup, before) and equal(g, gradients)
    assert equal(w[:1], before[:1]), "coefficient 0"
    base = "elementwise" if variant == "elementwise" else "sam"  # layerwise: T² is in the coefficient
    reference, exact = clones(before), [x.double().clone() for x in before]
    for i, c in enumerate(coefficients):
        mup2_ref.perturb_(reference[i], g[i], c, base)
        mup2_ref.perturb_(exact[i], g[i].double(), c, base)
    assert equal(w[1:], reference[1:]) or types == (F64, F32)  # where the reference multiplies in float32
    assert_as_accurate(w, reference, exact)
    ops.restore_(w, backup)
    assert equal(w, before) and [x._version for x in w] == [v + 2 for v in versions], "autograd is told of changes"


def torch_updates(optimizer, w, g, **kwargs):
    """Weights and state of torch.optim after three steps, in the dtype of the weights and in float64."""
    for start in (w, [x.double() for x in w]):
        params = [nn.Parameter(x.clone()) for x in start]
        for p, x in zip(params, g):
            p.grad = x.to(p.dtype)
        opt = optimizer(params, foreach=False, lr=0.01, **kwargs)
        for _ in range(3):
            opt.step()
        yield [p.detach() for p in params], [opt.state[p] for p in params]


def forget(w):
    """Clones of the weights as backups; the weights become NaN, so that an update must start from the backups."""
    backup = clones(w)
    for x in w:
        x.fill_(math.nan)
    return backup


NESTEROV = dict(momentum=0.9, weight_decay=0.1, nesterov=True)
DAMPENED = dict(momentum=0.9, dampening=0.5, maximize=True)
SGD_CASES = [(types, options) for types in TYPES for options in (NESTEROV, DAMPENED)]
SGD_CASES += [(types, o) for types in TYPES[:3] for o in (dict(), dict(weight_decay=0.1), dict(momentum=0.9))]


@pytest.mark.parametrize("types, options", SGD_CASES, ids=str)
def test_sgd(device, types, options):
    w, g = (some_unaligned(dtype, device) for dtype in types)
    start, lr = clones(w), torch.tensor(0.01, dtype=F64)
    momentum = [torch.zeros_like(x) for x in w] if "momentum" in options else []
    for i in range(3):
        backup = forget(w)
        ops.sgd_(w, g, backup, momentum, lr, first=i == 0, **options)
    (reference, state), (exact, exact_state) = torch_updates(torch.optim.SGD, start, g, **options)
    assert_as_accurate(w, reference, exact)
    if momentum:
        assert_as_accurate(momentum, *([s["momentum_buffer"] for s in states] for states in (state, exact_state)))
        assert all(m.any() for m in momentum)
    if device == "cpu" and types == (F32, F32) and rounds_as_torch:
        assert equal(w, reference)


@pytest.mark.parametrize("options", [dict(weight_decay=0.1), dict(weight_decay=0.0, maximize=True)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_adam(device, types, decoupled, options):
    w, g = (some_unaligned(dtype, device) for dtype in types)
    start, lr = clones(w), torch.tensor(0.01, dtype=F64)
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in w]
    for _ in range(3):
        backup = forget(w)
        ops.adam_(w, g, backup, m, v, steps, lr, eps=1e-4, decoupled=decoupled, **options)
    assert all(s.item() == 3 for s in steps)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    (reference, state), (exact, exact_state) = torch_updates(optimizer, start, g, eps=1e-4, **options)
    assert_as_accurate(w, reference, exact)
    for ours, key in ((m, "exp_avg"), (v, "exp_avg_sq")):
        assert_as_accurate(ours, [s[key] for s in state], [s[key] for s in exact_state])


def test_updates_without_backup_and_skipped_ones(device):
    w, g, m = (tensors(F32, device) for _ in range(3))
    before, momentum, backup = clones(w), clones(m), [x + 1 for x in w]
    ops.sgd_(w, g, [], [], torch.tensor(0.5))
    assert equal(w, [x - 0.5 * y for x, y in zip(before, g)])
    for skip in (1, 0):
        flag = torch.tensor([skip], dtype=torch.int32, device=device)
        ops.sgd_(w, g, backup, m, torch.tensor(0.5), momentum=0.9, skip=flag)
        assert equal(w, backup) == equal(m, momentum) == bool(skip)


def test_numbers_of_16_bits(device):
    """Every float16 and bfloat16 survives, and float32 values round to them as torch rounds."""
    lr, zero = torch.tensor(-1.0), torch.zeros
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        every = every[~every.isnan()]
        w = every.clone()
        ops.sgd_([w], [zero(len(w), device=device)], [], [], lr)
        assert torch.equal(w, every)  # but for the sign of 0
        finite = every[every.isfinite()].float()
        halfway = [finite, finite * (1 + 2**-11), finite * (1 + 3 * 2**-12), finite * (1 + 2**-9)]
        small = torch.randn(10**5, device=device).exp() * 1e-5
        x = torch.cat([*halfway, small, torch.tensor([65519.9, 65520.0, -1e38, 1e-9], device=device)])
        w = zero(len(x), dtype=dtype, device=device)
        ops.sgd_([w], [x], [], [], lr)
        assert torch.equal(w, x.to(dtype))


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_float16_where_the_processor_flushes_subnormal_numbers(instructions):
    """Every float16 is read, perturbed and written as without torch.set_flush_denormal, on each instruction set."""
    code = "import test_operators; print(test_operators.hash_of_float16(True) == test_operators.hash_of_float16(False))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MUP2_CPU": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def hash_of_float16(flush):
    """Of what the kernels make of all float16 numbers, and of float32 numbers around their smallest ones."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    x = torch.cat([every.float() * f for f in (1, 1 + 2**-11, 1 + 3 * 2**-12, 0.5)])
    zeros, lr, one = torch.zeros(len(x)), torch.tensor(-1.0), torch.ones(1, dtype=F64)
    results = []
    assert torch.set_flush_denormal(flush)
    for g in (x.half(), x):
        w, backup, m, v = ((zeros + 2**-20).half() for _ in range(4))
        norms = ops.joint_norm([w], [g], [0.1], [1.0], "elementwise")
        ops.perturb_([w], [g], [backup], one, "sam")
        results += [*norms, w.clone(), backup]
        ops.sgd_([w], [g], [], [m], lr, momentum=0.5)
        ops.adam_([w], [g], [], [m], [v], [torch.zeros(())], lr, eps=1e-4)
        results += [w, m, v]
    torch.set_flush_denormal(False)
    assert all(any(0 < abs(n) < 2**-14 for n in r.double().tolist()) for r in results if r.dtype == torch.float16)
    return hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest()


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(70, 130).t(),
    "strided": lambda: torch.randn(33, 64)[:, ::2],
    "gap": lambda: torch.randn(33, 64)[:, 3:40],
    "size one": lambda: torch.randn(5, 1, 7).transpose(0, 1),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout):
    """Elements are paired by index, not by address, whatever the strides of weight, gradient, backup and moment."""
    strided = lambda: LAYOUTS[layout]().to(device)
    alike = lambda x: torch.empty_strided(x.shape, x.stride(), device=device).copy_(torch.randn(x.shape))
    w = [alike(strided()), strided()]
    other = lambda: torch.randn(w[0].shape).to(device).transpose(0, -1).contiguous().transpose(0, -1)
    contiguous = lambda: torch.randn(w[0].shape).to(device)
    g = [contiguous(), alike(w[0])] if w[0].ndim == 0 else [other(), contiguous()]
    backup, m = [contiguous(), alike(w[0])], [alike(w[0]), contiguous()]
    before, addresses, strides = clones(w), [x.data_ptr() for x in w], [x.stride() for x in w]
    ops.perturb_(w, g, backup, torch.full((2,), 0.5, dtype=F64, device=device), "sam")
    assert all(torch.equal(x, b + 0.5 * y) for x, b, y in zip(w, before, g))
    assert all(map(torch.equal, backup, before))
    ops.sgd_(w, g, backup, m, torch.tensor(0.5), momentum=1.0, first=True)
    assert all(map(torch.equal, m, g))
    assert all(torch.equal(x, b - 0.5 * y) for x, b, y in zip(w, before, g))
    assert addresses == [x.data_ptr() for x in w] and strides == [x.stride() for x in w]


def test_operators_pass_opcheck(device):
    """opcheck() also compiles them, and looks at what they write to."""
    w, g, m, v = ([torch.rand(n, device=device) for n in (3, 0, 1025)] for _ in range(4))
    backup, steps, lr = clones(w), [torch.ones((), device=device) for _ in w], torch.tensor(0.1)
    coefficients = torch.full((3,), 0.1, dtype=F64, device=device)
    torch.library.opcheck(ops.joint_norm, (w, g, [0.1] * 3, [1.0] * 3, "layerwise"))
    torch.library.opcheck(ops.perturb_, (w, g, backup, coefficients, "sam"))
    torch.library.opcheck(ops.restore_, (w, backup))
    torch.library.opcheck(ops.sgd_, (w, g, backup, m, lr), {"momentum": 0.9})
    torch.library.opcheck(ops.adam_, (w, g, backup, m, v, steps, lr))


@pytest.mark.parametrize("kind", ["zeros without memory", "negated view", "two tensors"])
def test_gradients_without_memory_of_their_own(kind):
    w, g = tensors(F32, "cpu", (3, 5)), tensors(F32, "cpu", (3, 5))
    backup, lr, one = clones(w), torch.tensor(0.5), torch.ones(2, dtype=F64)
    unusual = [KINDS[kind](x) for x in g]
    expected = [w[i] - 0.5 * (0 if "zeros" in kind else g[i]) for i in range(2)]
    norm, *_ = ops.joint_norm(w, unusual, [0.1] * 2, [1.0] * 2, "sam")
    assert ("zeros" in kind) == (norm == 0)
    if kind == "two tensors":  # whose dispatch unwraps them
        return
    ops.perturb_(w, unusual, backup, one, "sam")
    ops.sgd_(w, unusual, backup, [], lr, skip=torch._efficientzerotensor((1,)))
    assert equal(w, expected)


def test_tensors_without_memory_are_not_written_to():
    w, g, zero = tensors(F32, "cpu", (3,)), tensors(F32, "cpu", (3,)), torch._efficientzerotensor((3,))
    freed, lr = torch.ones(3), torch.tensor(0.1)
    freed.untyped_storage().resize_(0)
    for match, call in (
        ("ZeroTensors are immutable|clone", lambda: ops.restore_([zero], w)),
        ("ZeroTensors are immutable|clone", lambda: ops.sgd_(w, g, [], [zero], lr, momentum=0.9)),
        ("no memory", lambda: ops.restore_([freed], w)),
        (r"of shape \[3\] has no memory.*allocate it", lambda: ops.sgd_(w, [freed], [], [], lr)),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_operators_refuse_bad_input():
    w, g = tensors(F32, "cpu", (3, 5)), tensors(F32, "cpu", (3, 5))
    before, lr, ones = clones(w), torch.tensor(0.1), torch.ones(2, dtype=F64)
    expanded = torch.ones(1).expand(3)
    for error, match, call in (
        (RuntimeError, "shape", lambda: ops.perturb_(w, g[::-1], clones(w), ones, "sam")),
        (RuntimeError, r"in one place .*clone\(\)", lambda: ops.restore_([expanded], [expanded])),
        (ValueError, "unknown variant", lambda: ops.perturb_(w, g, clones(w), ones, "asam")),
        (RuntimeError, "equal lengths", lambda: ops.restore_(w, w[:1])),
        (RuntimeError, "equal lengths", lambda: ops.joint_norm(w, [], [0.1] * 2, [1.0] * 2, "sam")),
        (RuntimeError, "equal lengths", lambda: ops.perturb_(w, g, [], ones, "sam")),
        (RuntimeError, "equal lengths", lambda: ops.sgd_(w, g, [], [], lr, momentum=0.9)),
        (RuntimeError, "step count", lambda: ops.adam_(w, g, [], w, w, [ones[:1]] * 2, lr)),
        (RuntimeError, "a rho", lambda: ops.joint_norm(w, g, [0.1], [1.0, 1.0], "sam")),
        (TypeError, "not for ComplexFloat: use SAM", lambda: ops.restore_([w[0].to(torch.cfloat)], [w[0]])),
        (TypeError, "only float32 gradients", lambda: ops.sgd_(w, [x.half() for x in g], [], [], lr)),
        (TypeError, "a state tensor is", lambda: ops.sgd_(w, g, [], [x.half() for x in g], lr, momentum=0.9)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert equal(w, before)

"""The fused optimizer and its kernels: against the reference, against float64, and bit for bit where that is due."""

import contextlib
import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mup2_fused
import mup2_ref
from mup2_fused import verify

ops = torch.ops.mup2
VARIANTS = mup2_ref.VARIANTS
CHUNK = mup2_fused._C.chunk
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 255, 257, 1023, 1024, 1025, 2049, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (F64, F32), (BF16, F32), (F16, F32)]  # weight, gradient
TYPE_IDS = [f"{w}-{g}".replace("torch.", "") for w, g in TYPES]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


def tensors(dtype, device, sizes=SIZES, scale=1.0, offset=0):
    """Random tensors, each `offset` elements into an allocation of its own."""
    return [(scale * torch.randn(n + offset, dtype=F64)).to(device, dtype)[offset:] for n in sizes]


def bits(t):
    return t.detach().reshape(-1).contiguous().view(torch.uint8)


def equal(xs, ys):
    return len(xs) == len(ys) and all(torch.equal(bits(x), bits(y)) for x, y in zip(xs, ys))


def assert_as_accurate(fused, reference, exact):
    """Error against float64 at most twice that of the reference in the same dtype, plus one unit in the last place."""
    error, bound = verify.error_and_bound(fused, reference, exact)
    assert error <= bound


def set_gradients(params, dtype=None):
    for p in params:
        g = torch.randn(p.shape, dtype=F64).to(p.device, dtype or p.dtype)
        if g.dtype != p.dtype:
            p.grad_dtype = None  # torch allows gradients of another type only when told
        p.grad = g


needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no gradients of another type than their parameter"
)

# ------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_norm(device, types, variant, offset):
    w, g = tensors(types[0], device, offset=offset), tensors(types[1], device, offset=offset)
    scalings = [0.5 + 0.1 * i for i in range(len(w))]
    rhos = [0.1 * i for i in range(len(w))]
    norm, coefficients, norms, nonfinite = ops.joint_norm(w, g, rhos, scalings, variant)
    expected = [mup2_ref.joint_norm([(a, b, s)], variant) for a, b, s in zip(w, g, scalings)]
    joint = mup2_ref.joint_norm(list(zip(w, g, scalings)), variant)
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-13, atol=0)
    torch.testing.assert_close(norm, joint, rtol=1e-13, atol=0)
    T = [mup2_ref.normalizer(a.double(), variant) if variant == "layerwise" else 1 for a in w]
    c = torch.stack([torch.as_tensor(r * t**2 / (joint + 1e-12)).to(joint) for r, t in zip(rhos, T)])
    torch.testing.assert_close(coefficients, c, rtol=1e-13, atol=0)
    assert nonfinite.item() == 0
    again = ops.joint_norm(w, g, rhos, scalings, variant)
    assert equal([norm, coefficients, norms], again[:3]), "the same bits every time"
    if offset:
        aligned = ops.joint_norm([x.clone() for x in w], [x.clone() for x in g], rhos, scalings, variant)
        assert equal(again, aligned)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_perturb_and_restore(device, types, variant, offset):
    w, g = tensors(types[0], device, offset=offset), tensors(types[1], device, offset=offset)
    before, gradients = [x.clone() for x in w], [x.clone() for x in g]
    backup = [torch.full_like(x, math.nan) for x in w]
    coefficients = torch.linspace(0, 0.3, len(w), dtype=F64, device=device)
    ops.perturb_(w, g, backup, coefficients, variant)
    assert equal(backup, before) and equal(g, gradients)
    assert equal(w[:1], before[:1]), "coefficient 0"
    base = "elementwise" if variant == "elementwise" else "sam"  # layerwise: T² is in the coefficient
    reference, exact = [x.clone() for x in before], [x.double().clone() for x in before]
    for i, c in enumerate(coefficients):
        mup2_ref.perturb_(reference[i], g[i], c, base)
        mup2_ref.perturb_(exact[i], g[i].double(), c, base)
    assert equal(w[1:], reference[1:]) or types == (F64, F32)  # where the reference multiplies in float32
    assert_as_accurate(w, reference, exact)
    ops.restore_(w, backup)
    assert equal(w, before)


def torch_update(optimizer, w, g, steps, **kwargs):
    """Weights and moments of torch.optim after a few steps with the same gradients."""
    params = [nn.Parameter(x.clone()) for x in w]
    opt = optimizer(params, foreach=False, **kwargs)
    for _ in range(steps):
        for p, x in zip(params, g):
            p.grad = x.to(p.dtype)
        opt.step()
    return [p.detach() for p in params], [opt.state[p] for p in params]


SGD_OPTIONS = [
    dict(),
    dict(weight_decay=0.1),
    dict(momentum=0.9),
    dict(momentum=0.9, weight_decay=0.1, nesterov=True),
    dict(momentum=0.9, dampening=0.5, maximize=True),
]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_sgd(device, types, options, offset):
    w, g = tensors(types[0], device, offset=offset), tensors(types[1], device, offset=offset)
    start, lr = [x.clone() for x in w], torch.tensor(0.01, dtype=F64)
    momentum = [torch.zeros_like(x) for x in w] if "momentum" in options else []
    for i in range(3):
        backup = [x.clone() for x in w]
        for x in w:
            x.fill_(math.nan)  # they are read from the backup
        ops.sgd_(w, g, backup, momentum, lr, first=i == 0, **options)
    reference, state = torch_update(torch.optim.SGD, start, g, 3, lr=0.01, **options)
    exact, exact_state = torch_update(torch.optim.SGD, [x.double() for x in start], g, 3, lr=0.01, **options)
    assert_as_accurate(w, reference, exact)
    if momentum:
        buffers = [[s["momentum_buffer"] for s in states] for states in (state, exact_state)]
        assert_as_accurate(momentum, *buffers)
        assert all(not equal([m], [torch.zeros_like(m)]) for m in momentum)
    if device == "cpu" and types == (F32, F32) and mup2_fused.instruction_set != "baseline":
        assert equal(w, reference), "torch's own kernels round as ours"


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("options", [dict(weight_decay=0.0), dict(weight_decay=0.1), dict(maximize=True)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_adam(device, types, decoupled, options, offset):
    w, g = tensors(types[0], device, offset=offset), tensors(types[1], device, offset=offset)
    options = {"weight_decay": 0.01} | options
    start, lr = [x.clone() for x in w], torch.tensor(0.01, dtype=F64)
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in w]
    for _ in range(3):
        backup = [x.clone() for x in w]
        for x in w:
            x.fill_(math.nan)
        ops.adam_(w, g, backup, m, v, steps, lr, eps=1e-4, decoupled=decoupled, **options)
    assert all(s.item() == 3 for s in steps)
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference, state = torch_update(optimizer, start, g, 3, lr=0.01, eps=1e-4, **options)
    exact, exact_state = torch_update(optimizer, [x.double() for x in start], g, 3, lr=0.01, eps=1e-4, **options)
    assert_as_accurate(w, reference, exact)
    for ours, key in ((m, "exp_avg"), (v, "exp_avg_sq")):
        assert_as_accurate(ours, [s[key] for s in state], [s[key] for s in exact_state])


def test_an_update_without_backup_starts_from_the_weights(device):
    w, g = tensors(F32, device), tensors(F32, device)
    before = [x.clone() for x in w]
    ops.sgd_(w, g, [], [], torch.tensor(0.5))
    assert equal(w, [x - 0.5 * y for x, y in zip(before, g)])


@pytest.mark.parametrize("skip", [0, 1])
def test_the_skip_flag_only_restores(device, skip):
    w, g, m = (tensors(F32, device) for _ in range(3))
    backup, momentum = [x + 1 for x in w], [x.clone() for x in m]
    flag = torch.tensor([skip], dtype=torch.int32, device=device)
    ops.sgd_(w, g, backup, m, torch.tensor(0.5), momentum=0.9, skip=flag)
    assert equal(w, backup) == equal(m, momentum) == bool(skip)


def test_numbers_of_16_bits(device):
    """Every float16 and bfloat16 survives, and float32 values round to them as torch rounds."""
    lr, zero = torch.tensor(-1.0), torch.zeros
    for dtype in (F16, BF16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
        every = every[~every.isnan()]
        w = every.clone()
        ops.sgd_([w], [zero(len(w), device=device)], [], [], lr)
        assert torch.equal(w, every)  # but for the sign of 0
        halfway = every[every.isfinite()].float()
        x = torch.cat([halfway, halfway * (1 + 2**-11), halfway * (1 + 3 * 2**-12), halfway * (1 + 2**-9)])
        x = torch.cat(
            [
                x,
                torch.randn(10**5, device=device).exp() * 1e-5,
                torch.tensor([65519.9, 65520.0, -1e38, 1e-9]).to(device),
            ]
        )
        w = zero(len(x), dtype=dtype, device=device)
        ops.sgd_([w], [x], [], [], lr)
        assert torch.equal(w, x.to(dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_operators_pass_opcheck(device, variant):
    w, g, m, v = ([torch.rand(n, device=device) for n in (3, 0, 1025)] for _ in range(4))
    backup, steps = [x.clone() for x in w], [torch.ones((), device=device) for _ in w]
    lr = torch.tensor(0.1)
    torch.library.opcheck(ops.joint_norm, (w, g, [0.1] * 3, [1.0] * 3, variant))
    torch.library.opcheck(ops.perturb_, (w, g, backup, torch.full((3,), 0.1, dtype=F64, device=device), variant))
    torch.library.opcheck(ops.restore_, (w, backup))
    torch.library.opcheck(ops.sgd_, (w, g, backup, m, lr), {"momentum": 0.9})
    torch.library.opcheck(ops.adam_, (w, g, backup, m, v, steps, lr))


def test_operators_in_a_compiled_function(device):
    def step(w, g1, g2, m, lr):
        _norm, c, _norms, nonfinite = ops.joint_norm(w, g1, [0.1] * len(w), [1.0] * len(w), "sam")
        backup = [torch.empty_like(x) for x in w]
        ops.perturb_(w, g1, backup, c, "sam")
        moved = [x.clone() for x in w]
        ops.sgd_(w, g2, backup, m, lr, momentum=0.9, skip=nonfinite)
        return moved

    arguments = [tensors(F32, device, (3, 1025)) for _ in range(4)] + [torch.tensor(0.1)]
    twin = copy.deepcopy(arguments)
    moved = step(*arguments)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*twin)
    assert equal(moved, compiled) and equal(arguments[0], twin[0]) and equal(arguments[3], twin[3])


def test_operators_bump_versions(device):
    w, g, m = (tensors(F32, device, (3, 5)) for _ in range(3))
    backup = [x.clone() for x in w]
    for call in (
        lambda: ops.perturb_(w, g, backup, torch.ones(2, dtype=F64, device=device), "sam"),
        lambda: ops.restore_(w, backup),
        lambda: ops.sgd_(w, g, backup, m, torch.tensor(0.1), momentum=0.9),
    ):
        versions = [x._version for x in w]
        call()
        assert all(x._version > v for x, v in zip(w, versions))


def test_operators_refuse_bad_input():
    w, g = tensors(F32, "cpu", (3, 5)), tensors(F32, "cpu", (3, 5))
    before = [x.clone() for x in w]
    ones = torch.ones(2, dtype=F64)
    for error, match, call in (
        (RuntimeError, "shape", lambda: ops.perturb_(w, g[::-1], [x.clone() for x in w], ones, "sam")),
        (ValueError, "unknown variant", lambda: ops.perturb_(w, g, [x.clone() for x in w], ones, "asam")),
        (RuntimeError, "equal lengths", lambda: ops.restore_(w, w[:1])),
        (RuntimeError, "equal lengths", lambda: ops.joint_norm(w, [], [0.1] * 2, [1.0] * 2, "sam")),
        (RuntimeError, "equal lengths", lambda: ops.perturb_(w, g, [], ones, "sam")),
        (RuntimeError, "equal lengths", lambda: ops.sgd_(w, g, [], [], torch.tensor(0.1), momentum=0.9)),
        (RuntimeError, "step count", lambda: ops.adam_(w, g, [], w, w, [ones[:1]] * 2, torch.tensor(0.1))),
        (RuntimeError, "a rho", lambda: ops.joint_norm(w, g, [0.1], [1.0, 1.0], "sam")),
        (TypeError, "float32, float64, bfloat16 and float16", lambda: ops.restore_([w[0].to(torch.cfloat)], [w[0]])),
        (TypeError, "a gradient is", lambda: ops.sgd_(w, [x.half() for x in g], [], [], torch.tensor(0.1))),
    ):
        with pytest.raises(error, match=match):
            call()
    assert equal(w, before)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**31 + 5, 2**33 + 8191])
def test_the_walk_over_tensors_beyond_2_to_the_31(size):
    """Index arithmetic of every kernel, without the memory: chunk by chunk, nothing twice, nothing left out."""
    sizes = [5, size, 7 * CHUNK + 1, 0, 3]
    starts = [0, 1, 1 + -(-size // CHUNK), 9 + -(-size // CHUNK), 9 + -(-size // CHUNK)]
    last = starts[2] - 1
    found = mup2_fused._C.walk(sizes, [0, 1, 2, last - 1, last, starts[2], starts[2] + 7, starts[4]])
    assert found == [
        (0, 0, 5),
        (1, 0, CHUNK),
        (1, CHUNK, CHUNK),
        (1, (last - 2) * CHUNK, CHUNK),
        (1, (last - 1) * CHUNK, size - (last - 1) * CHUNK),
        (2, 0, CHUNK),
        (2, 7 * CHUNK, 1),
        (4, 0, 3),
    ]


def test_the_walk_over_many_tensors_covers_each_element_once():
    sizes = [1 + (i * 37) % (2 * CHUNK) for i in range(3000)]
    chunks = sum(-(-n // CHUNK) for n in sizes)
    found = mup2_fused._C.walk(sizes, list(range(chunks)))
    assert [sum(n for t, _, n in found if t == i) for i in range(0, 3000, 500)] == sizes[::500]
    assert sum(n for _, _, n in found) == sum(sizes) and len(found) == chunks
    assert all(mup2_fused._C.walk(sizes, [chunk]) == [found[chunk]] for chunk in range(0, chunks, 97))


# ------------------------------------------------------------------------------------------------ determinism


STEP = """
import torch, mup2_fused, hashlib
torch.manual_seed(0)
torch.set_num_threads({threads})
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for variant in ("sam", "elementwise", "layerwise"):
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (3, 100_003, 40_000, 8192)]
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        opt = mup2_fused.SAM(params, rho=0.1, variant=variant, lr=0.1)
        opt.first_step()
        climbed = [p.detach().double().clone() for p in params]
        opt.second_step()
        updated = [p.detach().double() for p in params] if {update} else []
        print(opt._plan.norms(), *(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in climbed + updated))
"""


def run_step(threads, instruction_set, update):
    environment = os.environ | {"MUP2_CPU": instruction_set, "PYTHONPATH": str(ROOT)}
    script = STEP.format(threads=threads, update=update)
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_same_bits_for_any_number_of_threads():
    one, two, five = (run_step(n, "", True) for n in (1, 2, 5))
    assert one == two == five and "nan" not in one


def test_norm_and_perturbation_have_the_same_bits_on_any_cpu():
    """Updates have them on all processors with FMA, where torch's own have them."""
    baseline, avx2, best = (run_step(1, name, False) for name in ("baseline", "avx2", ""))
    assert baseline == avx2 == best


def test_unknown_instruction_set():
    failed = subprocess.run(
        [sys.executable, "-c", "import mup2_fused"],
        env=os.environ | {"MUP2_CPU": "neon", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode and "MUP2_CPU is baseline, avx2 or avx512" in failed.stderr


# ------------------------------------------------------------------------------------------------ the optimizer

BASES = [
    (torch.optim.SGD, dict(lr=0.01)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9, dampening=0.5, maximize=True)),
    (torch.optim.Adam, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),
    (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),
    (torch.optim.RMSprop, dict(lr=0.01, eps=1e-4)),
]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_verify(device, dtype):
    """What `python -m mup2_fused.verify` runs."""
    model = verify.Odd().to(device, dtype)
    for variant in VARIANTS:
        for base in verify.BASES:
            for row in verify.verify(model, verify.smooth, variant, base):
                assert row.passed, row
                if dtype == F32 and base == "sgd" and device == "cpu" and mup2_fused.instruction_set != "baseline":
                    assert row.error == 0 or row.check == "norm", "equal to the reference bit for bit"


def test_verify_fails_when_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(mup2_fused.SAM, "restore", lambda self: setattr(self, "_backup", None))
    assert verify.main([]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_takes_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Linear(3, 2), lambda m: m(torch.ones(1, 3)).square().sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert verify.main(["--model", "mine:net"]) == 0
    assert "mine:net" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="module:name"):
        verify.main(["--model", "mine"])
    with pytest.raises(SystemExit, match="must be importable from here"):
        verify.main(["--model", "mine:absent"])


def quadratic(params):
    return sum(((p - 0.3) ** 4).sum() + p.sin().sum() for p in params)


def twenty_steps(SAM, base, kwargs, variant, params, steps=20):
    """Mixed dtypes, groups with their own factors, gradients that come and go."""
    groups = [
        {"params": params[:2], "rho": 0.2, "lr": 0.02},
        {"params": params[2:4], "gradnorm_scaling": 3.0},
        {"params": params[4:], "perturb": False},
    ]
    opt = SAM(groups, base, rho=0.1, variant=variant, **kwargs)
    for i in range(steps):
        for _ in range(2):
            opt.zero_grad()
            quadratic(params).backward()
            if i % 3 == 1:
                params[i % len(params)].grad = None
            if opt._backup is None:
                opt.first_step()
        opt.second_step()
    return opt


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base, kwargs", BASES, ids=lambda x: getattr(x, "__name__", None))
def test_trajectory_of_20_steps(device, base, kwargs, variant):
    shapes, types = [(300, 40), (7,), (20_001,), (3, 5, 2), (50,)], [F32, F64, F32, F32, F32]
    params = [(0.3 * torch.randn(s, dtype=F64)).to(device, t) for s, t in zip(shapes, types)]
    runs = []
    for SAM, dtype in ((mup2_fused.SAM, None), (mup2_ref.SAM, None), (mup2_ref.SAM, F64)):
        own = [nn.Parameter(p.clone() if dtype is None else p.to(dtype)) for p in params]
        opt = twenty_steps(SAM, base, kwargs, variant, own)
        moments = [x for p in own for x in opt.state[p].values() if torch.is_tensor(x) and x.shape == p.shape]
        runs.append([[p.detach() for p in own[::2]], [p.detach() for p in own[1::2]], moments])
    for fused, reference, exact in zip(*runs):
        error, bound = verify.error_and_bound(fused, reference, exact, steps=20)
        assert error <= max(bound, 1e-13)


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
def test_float32_gradients_of_other_parameters(device, dtype):
    params = [nn.Parameter(x) for x in tensors(dtype, device)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    set_gradients(params, F32)
    for p, q in zip(params, twins):
        q.grad_dtype = None
        q.grad = p.grad.clone()
    a, b = mup2_fused.SAM(params, rho=0.5, lr=0.1), mup2_ref.SAM(twins, rho=0.5, lr=0.1)
    a.first_step(), b.first_step()
    if dtype == F64:  # the reference multiplies in the gradient's float32
        torch.testing.assert_close(params, twins, rtol=1e-7, atol=1e-8)
    else:
        assert equal(params, twins)
    before = [w.clone() for _, w in a._backup]
    a.second_step()
    for p, w in zip(params, before):
        torch.testing.assert_close(p.double(), w.double() - 0.1 * p.grad.double(), rtol=1e-2, atol=1e-2)


LAYOUTS = {
    "channels_last": lambda: torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(70, 130).t(),
    "strided": lambda: torch.randn(33, 64)[:, ::2],
    "expanded gap": lambda: torch.randn(33, 64)[:, 3:40],
    "size one": lambda: torch.randn(5, 1, 7).transpose(0, 1),
    "scalar": lambda: torch.randn(()),
}


@pytest.mark.parametrize("gradient_like", ["parameter", "contiguous", "other"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base, kwargs", BASES[1:4:2], ids=lambda x: getattr(x, "__name__", None))
def test_layouts(device, base, kwargs, layout, gradient_like):
    """Elements are paired by index, not by address; parameters keep address and strides."""
    start = LAYOUTS[layout]().to(device)
    weights = [start.as_strided(start.shape, start.stride()), torch.randn(10, device=device)]
    mine = [nn.Parameter(torch.empty_strided(w.shape, w.stride(), device=device).copy_(w)) for w in weights]
    theirs = [nn.Parameter(w.detach().clone()) for w in weights]
    a, b = mup2_fused.SAM(mine, base, rho=0.5, **kwargs), mup2_ref.SAM(theirs, base, rho=0.5, **kwargs)
    address, strides = mine[0].data_ptr(), mine[0].stride()
    for _ in range(3):
        for first in (True, False):
            for p, q in zip(mine, theirs):
                g = torch.randn(p.shape).to(device)
                if gradient_like == "parameter":
                    g = torch.empty_strided(p.shape, p.stride(), device=device).copy_(g)
                elif gradient_like == "other" and g.ndim > 1:
                    g = g.transpose(0, -1).contiguous().transpose(0, -1)
                p.grad, q.grad = g.clone(memory_format=torch.preserve_format), g.clone()
            gradients = [p.grad.clone() for p in mine]
            for opt in (a, b):
                opt.first_step() if first else opt.second_step()
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
            assert equal([p.grad for p in mine], gradients)
    assert (mine[0].data_ptr(), mine[0].stride()) == (address, strides)


def test_gradients_packed_without_padding(device):
    """As DistributedDataParallel's gradient_as_bucket_view has them: no address is a multiple of 16 bytes."""
    params = [nn.Parameter(x) for x in tensors(F32, device, (5, 3, 1027, 9000))]
    bucket = torch.randn(1 + sum(p.numel() for p in params), device=device)
    views = bucket[1:].split([p.numel() for p in params])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q, g in zip(params, twins, views):
        p.grad, q.grad = g, g.clone()
    a, b = (SAM(x, rho=0.5, lr=0.1, momentum=0.9) for SAM, x in ((mup2_fused.SAM, params), (mup2_fused.SAM, twins)))
    for opt in (a, b):
        opt.first_step()
        opt.second_step()
    assert equal(params, twins)


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(0, 40), max_size=3),
            st.sampled_from([F32, F64, BF16, F16]),
            st.sampled_from(["both", "first", "second"]),
            st.booleans(),  # permuted
        ),
        min_size=1,
        max_size=6,
    ),
    variant=st.sampled_from(VARIANTS),
    base=st.sampled_from(BASES),
    seed=st.integers(0, 1000),
)
def test_any_tensors(shapes, variant, base, seed):
    torch.manual_seed(seed)
    starts = []
    for shape, dtype, _, permuted in shapes:
        w = torch.randn(shape, dtype=F64).to(dtype)
        starts.append(w.permute(tuple(reversed(range(w.ndim)))) if permuted else w)
    runs = []
    for SAM, dtype in ((mup2_fused.SAM, None), (mup2_ref.SAM, None), (mup2_ref.SAM, F64)):
        params = [nn.Parameter(w.detach().clone() if dtype is None else w.to(dtype)) for w in starts]
        opt = SAM(params, base[0], rho=0.3, variant=variant, **base[1])
        torch.manual_seed(seed)
        for which in ("first", "second") * 3:
            for p, (_, stored, when, _) in zip(params, shapes):
                p.grad = torch.randn(p.shape, dtype=F64).to(stored).to(p.dtype) if when in (which, "both") else None
            opt.first_step() if which == "first" else opt.second_step()
        runs.append([[p.detach()] for p in params])
    for fused, reference, exact in zip(*runs):
        if not exact[0].isfinite().all() or not reference[0].isfinite().all():
            continue
        error, bound = verify.error_and_bound(fused, reference, exact, steps=8)
        assert error <= bound + 8 * torch.finfo(fused[0].dtype).eps


@pytest.mark.parametrize("base, kwargs", [BASES[1], BASES[4]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("source, target", [("fused", "reference"), ("reference", "fused")])
def test_a_state_saved_by_one_loads_in_the_other(device, base, kwargs, source, target):
    kinds = {"fused": mup2_fused.SAM, "reference": mup2_ref.SAM}
    params = [nn.Parameter(x) for x in tensors(F32, device, (5, 2000), 0.3)]
    opt = kinds[source](params, base, rho=0.1, **kwargs)
    step = lambda o, ps: o.step(lambda: (o.zero_grad(), quadratic(ps).backward()))
    for _ in range(3):
        step(opt, params)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = kinds[target](twins, base, rho=0.9, lr=1.0)
    state = copy.deepcopy(opt.state_dict())
    for own in state["state"].values():
        assert own.get("step", torch.zeros(())).device.type == "cpu", "as torch saves it"
    other.load_state_dict(state)
    for _ in range(3):
        step(opt, params)
        step(other, twins)
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for key in opt.state[p]:
            torch.testing.assert_close(opt.state[p][key].cpu(), other.state[q][key].cpu(), rtol=1e-5, atol=1e-7)


def test_replaced_state_is_used():
    """A user may reset or replace moments; no pointer to an old one may survive."""
    params = [nn.Parameter(torch.randn(9)) for _ in range(3)]
    opt = mup2_fused.SAM(params, rho=0.1, lr=0.1, momentum=0.9)
    set_gradients(params)
    opt.first_step(), opt.second_step()
    opt.state[params[1]]["momentum_buffer"] = torch.full((9,), 100.0)
    del opt.state[params[2]]
    before = [p.detach().clone() for p in params]
    opt.first_step(), opt.second_step()
    assert (before[1] - params[1] > 8.5).all()
    torch.testing.assert_close(params[2].detach(), before[2] - 0.1 * params[2].grad)


def test_hooks_and_subclasses_of_the_base_optimizer_run():
    class Mine(torch.optim.SGD):
        def step(self, closure=None):
            calls.append("mine")
            return super().step(closure)

    calls, params = [], [nn.Parameter(torch.randn(5))]
    for base in (Mine, torch.optim.SGD):
        opt = mup2_fused.SAM(params, base, rho=0.1, lr=0.1)
        if base is torch.optim.SGD:
            opt.base_optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
        set_gradients(params)
        opt.first_step(), opt.second_step()
    assert calls == ["mine", "hook"]


def test_groups_that_change_between_the_passes():
    params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
    before = [p.detach().clone() for p in params]
    opt = mup2_fused.SAM(params, rho=0.1, lr=0.0)
    set_gradients(params)
    opt.first_step()
    opt.param_groups[0]["params"] = params[::-1]
    opt.add_param_group({"params": [nn.Parameter(torch.randn(4))]})
    opt.second_step()
    assert equal(params, before)


def test_dampening_after_a_skipped_first_update(device):
    """The first momentum is the whole gradient, also if a step before it was skipped or a state was loaded."""
    for SAM in (mup2_fused.SAM, mup2_ref.SAM):
        params = [nn.Parameter(torch.zeros(5, device=device))]
        opt = SAM(params, rho=0.1, lr=1.0, momentum=0.9, dampening=0.5)
        empty = copy.deepcopy(opt.state_dict())
        for value in (math.nan, 1.0, 1.0):
            params[0].grad = torch.full((5,), value, device=device)
            opt.first_step()
            opt.second_step()
            opt = copy.deepcopy(opt)
            params = opt.param_groups[0]["params"]
        assert opt.skipped_steps == 1
        torch.testing.assert_close(params[0].detach(), torch.full((5,), -1.0 - 1.4, device=device))
        opt.load_state_dict(empty)
        params[0].grad = torch.ones(5, device=device)
        opt.first_step()
        opt.second_step()
        assert torch.equal(opt.state[params[0]]["momentum_buffer"], torch.ones(5, device=device))


@pytest.mark.parametrize("how", ["the same memory", "twice in a group", "overlapping"])
def test_parameters_that_share_memory(SAM, how):
    """Every backup is of the weights before the first perturbation."""
    memory = torch.arange(1.0, 12.0)
    a = nn.Parameter(memory[:8])
    b = {"the same memory": nn.Parameter(a.data), "twice in a group": a, "overlapping": nn.Parameter(memory[5:])}[how]
    before = memory.clone()
    with pytest.warns() if a is b else contextlib.nullcontext():
        opt = SAM([a, b], rho=0.5, lr=0.1)
    for _ in range(2):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        opt.first_step()
        assert not torch.equal(memory, before)
        opt.restore()
        assert torch.equal(memory, before)


@pytest.mark.parametrize("at_first", ["apart", "overlapping"])
def test_parameters_that_move(SAM, at_first):
    """Whether they share memory is found again when they lie elsewhere, in both passes."""
    memory = torch.zeros(11)
    places = {"apart": (torch.zeros(8), torch.zeros(6)), "overlapping": (memory[:8], memory[5:])}
    a, b = map(nn.Parameter, places[at_first])
    opt = SAM([a, b], rho=0.5, lr=1.0)
    for place in (at_first, *(places.keys() - {at_first})):
        a.data, b.data = places[place]
        before = [t.clone() for t in (a.data, b.data)]
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        opt.first_step()
        assert not torch.equal(a, before[0])
        opt.second_step()
        twice = torch.tensor([1.0] * 5 + [2.0] * 3) if place == "overlapping" else 1
        assert torch.equal(a, before[0] - twice), place


def test_parameters_that_share_memory_and_are_not_perturbed(SAM):
    """They are updated one after the other, as by torch."""
    memory = torch.zeros(3 * CHUNK)
    a, b = nn.Parameter(memory), nn.Parameter(memory)
    opt = SAM([{"params": [a, b], "perturb": False}], lr=1.0)
    for p in (a, b):
        p.grad = torch.ones_like(p)
    opt.first_step(), opt.second_step()
    assert (memory == -2).all()


def test_elements_that_share_memory_are_refused_and_nothing_stays_perturbed(SAM):
    a, b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1).expand(3))
    before = [a.detach().clone(), b.detach().clone()]
    opt = SAM([a, b], rho=0.5, lr=0.1)
    set_gradients([a, b])
    with pytest.raises(RuntimeError):
        opt.first_step()
    assert equal([a, b], before)


def test_an_interrupt_in_a_step_leaves_the_weights_restored(monkeypatch):
    """Python raises KeyboardInterrupt between two instructions: here, right after the compiled part."""

    class Interrupted(mup2_fused._C.Plan):
        def climb(self, *args):
            super().climb(*args)
            raise KeyboardInterrupt

    params = [nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in params]
    opt = mup2_fused.SAM(params, rho=0.5, lr=0.1)
    opt._plan = Interrupted()
    set_gradients(params)
    with pytest.raises(KeyboardInterrupt):
        opt.first_step()
    assert equal(params, before) and opt._backup is None


def test_gradients_that_are_lazily_negated(SAM):
    w = nn.Parameter(torch.zeros(3))
    w.grad = torch._neg_view(torch.ones(3))
    opt = SAM([w], rho=1.0, lr=0.1)
    opt.first_step()
    assert (w < 0).all()
    opt.second_step()
    assert torch.allclose(w, torch.full((3,), 0.1))


def test_a_learning_rate_of_numpy(SAM):
    params = [nn.Parameter(torch.randn(5))]
    before = params[0].detach().clone()
    opt = SAM(params, rho=0.1, lr=0.1)
    opt.param_groups[0]["lr"] = np.float32(0.5)
    set_gradients(params)
    opt.first_step(), opt.second_step()
    torch.testing.assert_close(params[0].detach(), before - 0.5 * params[0].grad)


def test_gradients_are_unscaled_in_skipped_steps_too(SAM):
    params = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(0))]
    opt, scaler = SAM(params, torch.optim.AdamW, rho=0.1, lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_gradients(params)
    opt.first_step()
    params[0].grad.fill_(8.0)[0, 0] = math.inf
    scaler.step(opt)
    assert (params[0].grad.flatten()[1:] == 1).all() and opt.skipped_steps == 1
    opt.first_step(), opt.restore()


def test_a_patched_base_optimizer_is_called(SAM):
    params, calls = [nn.Parameter(torch.randn(5))], []
    opt = SAM(params, rho=0.1, lr=0.1)
    opt.base_optimizer.step = lambda: calls.append(1)
    set_gradients(params)
    opt.first_step(), opt.second_step()
    assert calls == [1]


def test_missing_hyperparameters_and_state_raise(SAM):
    params = [nn.Parameter(torch.randn(5))]
    before = [p.detach().clone() for p in params]
    opt = SAM(params, torch.optim.AdamW, rho=0.1, lr=0.0, weight_decay=0.0)
    set_gradients(params)
    opt.first_step(), opt.second_step()
    del opt.state[params[0]]["step"]
    opt.first_step()
    with pytest.raises((KeyError, TypeError)):
        opt.second_step()
    del opt.param_groups[0]["lr"]
    opt.first_step()
    with pytest.raises(KeyError):
        opt.second_step()
    assert equal(params, before)


def test_more_groups_than_a_launch_holds(device):
    params = [nn.Parameter(torch.randn(3, device=device)) for _ in range(100)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    groups = lambda ps: [{"params": [p], "lr": 0.001 * i, "rho": 0.01 * i} for i, p in enumerate(ps, 1)]
    a, b = mup2_fused.SAM(groups(params), momentum=0.9), mup2_ref.SAM(groups(twins), momentum=0.9)
    for opt, ps in ((a, params), (b, twins)):
        for _ in range(3):
            opt.step(lambda o=opt, p=ps: (o.zero_grad(), quadratic(p).backward()))
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)


def test_more_tensors_than_a_launch_holds(device):
    params = [nn.Parameter(torch.randn(1 + i % 7, device=device)) for i in range(2500)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    for base, kwargs in (BASES[1], BASES[4]):
        a, b = mup2_fused.SAM(params, base, rho=0.5, **kwargs), mup2_ref.SAM(twins, base, rho=0.5, **kwargs)
        for opt, ps in ((a, params), (b, twins)):
            opt.step(lambda o=opt, p=ps: (o.zero_grad(), quadratic(p).backward()))
        torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)


def test_unsupported_parameters_say_what_to_do():
    w = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    opt = mup2_fused.SAM([w], lr=0.1)
    w.grad = torch.randn(3, dtype=torch.cfloat)
    with pytest.raises(RuntimeError, match="view_as_real"):
        opt.first_step()
    p = nn.Parameter(torch.randn(3, device="meta"))
    p.grad = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match=r"runs on the CPU and on CUDA, not on meta; mup2_ref\.SAM"):
        mup2_fused.SAM([p], lr=0.1).first_step()


def test_parameters_of_other_types_are_left_to_the_base_optimizer():
    """Complex weights outside of the perturbation, as in the reference."""
    a, w = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, dtype=torch.cfloat))
    opt = mup2_fused.SAM([{"params": [a]}, {"params": [w], "perturb": False}], rho=0.1, lr=0.1)
    before = w.detach().clone()
    a.grad, w.grad = torch.randn(4), torch.ones(3, dtype=torch.cfloat)
    opt.first_step(), opt.second_step()
    torch.testing.assert_close(w.detach(), before - 0.1)


def test_an_error_in_the_update_leaves_the_weights_restored():
    params = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    opt = mup2_fused.SAM(params, rho=0.1, lr=0.1, momentum=0.9)
    set_gradients(params)
    opt.first_step()
    opt.state[params[1]]["momentum_buffer"] = torch.zeros(5, dtype=F64)
    with pytest.raises(TypeError, match="a state tensor is"):
        opt.second_step()
    assert equal(params, before)


def test_missing_extension_says_how_to_build(tmp_path):
    package = tmp_path / "mup2_fused"
    package.mkdir()
    (package / "__init__.py").write_bytes((ROOT / "mup2_fused" / "__init__.py").read_bytes())
    failed = subprocess.run(
        [  # without the finder of an editable installation, which would supply the missing module
            sys.executable,
            "-c",
            "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; import mup2_fused",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode and "python setup.py build_ext --inplace" in failed.stderr


def test_norms_are_kept_for_diagnosis():
    params = [nn.Parameter(torch.randn(n)) for n in (5, 0, 7)]
    opt = mup2_fused.SAM([{"params": params[:2]}, {"params": params[2:], "gradnorm_scaling": 2.0}], lr=0.1)
    set_gradients(params)
    opt.first_step()
    joint, each = opt._plan.norms()
    assert each == pytest.approx([params[0].grad.norm().item(), 0.0, 2 * params[2].grad.norm().item()])
    assert joint == pytest.approx(math.hypot(*each))

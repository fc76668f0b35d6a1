"""Random configurations and random orders of calls: both backends of the product, and the reference where it can.

MUP2_FUZZ=10000 pytest -m slow tests/kernels/test_fuzz.py tries that many (default 2000). A failure names its seed, and
MUP2_FUZZ_SEED=n pytest tests/kernels/test_fuzz.py -k few tries that seed alone.
"""

import os
import random
from types import SimpleNamespace

import pytest
import torch

import mup2_fused
import mup2_ref

COUNT, FIRST = int(os.environ.get("MUP2_FUZZ", "2000")), int(os.environ.get("MUP2_FUZZ_SEED", "0"))
FEW = 1 if "MUP2_FUZZ_SEED" in os.environ else 200
BATCH = 100  # seeds in one slow test

DTYPES = [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]
BASES = {
    torch.optim.SGD: [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.5, dampening=0.3)],
    torch.optim.Adam: [dict(), dict(amsgrad=True), dict(betas=(0.5, 0.9))],
    torch.optim.AdamW: [dict(eps=1e-4), dict(betas=(0.0, 0.99), eps=1e-3)],
    torch.optim.Adagrad: [dict(eps=1e-4)],
    torch.optim.RMSprop: [dict(eps=1e-4)],
}
CALLS = ["step", "step", "step", "closure", "restore", "perturbed", "state", "lr", "nothing twice"]


def tensor(rng, dtype):
    """Sizes around vector widths, strides of every kind; the generator of torch is seeded by the caller."""
    kind = rng.choice(["plain"] * 3 + ["transposed", "strided", "n x 1", "channels_last", "scalar", "empty"])
    n = rng.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 1023, 1025])
    if kind == "transposed":
        return torch.randn(n, rng.randint(1, 5)).to(dtype).t()
    if kind == "strided":
        return torch.randn(n + 1, 2).to(dtype)[1:, rng.randint(0, 1)]
    if kind == "channels_last":
        return torch.randn(2, 3, rng.randint(1, 5), 4).to(dtype).contiguous(memory_format=torch.channels_last)
    return torch.randn({"scalar": (), "empty": (0, 3), "n x 1": (n, 1)}.get(kind, (n,))).to(dtype)


def configuration(rng):
    """What all sides share. plain: finite gradients and nothing maximized, so that the reference can take part."""
    torch.manual_seed(rng.getrandbits(32))
    base, plain = rng.choice(list(BASES)), rng.random() < 0.5
    # In float16, g² underflows in torch's Adam but not in the kernel, and the quotient is anything.
    dtypes = [d for d in DTYPES if d != torch.float16 or base not in (torch.optim.Adam, torch.optim.AdamW)]
    weights = [tensor(rng, rng.choice(dtypes)) for _ in range(rng.randint(1, 6))]
    order = list(range(len(weights)))
    rng.shuffle(order)
    cut = sorted(rng.choices(range(len(order) + 1), k=rng.randint(0, 2)))
    groups = []  # (positions of weights, options)
    for a, b in zip([0, *cut], [*cut, len(order)]):
        options = dict(rho=rng.choice([0.0, 0.01, 0.3]), gradnorm_scaling=rng.choice([0.5, 1.0, 3.0]))
        options |= dict(perturb=rng.random() < 0.8, lr=rng.choice([0.0, 0.01, 0.1]), weight_decay=rng.choice([0, 0.1]))
        if not plain and rng.random() < 0.3:
            options["maximize"] = True
        groups.append((order[a:b], options))
    c = SimpleNamespace(weights=weights, groups=groups, base=base, options=rng.choice(BASES[base]), plain=plain)
    c.variant, c.skip_nonfinite = rng.choice(mup2_ref.VARIANTS), rng.random() < 0.2
    return c


class Side:
    """One optimizer, with parameters of its own."""

    def __init__(self, backend, c):
        self.params = [torch.nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in c.weights]
        groups = [dict(params=[self.params[i] for i in index]) | settings for index, settings in c.groups if index]
        self.reference = backend is None
        if self.reference:
            self.opt = mup2_ref.SAM(groups, c.base, variant=c.variant, **c.options)
        else:
            own = dict(variant=c.variant, backend=backend, skip_nonfinite=c.skip_nonfinite)
            self.opt = mup2_fused.SAM(groups, c.base, **c.options, **own)
        self.seen = []  # weights whenever gradients are set: at w, and at w + e

    def gradients(self, gs):
        self.seen.append([p.detach().clone() for p in self.params])
        for p, g in zip(self.params, gs):
            p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)

    def run(self, second, fails=False):
        """step(closure), with the first gradients that are set already."""
        passes = [second, [p.grad for p in self.params]]

        def closure():
            self.gradients(passes.pop())
            if fails and not passes:
                raise ZeroDivisionError

        self.seen.pop()
        self.opt.step(closure)

    def call(self, call, second, factor):
        """One call at a time when first gradients are set; second: gradients of the second pass."""
        opt = self.opt
        if call == "step" or (call == "perturbed" and self.reference):
            opt.first_step()
            self.gradients(second)
            opt.second_step()
        elif call == "closure":
            self.run(second)
        elif call == "restore" and self.reference:
            with pytest.raises(ZeroDivisionError):
                self.run(second, fails=True)
        elif call == "restore":
            opt.first_step()
            self.gradients(second)
            opt.restore()
        elif call == "perturbed":
            with opt.perturbed():
                self.gradients(second)
            opt.step()
        elif call == "state":  # as after a checkpoint
            opt.load_state_dict(opt.state_dict())
        elif call == "lr":
            for group in opt.param_groups:
                group["lr"] *= factor
        elif any(group["lr"] for group in opt.param_groups):  # otherwise this may prepare for loading a checkpoint
            with pytest.raises(RuntimeError, match="call first_step"):
                opt.second_step()


def gradients(rng, c):
    def one(w):
        if rng.random() < 0.15:
            return None
        g = torch.randn_like(w) * rng.choice([1.0, 1.0, 1e-3])
        if g.numel() and not c.plain and rng.random() < 0.06:
            g[(0,) * g.ndim] = rng.choice([torch.nan, torch.inf, -torch.inf])
        return g

    return [one(w) for w in c.weights]


def play(rng, c, sides):
    """The same random calls to all sides; returns what was called."""
    calls = [rng.choice(CALLS) for _ in range(rng.randint(1, 6))]
    for call in calls:
        first, second, factor = gradients(rng, c), gradients(rng, c), rng.choice([0.5, 2.0])
        for side in sides:
            side.gradients(first)
            side.call(call, second, factor)
    for side in sides:
        side.gradients([None] * len(c.weights))
    return calls


def same_weights(ours, other, c, calls, about):
    assert len(ours.seen) == len(other.seen), about
    for n, both in enumerate(zip(ours.seen, other.seen)):
        for i, (p, q) in enumerate(zip(*both)):
            # In adaptive variants the norm hands the rounding of one tensor on to all others.
            dtypes = [p.dtype] if c.variant == "sam" else [w.dtype for w in c.weights]
            # Rounding of some steps: the kernels round once where torch does after every operation.
            bound = 40 * len(calls) * max(torch.finfo(dtype).eps for dtype in dtypes)
            close = torch.allclose(p.double(), q.double(), rtol=bound, atol=bound, equal_nan=True)
            assert close, f"{about}: weights {n}, tensor {i} {p.dtype} {tuple(p.shape)}"


def one(seed):
    rng = random.Random(seed)
    c = configuration(rng)
    sides = [Side(backend, c) for backend in ("compiled", "torch", None)[: 2 + c.plain]]
    addresses = [p.data_ptr() for p in sides[0].params]
    calls = play(rng, c, sides)
    about = f"MUP2_FUZZ_SEED={seed}: {c.base.__name__} {c.options} {c.variant} {c.groups} {calls}"
    ours, torchs = sides[:2]
    assert ours.opt.skipped_steps == torchs.opt.skipped_steps, about
    assert addresses == [p.data_ptr() for p in ours.params], about
    for other in sides[1:]:
        same_weights(ours, other, c, calls, about)
    for p, q in zip(torchs.params, ours.params):
        mine, theirs = ours.opt.state[q], torchs.opt.state[p]
        if mine.keys() != theirs.keys():  # the kernels find out on the device that a step is skipped, and so make state
            assert not theirs and not any(x.any() for x in mine.values()), about
    if all(call in ("restore", "state", "lr", "nothing twice") for call in calls):
        assert all(torch.equal(w, q) for w, q in zip(c.weights, ours.params)), about


def test_a_few_configurations():
    for seed in range(FIRST, FIRST + FEW):
        one(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(FEW, COUNT, BATCH))
def test_many_configurations(start):
    for seed in range(start, min(start + BATCH, COUNT)):
        one(seed)

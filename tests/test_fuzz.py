"""Random configurations and random orders of calls: the fused optimizer against the reference.

MUP2_FUZZ=10000 pytest tests/test_fuzz.py tries that many (default 200); a failure names its seed, and MUP2_FUZZ_SEED=n
repeats it alone.
"""

import os
import random

import pytest
import torch

import mup2_fused
import mup2_ref

COUNT, FIRST = int(os.environ.get("MUP2_FUZZ", "200")), int(os.environ.get("MUP2_FUZZ_SEED", "0"))
SEEDS = range(FIRST, FIRST + (1 if "MUP2_FUZZ_SEED" in os.environ else COUNT))
BATCH = 50  # seeds in one test

DTYPES = [torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]
BASES = {
    torch.optim.SGD: [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(momentum=0.5, dampening=0.3)],
    torch.optim.Adam: [dict(), dict(amsgrad=True), dict(betas=(0.5, 0.9))],
    torch.optim.AdamW: [dict(eps=1e-4), dict(betas=(0.0, 0.99), eps=1e-3)],
    torch.optim.Adagrad: [dict()],
    torch.optim.RMSprop: [dict(eps=1e-4)],
}


def tensor(rng, dtype):
    """Sizes around vector widths, strides of every kind; the generator of torch is seeded by the caller."""
    kind = rng.choice(
        ["plain", "plain", "plain", "transposed", "strided", "expanded", "channels_last", "scalar", "empty"]
    )
    n = rng.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 1023, 1025])
    if kind == "transposed":
        return torch.randn(n, rng.randint(1, 5)).to(dtype).t()
    if kind == "strided":
        return torch.randn(n + 1, 2).to(dtype)[1:, rng.randint(0, 1)]
    if kind == "channels_last":
        return torch.randn(2, 3, rng.randint(1, 5), 4).to(dtype).contiguous(memory_format=torch.channels_last)
    return torch.randn({"scalar": (), "empty": (0, 3), "expanded": (n, 1)}.get(kind, (n,))).to(dtype)


def configuration(rng):
    """(weights, groups as index lists with options, base, its options, SAM's options)"""
    torch.manual_seed(rng.getrandbits(32))
    base = rng.choice(list(BASES))
    # In float16, g² underflows in torch's Adam but not in the fused kernel, and the quotient is anything.
    dtypes = [d for d in DTYPES if d != torch.float16 or base not in (torch.optim.Adam, torch.optim.AdamW)]
    weights = [tensor(rng, rng.choice(dtypes)) for _ in range(rng.randint(1, 6))]
    order = list(range(len(weights)))
    rng.shuffle(order)
    cut = sorted(rng.choices(range(len(order) + 1), k=rng.randint(0, 2)))
    groups = []
    for a, b in zip([0, *cut], [*cut, len(order)]):
        options = dict(rho=rng.choice([0.0, 0.01, 0.3]), gradnorm_scaling=rng.choice([0.5, 1.0, 3.0]))
        options |= dict(
            perturb=rng.random() < 0.8, lr=rng.choice([0.0, 0.01, 0.1]), weight_decay=rng.choice([0.0, 0.1])
        )
        if rng.random() < 0.2:
            options["maximize"] = True
        groups.append((order[a:b], options))
    options = rng.choice(BASES[base])
    sam = dict(variant=rng.choice(mup2_ref.VARIANTS), skip_nonfinite=rng.random() < 0.2)
    return weights, groups, base, options, sam


class Side:
    def __init__(self, kind, weights, groups, base, options, sam):
        self.params = [torch.nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in weights]
        made = [dict(params=[self.params[i] for i in index]) | settings for index, settings in groups if index]
        self.opt = kind(made, base, **options, **sam)
        self.seen = []  # weights whenever gradients are set: at w, and at w + e

    def gradients(self, gs):
        self.seen.append([p.detach().clone() for p in self.params])
        for p, g in zip(self.params, gs):
            p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)

    def reload(self):
        """A new state in the same optimizer, as after a checkpoint."""
        self.opt.load_state_dict(self.opt.state_dict())


def gradients(rng, weights):
    def one(w):
        if rng.random() < 0.15:
            return None
        g = torch.randn_like(w) * rng.choice([1.0, 1.0, 1e-3])
        if g.numel() and rng.random() < 0.03:
            g[(0,) * g.ndim] = rng.choice([torch.nan, torch.inf, -torch.inf])
        return g

    return [one(w) for w in weights]


def play(rng, weights, sides):
    """The same random calls to both sides; returns what was called."""
    calls = []
    for _ in range(rng.randint(1, 6)):
        call = rng.choice(["step", "step", "step", "closure", "restore", "perturbed", "state", "lr", "nothing twice"])
        calls.append(call)
        first, second, factor = gradients(rng, weights), gradients(rng, weights), rng.choice([0.5, 2.0])
        for side in sides:
            opt = side.opt
            side.gradients(first)
            if call == "step":
                opt.first_step()
                side.gradients(second)
                opt.second_step()
            elif call == "closure":
                passes = iter((first, second))
                opt.step(lambda: side.gradients(next(passes)))
            elif call == "restore":
                opt.first_step()
                side.gradients(second)
                opt.restore()
            elif call == "perturbed":
                with opt.perturbed():
                    side.gradients(second)
                opt.step()
            elif call == "state":
                side.reload()
            elif call == "lr":
                for group in opt.param_groups:
                    group["lr"] *= factor
            elif not opt._only_makes_state():
                with pytest.raises(RuntimeError, match="nothing is perturbed"):
                    opt.second_step()
    return calls


def close(a, b, dtypes, steps):
    """Rounding of some steps: the fused kernels round once where the reference does after every operation."""
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return torch.allclose(a.double(), b.double(), rtol=40 * steps * eps, atol=40 * steps * eps, equal_nan=True)


def one(seed):
    rng = random.Random(seed)
    weights, groups, base, options, sam = configuration(rng)
    sides = [Side(kind, weights, groups, base, options, sam) for kind in (mup2_ref.SAM, mup2_fused.SAM)]
    addresses = [p.data_ptr() for p in sides[1].params]
    calls = play(rng, weights, sides)
    about = f"MUP2_FUZZ_SEED={seed}: {base.__name__} {options} {sam} {groups} {calls}"
    ref, fused = sides
    assert ref.opt.skipped_steps == fused.opt.skipped_steps, about
    assert addresses == [p.data_ptr() for p in fused.params], about
    for side in sides:
        side.gradients([None] * len(weights))
    assert len(ref.seen) == len(fused.seen), about
    adaptive = sam["variant"] != "sam"  # there, the norm hands the rounding of one tensor on to all others
    for n, both in enumerate(zip(ref.seen, fused.seen)):
        for i, (p, q) in enumerate(zip(*both)):
            assert close(p, q, [w.dtype for w in weights] if adaptive else [p.dtype], len(calls)), (
                f"{about}: weights {n}, tensor {i} {p.dtype} {tuple(p.shape)}"
            )
    for p, q in zip(ref.params, fused.params):
        mine, theirs = fused.opt.state[q], ref.opt.state[p]
        if mine.keys() != theirs.keys():  # of a skipped step, which a GPU finds out too late to make no state
            assert not theirs and not any(x.any() for x in mine.values()), about
    if calls and all(c in ("restore", "state", "lr", "nothing twice") for c in calls):
        assert all(torch.equal(w, q) for w, q in zip(weights, fused.params)), about


@pytest.mark.parametrize("start", range(SEEDS.start, SEEDS.stop, BATCH))
def test_fused_is_the_reference(start):
    for seed in range(start, min(start + BATCH, SEEDS.stop)):
        one(seed)

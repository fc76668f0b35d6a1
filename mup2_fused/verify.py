"""Is the product's optimizer the reference on this machine? `python -m mup2_fused.verify` prints a table and a verdict.

mup2_fused.SAM is compared with mup2_ref.SAM on the same parameters and gradients, with each of its backends ("torch"
and, where it is built, "compiled"), for every variant, and with SGD and AdamW:

    norm          the joint norm, against the reference's in float64
    perturbation  w + e
    restore       the weights after restore(), which must be the old ones bit for bit
    update        weights and moments after one update
    20 steps      weights and moments after 20 whole steps

A result passes if it equals the reference's bit for bit ("exact"). It also passes if its worst error, measured against
the reference in float64, is at most twice the reference's own error plus one unit in the last place. The exit status
is 1 if a result fails.

--model module:factory verifies on your own model: factory() returns the model, or (model, loss) with loss(model) a
scalar. Without a loss, a smooth function of the parameters takes its place.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mup2_ref
from mup2_fused import compiled_passes, torch_passes
from mup2_fused.optimizer import SAM
from mup2_fused.user_code import Loss, attribute, model_and_loss

STEPS = 20
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True)),
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),  # in float16 the usual eps is 0
}
BACKENDS = ("torch", "compiled")


class Row(NamedTuple):
    """One line of the table."""

    check: str
    variant: str
    base: str
    backend: str
    error: float  # 0: equal to the reference, bit for bit
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


class Odd(nn.Module):
    """Parameters of every awkward kind: empty, scalar, around vector widths and chunk edges, permuted, unaligned."""

    def __init__(self) -> None:
        super().__init__()
        chunk = compiled_passes.chunk
        sizes = [0, 1, 3, 8, 1023, chunk - 1, chunk, chunk + 1, 2 * chunk + 1030]
        tensors = [torch.randn(n) for n in sizes] + [torch.randn(()), torch.randn(70, 300)]
        tensors += [torch.randn(9, 7, 3, 5).contiguous(memory_format=torch.channels_last), torch.randn(5000)[1:]]
        self.tensors = nn.ParameterList(nn.Parameter(0.5 * t) for t in tensors)


def smooth(model: nn.Module) -> Tensor:
    """A loss for models without data. Its gradient depends on the weights, so that the two passes differ."""
    return sum((p.sin() + 0.1 * (p - 0.3) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]


def error_and_bound(
    product: list[Tensor], reference: list[Tensor], exact: list[Tensor], steps: int = 1
) -> tuple[float, float]:
    """(worst error of the product against float64, the bound that it must not exceed); (0, 0) for equal tensors.

    The bound is twice the reference's error plus one unit in the last place. A reference in float64 has no error
    against itself; its bound is two units for each step.
    """
    if all(torch.equal(a, b) for a, b in zip(product, reference)):
        return 0.0, 0.0
    error, bound = 0.0, 0.0
    for a, b, c in zip(product, reference, exact):
        if c.numel():
            units = 2 * steps if b.dtype == torch.float64 else 1
            eps = torch.finfo(b.dtype).eps * c.abs().max().item()
            error = max(error, (a.double() - c).abs().max().nan_to_num(torch.inf).item())
            bound = max(bound, 2 * (b.double() - c).abs().max().item() + units * eps)
    return error, bound


class Side(NamedTuple):
    """One optimizer with its parameters, and a model of its own that computes the gradients.

    The float64 side has parameters in float64 beside a model in the type that is verified.
    """

    model: nn.Module
    params: list[nn.Parameter]
    opt: Any  # the product's SAM or the reference's
    loss: Loss

    def backward(self) -> None:
        mine = [p for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, q in zip(mine, self.params):
                p.copy_(q)
        self.model.zero_grad()
        self.loss(self.model).backward()
        for p, q in zip(mine, self.params):
            q.grad = None if p.grad is None else p.grad.to(q.dtype)

    def whole_step(self) -> None:
        self.backward()
        self.opt.first_step()
        self.backward()
        self.opt.second_step()

    def gradients_of(self, other: Side) -> None:
        """Take the other side's gradients, so that optimizers are compared and not autograd."""
        for p, q in zip(self.params, other.params):
            p.grad = None if q.grad is None else q.grad.detach().clone().to(p.dtype)

    def first_step(self) -> float:
        """Take the first step, and return the joint norm that this side divided by."""
        groups, variant = self.opt.param_groups, self.opt.variant
        triples = [(p, p.grad, g["gradnorm_scaling"]) for g in groups for p in g["params"] if p.grad is not None]
        formula = torch_passes.norm_of if isinstance(self.opt, SAM) else mup2_ref.joint_norm
        norm = formula(triples, variant).item()
        self.opt.first_step()
        passes = getattr(self.opt, "passes", None)
        return passes.norms()[0] if isinstance(passes, compiled_passes.CompiledPasses) else norm

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def results(self) -> list[Tensor]:
        """Weights and the moments of the base optimizer."""
        states = [(p, x) for p in self.params for x in self.opt.state[p].values()]
        return self.weights() + [x.clone() for p, x in states if torch.is_tensor(x) and x.ndim == p.ndim]


def side(model: nn.Module, loss: Loss, variant: str, base: str, rho: float, backend: str) -> Side:
    """backend: one of BACKENDS, or "reference", or "exact" for the reference in float64."""
    own = copy.deepcopy(model)
    params = [p for p in own.parameters() if p.requires_grad]
    if backend == "exact":
        params = [nn.Parameter(p.detach().double()) for p in params]
    groups = [  # two groups, so that factors differ
        {"params": params[::2], "rho": rho, "gradnorm_scaling": 1.0},
        {"params": params[1::2], "rho": 0.5 * rho, "gradnorm_scaling": 2.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind, kwargs = BASES[base]
    if backend in BACKENDS:
        return Side(own, params, SAM(groups, kind, variant=variant, backend=backend, **kwargs), loss)
    return Side(own, params, mup2_ref.SAM(groups, kind, variant=variant, **kwargs), loss)


def verify(
    model: nn.Module, loss: Loss, variant: str, base: str, rho: float = 0.1, backends: tuple[str, ...] = BACKENDS
) -> Iterator[Row]:
    """Five rows for each backend, one variant and one base optimizer. The model is on its device, and not changed.

    Raises RuntimeError if the kernels are to be verified and cannot run on this model.
    """
    names = ("reference", "exact", *backends)
    reference, exact, *products = sides = [side(model, loss, variant, base, rho, name) for name in names]

    def rows(check: str, errors: Callable[[Side], tuple[float, float]]) -> list[Row]:
        return [Row(check, variant, base, name, *errors(product)) for name, product in zip(backends, products)]

    def errors(results: Callable[[Side], list[Tensor]], steps: int = 1) -> Callable[[Side], tuple[float, float]]:
        return lambda product: error_and_bound(results(product), results(reference), results(exact), steps)

    before = reference.weights()
    reference.backward()
    for other in sides:
        other.gradients_of(reference)
    own, true, *norms = [each.first_step() for each in sides]
    for name, norm in zip(backends, norms):
        error = 0.0 if norm == own else abs(norm / true - 1)
        yield Row("norm", variant, base, name, error, 2 * abs(own / true - 1) + 1e-12)
    yield from rows("perturbation", errors(Side.weights))
    for product in products:
        product.opt.restore()
    yield from rows("restore", lambda product: (different_bytes(product.weights(), before), 0))
    for product in products:
        product.opt.first_step()
    for each in sides:
        each.opt.second_step()
    yield from rows("update", errors(Side.results))
    for each in sides * (STEPS - 1):
        each.whole_step()
    yield from rows(f"{STEPS} steps", errors(Side.results, STEPS))


def different_bytes(xs: list[Tensor], ys: list[Tensor]) -> int:
    pairs = [[t.reshape(-1).contiguous().view(torch.uint8) for t in pair] for pair in zip(xs, ys)]
    return sum(int((x != y).sum()) for x, y in pairs)


def table(rows: list[Row]) -> str:
    lines = [("check", "variant", "base", "backend", "worst error", "bound", "")]
    for r in rows:
        error, bound = "exact" if r.error == 0 else f"{r.error:.2e}", "0" if r.bound == 0 else f"{r.bound:.2e}"
        lines.append((r.check, r.variant, r.base, r.backend, error, bound, "ok" if r.passed else "FAILED"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--model", help="module:factory")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; an error if it cannot run here")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, loss = model_and_loss(attribute(args.model)() if args.model else Odd())
    model = model.to(args.device, getattr(torch, args.dtype))
    print(
        f"mup2_fused against mup2_ref: {args.model or 'tensors of awkward sizes'}, {args.dtype} on {args.device}, "
        f"torch {torch.__version__}, CPU kernels {compiled_passes.instruction_set}, "
        f"{'with' if compiled_passes.built_with_cuda else 'without'} CUDA"
    )
    backends = (args.backend,) if args.backend else BACKENDS
    reason = compiled_passes.obstacle([{"params": list(model.parameters())}])
    if reason and not args.backend:
        backends = ("torch",)
        print(f"The compiled backend is not verified: {reason}.")
    rows = [
        r
        for variant in mup2_ref.VARIANTS
        for b in BASES
        for r in verify(model, loss or smooth, variant, b, backends=backends)
    ]
    print(table(rows))
    failed = [r for r in rows if not r.passed]
    exact = sum(r.error == 0 for r in rows)
    print(f"{'FAILED: ' + str(len(failed)) + ' of ' if failed else 'Passed: '}{len(rows)} checks, {exact} exact")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Is the product's optimizer the reference on this machine? `python -m mup2_fused.verify` prints a table and a verdict.

mup2_fused.SAM is compared with mup2_ref.SAM on the same parameters and gradients, with each of its backends ("torch"
and, where it is built, "compiled"), for every variant, and with SGD with momentum and AdamW:

    norm                the joint norm, against the reference's in float64
    perturbation        w + e
    restore             the weights after restore(), which must be the old ones bit for bit
    update              weights and moments after one update
    20 steps            weights and moments after 20 whole steps
    20 steps, interval  the same with SAM in every fourth step only
    20 steps, momentum  the same with ascent="momentum"

The reference has no interval and no ascent by momentum: sides.py writes them out around it.

A result passes if it equals the reference's bit for bit ("exact"). It also passes if its worst error, measured against
the reference in float64, is at most twice the reference's own error plus one unit in the last place. The exit status
is 1 if a result fails.

--model module:factory verifies on your own model: factory() returns the model, or (model, loss) with loss(model) a
scalar. Without a loss, a smooth function of the parameters takes its place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mup2_ref
from mup2_fused import compiled_passes
from mup2_fused.sides import BACKENDS, BASES, WAYS, Side, make_side, product_step
from mup2_fused.user_code import Loss, attribute, model_and_loss

STEPS = 20


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
    x = torch.cat([p.reshape(-1) for p in model.parameters()])
    return (x.sin() + 0.1 * (x - 0.3) ** 2).sum()


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


class Sides:
    """All that is compared for one variant, base optimizer and way of climbing. The model is not changed."""

    def __init__(
        self, model: nn.Module, loss: Loss, variant: str, base: str, rho: float, backends: tuple[str, ...], way: str
    ) -> None:
        made = [make_side(model, loss, variant, base, rho, way, name) for name in ("reference", "exact", *backends)]
        self.reference, self.exact, *self.products = made
        self.variant, self.base, self.backends, self.way = variant, base, backends, way

    def rows(self, check: str, errors: Iterable[tuple[float, float]]) -> Iterator[Row]:
        """A row for each backend. errors: (error, bound) of each."""
        for name, error in zip(self.backends, errors):
            yield Row(check, self.variant, self.base, name, *error)

    def compare(self, check: str, results: Callable[[Side], list[Tensor]], steps: int = 1) -> Iterator[Row]:
        """Rows for the results after so many steps."""
        reference, exact = results(self.reference), results(self.exact)
        return self.rows(check, [error_and_bound(results(side), reference, exact, steps) for side in self.products])

    def one_step(self) -> Iterator[Row]:
        """A SAM step, with the reference's first gradient in both passes."""
        sides = (self.reference, self.exact, *self.products)
        before = self.reference.weights()
        self.reference.backward()
        for other in sides:
            other.gradients_of(self.reference)
        own, true, *norms = [each.first_step() for each in sides]
        bound = 2 * abs(own / true - 1) + 1e-12
        yield from self.rows("norm", [(0.0 if norm == own else abs(norm / true - 1), bound) for norm in norms])
        yield from self.compare("perturbation", Side.weights)
        for product in self.products:
            product.opt.restore()
        yield from self.rows("restore", [(different_bytes(side.weights(), before), 0) for side in self.products])
        for product in self.products:
            product.opt.first_step()
        for each in sides:
            each.opt.second_step()
        yield from self.compare("update", Side.results)

    def whole_steps(self) -> Iterator[Row]:
        """STEPS steps, each with gradients of its own."""
        for number in range(STEPS):
            for side in (self.reference, self.exact):
                WAYS[self.way].written_out(side, number)
            for side in self.products:
                product_step(side)
        yield from self.compare(f"{STEPS} {self.way}", Side.results, STEPS)


def verify(
    model: nn.Module, loss: Loss, variant: str, base: str, rho: float = 0.1, backends: tuple[str, ...] = BACKENDS
) -> Iterator[Row]:
    """The rows of one variant and one base optimizer, for each backend. The model is on its device, and not changed.

    Raises RuntimeError if the kernels are to be verified and cannot run on this model.
    """
    sides = partial(Sides, model, loss, variant, base, rho, backends)
    yield from sides("steps").one_step()
    for way in WAYS:
        yield from sides(way).whole_steps()


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

"""Is the fused optimizer the reference on this machine? `python -m mup2_fused.verify` prints a table and a verdict.

Five things are compared with mup2_ref, on the same parameters and gradients, for every variant and SGD and AdamW:

    norm          the joint norm, against the reference's and a float64 one
    perturbation  w + e
    restore       the weights after restore(), which must be the old ones bit for bit
    update        weights and moments after one update
    20 steps      weights and moments after 20 whole steps

A result passes if it equals the reference's bit for bit ("exact"), or if its worst error against the same computation
in float64 is at most twice the reference's own, plus one unit in the last place. Exit status 1 if something fails.

--model module:factory verifies on your model: factory() returns it, or (model, loss) with loss(model) a scalar.
Without loss, a smooth function of the parameters stands in for it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mup2_fused
import mup2_ref

STEPS = 20
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.01, nesterov=True)),
    # eps: float16 has no 1e-8
    "adamw": (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, eps=1e-4)),
}
Loss = Callable[[nn.Module], Tensor]


class Row(NamedTuple):
    check: str
    variant: str
    base: str
    error: float  # 0: equal to the reference, bit for bit
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


class Odd(nn.Module):
    """Parameters of every awkward kind: empty, scalar, around vector widths and chunk edges, permuted, unaligned."""

    def __init__(self) -> None:
        super().__init__()
        chunk = mup2_fused._C.chunk
        sizes = [0, 1, 3, 8, 1023, chunk - 1, chunk, chunk + 1, 2 * chunk + 1030]
        tensors = [torch.randn(n) for n in sizes] + [torch.randn(()), torch.randn(70, 300)]
        tensors += [torch.randn(9, 7, 3, 5).contiguous(memory_format=torch.channels_last), torch.randn(5000)[1:]]
        self.tensors = nn.ParameterList(nn.Parameter(0.5 * t) for t in tensors)


def smooth(model: nn.Module) -> Tensor:
    """A loss for models without data: its gradient depends on the weights, so that the two passes differ."""
    return sum((p.sin() + 0.1 * (p - 0.3) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]


def error_and_bound(
    fused: list[Tensor], reference: list[Tensor], exact: list[Tensor], steps: int = 1
) -> tuple[float, float]:
    """Worst error against float64 and twice the reference's plus an ulp; (0, 0) where fused and reference are equal.

    A float64 reference is its own truth and has no error to compare with: there, two ulps per step.
    """
    if all(torch.equal(a, b) for a, b in zip(fused, reference)):
        return 0.0, 0.0
    error, bound = 0.0, 0.0
    for a, b, c in zip(fused, reference, exact):
        if c.numel():
            ulps = 2 * steps if b.dtype == torch.float64 else 1
            eps = torch.finfo(b.dtype).eps * c.abs().max().item()
            error = max(error, (a.double() - c).abs().max().nan_to_num(torch.inf).item())
            bound = max(bound, 2 * (b.double() - c).abs().max().item() + ulps * eps)
    return error, bound


class Side(NamedTuple):
    """One optimizer, and a model of its own that gradients come from; in float64 the model keeps its dtype."""

    model: nn.Module
    params: list[nn.Parameter]
    opt: Any  # SAM, of either kind
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

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def results(self) -> list[Tensor]:
        """Weights and the moments of the base optimizer."""
        moments = [
            x for p in self.params for x in self.opt.state[p].values() if torch.is_tensor(x) and x.ndim == p.ndim
        ]
        return self.weights() + [m.clone() for m in moments]


def sides(model: nn.Module, loss: Loss, variant: str, base: str, rho: float) -> list[Side]:
    """Fused, reference, and reference in float64."""
    made = []
    for kind, dtype in ((mup2_fused.SAM, None), (mup2_ref.SAM, None), (mup2_ref.SAM, torch.float64)):
        own = copy.deepcopy(model)
        params = [
            p if dtype is None else nn.Parameter(p.detach().to(dtype)) for p in own.parameters() if p.requires_grad
        ]
        groups = [  # two, so that factors differ
            {"params": params[::2], "rho": rho, "gradnorm_scaling": 1.0},
            {"params": params[1::2], "rho": 0.5 * rho, "gradnorm_scaling": 2.0},
        ]
        optimizer, kwargs = BASES[base]
        opt = kind([g for g in groups if g["params"]], optimizer, variant=variant, **kwargs)
        made.append(Side(own, params, opt, loss))
    return made


def same_gradients(all_sides: list[Side]) -> None:
    """Every side gets the gradients of the second: what follows is compared, not autograd."""
    all_sides[1].backward()
    for side in all_sides:
        for p, q in zip(side.params, all_sides[1].params):
            p.grad = None if q.grad is None else q.grad.detach().clone().to(p.dtype)


def verify(model: nn.Module, loss: Loss, variant: str, base: str, rho: float = 0.1) -> Iterator[Row]:
    """The five rows for one variant and base optimizer. model: on its device, in its dtype; it is not changed."""
    fused, reference, exact = three = sides(model, loss, variant, base, rho)
    before = fused.weights()
    same_gradients(three)
    norms = [
        mup2_ref.joint_norm(
            [(p, p.grad, g["gradnorm_scaling"]) for g in s.opt.param_groups for p in g["params"] if p.grad is not None],
            variant,
        )
        for s in three[1:]
    ]
    for side in three:
        side.opt.first_step()
    norm = torch.tensor(fused.opt._plan.norms()[0], dtype=torch.float64)
    error = abs(norm.item() / norms[1].item() - 1)
    yield Row("norm", variant, base, error, 2 * abs(norms[0].item() / norms[1].item() - 1) + 1e-12)
    yield Row("perturbation", variant, base, *error_and_bound(fused.weights(), reference.weights(), exact.weights()))

    fused.opt.restore()
    bits = [[t.reshape(-1).contiguous().view(torch.uint8) for t in tensors] for tensors in (fused.weights(), before)]
    changed = sum((a != b).sum().item() for a, b in zip(*bits))
    yield Row("restore", variant, base, changed, 0)

    same_gradients(three)
    fused.opt.first_step()
    for side in three:
        side.opt.second_step()
    yield Row("update", variant, base, *error_and_bound(fused.results(), reference.results(), exact.results()))

    for _ in range(STEPS - 1):
        for side in three:
            side.backward()
            side.opt.first_step()
            side.backward()
            side.opt.second_step()
    results = error_and_bound(fused.results(), reference.results(), exact.results(), STEPS)
    yield Row(f"{STEPS} steps", variant, base, *results)


def table(rows: list[Row]) -> str:
    lines = [("check", "variant", "base", "worst error", "bound", "")]
    for r in rows:
        error = "exact" if r.error == 0 else f"{r.error:.2e}"
        lines.append(
            (
                r.check,
                r.variant,
                r.base,
                error,
                "0" if r.bound == 0 else f"{r.bound:.2e}",
                "ok" if r.passed else "FAILED",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in lines)


def attribute(name: str) -> Any:
    """What "module:name" names; modules are also found in the current folder."""
    module, _, attribute_name = name.partition(":")
    if not attribute_name:
        raise SystemExit(f"expected module:name, such as torchvision.models:resnet18, not {name!r}")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute_name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{name}: {error}; the module must be importable from here") from error


def load(name: str) -> tuple[nn.Module, Loss]:
    """The user's model, from "module:factory"."""
    made = attribute(name)()
    return made if isinstance(made, tuple) else (made, smooth)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--model", help="module:factory")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, loss = load(args.model) if args.model else (Odd(), smooth)
    model = model.to(args.device, getattr(torch, args.dtype))
    print(
        f"mup2_fused against mup2_ref: {args.model or 'tensors of awkward sizes'}, {args.dtype} on {args.device}, "
        f"torch {torch.__version__}, CPU kernels {mup2_fused.instruction_set}, "
        f"{'with' if mup2_fused.built_with_cuda else 'without'} CUDA"
    )
    rows = [row for variant in mup2_ref.VARIANTS for base in BASES for row in verify(model, loss, variant, base)]
    print(table(rows))
    failed = [r for r in rows if not r.passed]
    exact = sum(r.error == 0 for r in rows)
    print(f"{'FAILED: ' + str(len(failed)) + ' of ' if failed else 'Passed: '}{len(rows)} checks, {exact} exact")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

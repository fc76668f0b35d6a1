"""Predicted and measured width exponents, for every row of Tables D.1, D.2, F.1 and 1 of the paper, and Algorithm 1.

    python -m experiments.exponents

A 3-layer ReLU MLP takes two SAM steps (none in the unstable "sp") at widths 128 to 2048. In the next step we measure,
for each role, the Frobenius norm of the gradient, and how much update and perturbation change the layer's output: the
rms over 256 fresh inputs and all coordinates of (update of W_l) x_{l-1} and e_l x_{l-1}. Here x_{l-1} is what the layer
sees when the earlier layers are perturbed, too. The measured exponent is the slope, against log n, of the logarithm of
the geometric mean over seeds.

All rows go through mup2_fused.param_groups and mup2_fused.SAM, in float64, and with a radius so small that effects stay
linear even where they grow with n. Labels come from a linear teacher and weights are drawn with gain 1, so that most of
the error signal comes from the labels; the rest comes from the random initial function and is noise. SAM-ON rows have a
LayerNorm before each ReLU. The paper's tables are measured with absolute widths (base width 1) and the joint norm of
Definition 4; Algorithm 1 (A1) with its decoupled norm and base width 64.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import mup2_fused as mup2
from experiments.commands import command, start, worker_processes
from experiments.figures import pyplot
from mup2_fused import ROLES
from mup2_fused.check.measure import rms
from mup2_fused.check.report import STYLES
from mup2_fused.theory import PERTURBATIONS
from mup2_ref import PARAMETERIZATIONS

D_IN, D_OUT, BATCH, PROBES = 10, 10, 64, 256
QUANTITIES = ("effect", "update", "gradient")


class Row(NamedTuple):
    """One row of a table of the paper, and how it is measured."""

    table: str
    name: str
    parameterization: str
    perturbation: str | tuple
    variant: str = "sam"
    perturb: str = "all"  # as for param_groups
    norm: str = "joint"
    base_width: int = 1

    @property
    def perturbed(self) -> tuple[str, ...]:
        return ("input",) if self.perturb == "norm" else ROLES  # gains and biases count as input layers

    def exponents(self, perturbed: tuple[str, ...] = ROLES) -> mup2.Exponents:
        names = (self.parameterization, self.perturbation, self.variant)
        return mup2.exponents(*names, norm=self.norm, perturbed=perturbed)

    def prediction(self) -> mup2.Prediction:
        exponents = self.exponents(self.perturbed)
        return mup2.predict(exponents, at_init=self.parameterization == "sp", perturbed=self.perturbed)


def rows() -> list[Row]:
    result = [Row("D.1", p, p, "naive") for p in PARAMETERIZATIONS]
    result += [Row("D.2", p, "mup", p) for p in PERTURBATIONS]
    gradient = mup2.predict(mup2.exponents()).gradient
    for d in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1):
        for role in ROLES:  # the role that dominates the norm; the others contribute n^(-1/2) to it
            dl = tuple(g if r == role else g + 0.5 for g, r in zip(gradient, ROLES))
            result.append(Row("F.1", f"d = {d:g}, {role} dominates", "mup", (d, dl)))
    labels = {"sam": "SAM", "elementwise": "elementwise ASAM", "layerwise": "layerwise ASAM"}
    kinds = [(label, variant, "all") for variant, label in labels.items()] + [("SAM-ON", "sam", "norm")]
    for label, variant, perturb in kinds:
        for p in ("naive", "global", "effective"):
            result.append(Row("1", f"{label}, {'muP²' if p == 'effective' else p}", "mup", p, variant, perturb))
    with_base = {f"{label}, muP², base width 64": kind for label, *kind in kinds}
    return result + [Row("A1", n, "mup", "effective", *kind, "decoupled", 64) for n, kind in with_base.items()]


def network(width: int, with_norm: bool) -> nn.Module:
    if not with_norm:
        return mup2.MLP(D_IN, width, D_OUT)
    layers: list[nn.Module] = []
    for d_in in (D_IN, width):
        layers += [nn.Linear(d_in, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, D_OUT, bias=False))


@torch.no_grad()
def layer_inputs(model: nn.Module, x: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """What each layer with parameters sees when the model is applied to x."""
    seen: dict[nn.Module, torch.Tensor] = {}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    hooks = [m.register_forward_hook(lambda m, args, out: seen.update({m: args[0]})) for m in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def outputs(inputs: dict[nn.Module, torch.Tensor]) -> dict[nn.Module, torch.Tensor]:
    return {layer: layer(x) for layer, x in inputs.items()}


def measure(row: Row, width: int, seed: int) -> dict[str, list[float]]:
    """Quantity -> its value for input, hidden and output role; nan where nothing is perturbed."""
    torch.manual_seed(seed)
    shapes = (BATCH, D_IN), (PROBES, D_IN), (D_IN, D_OUT)
    x, probe, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    y = (x @ teacher).argmax(1)
    with_norm = row.perturb == "norm"
    model, base = network(width, with_norm).double(), network(row.base_width, with_norm)
    mup2.init_(model, base, row.exponents(), gain=1.0)
    rho = 1e-4 * 2048 ** -max(0.0, *row.prediction().effect)
    groups = mup2.param_groups(model, base, row.exponents(), lr=0.1, rho=rho, perturb=row.perturb)
    optimizer = mup2.SAM(groups)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    for _ in range(0 if row.parameterization == "sp" else 2):
        optimizer.step(closure)
    found = measure_step(model, optimizer, closure, probe)
    result = {q: [value for layer, value in found[q].items() if isinstance(layer, nn.Linear)] for q in QUANTITIES}
    if with_norm:
        norms = [value for layer, value in found["effect"].items() if isinstance(layer, nn.LayerNorm)]
        result["effect"] = [float(np.mean(norms)), float("nan"), float("nan")]
    return result


def measure_step(
    model: nn.Module, optimizer: mup2.SAM, closure: Callable[[], Any], probe: torch.Tensor
) -> dict[str, dict[nn.Module, float]]:
    """By layer: norm of the gradient, and the rms changes of its output by the perturbation and by the update."""
    before_inputs = layer_inputs(model, probe)
    before = outputs(before_inputs)
    closure()
    gradient = {layer: layer.weight.grad.norm().item() for layer in before}
    optimizer.first_step()
    climbed_inputs = layer_inputs(model, probe)
    climbed = outputs(climbed_inputs)
    closure()
    optimizer.restore()
    effect = {layer: rms(climbed[layer] - out) for layer, out in outputs(climbed_inputs).items()}
    optimizer.base_optimizer.step()
    update = {layer: rms(out - before[layer]) for layer, out in outputs(before_inputs).items()}
    return {"effect": effect, "update": update, "gradient": gradient}


def slopes(widths: list[int], values: np.ndarray) -> np.ndarray:
    """values: (width, seed, role) -> least-squares slope per role of the mean log over seeds against log n."""
    return np.polyfit(np.log(widths), np.log(values).mean(1), 1)[0]


def measure_all(table: list[Row], widths: list[int], seeds: int, jobs: int) -> dict[Row, dict[str, np.ndarray]]:
    """Row -> quantity -> values of shape (width, seed, role), measured in jobs processes."""
    from tqdm import tqdm

    tasks = [(row, width, seed) for row in table for width in widths for seed in range(seeds)]
    tasks.sort(key=lambda task: -task[1])
    progress = dict(desc="measuring", mininterval=1, total=len(tasks))
    with worker_processes(jobs) as pool:
        futures = [pool.submit(measure, *task) for task in tasks]
        measured = {task: future.result() for task, future in tqdm(zip(tasks, futures), **progress)}
    return {
        row: {q: np.array([[measured[row, w, s][q] for s in range(seeds)] for w in widths]) for q in QUANTITIES}
        for row in table
    }


def compare(row: Row, widths: list[int], values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Predicted and measured exponents of one row, as the result file has them. None: nothing is perturbed."""

    def plain(numbers: Any, form: Callable[[float], float]) -> list:
        return [form(x) if np.isfinite(x) else None for x in numbers]

    e, prediction = row.exponents(row.perturbed), row.prediction()._asdict()
    exponents = {"b": e.b, "c": e.c, "dl": e.dl, "d": e.d, "variant": e.variant, "perturbed": row.perturbed}
    result: dict[str, Any] = {"table": row.table, "name": row.name, "exponents": exponents}
    result |= {"predicted": {}, "measured": {}, "values": {}}
    deviation = 0.0
    for quantity in QUANTITIES:
        slope = slopes(widths, values[quantity])
        if compared(row.perturb, quantity):
            deviation = max(deviation, np.nanmax(np.abs(slope - np.array(prediction[quantity], dtype=float))))
        geometric = np.exp(np.log(values[quantity]).mean(1)).T
        result["predicted"][quantity] = plain(prediction[quantity], float)
        result["measured"][quantity] = plain(slope, lambda x: round(x, 4))
        result["values"][quantity] = [plain(role, lambda x: float(f"{x:.5g}")) for role in geometric]
    return result | {"deviation": round(deviation, 4)}


def compared(perturb: str, quantity: str) -> bool:
    """A LayerNorm makes the gradient of the matrix below it depend on that matrix's scale."""
    return not (perturb == "norm" and quantity == "gradient")


def line(result: dict[str, Any], row: Row, tolerance: float) -> str:
    """One row of the printed table."""
    cells = ""
    for quantity in QUANTITIES:
        for predicted, measured in zip(result["predicted"][quantity], result["measured"][quantity]):
            shown = measured is not None and compared(row.perturb, quantity)
            cells += f"{predicted:+6.2f}/{measured:+6.2f}" if shown else f"{'-':>13}"
    deviation = result["deviation"]
    return f"{row.table:4} {row.name:40}{cells}   {deviation:.3f}{' <--' if deviation > tolerance else ''}"


@command("nothing was kept: start the command again")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    table = rows()
    measured = measure_all(table, args.widths, args.seeds, args.jobs)
    print(f"{'':4} {'':40}" + "".join(f"{q:^39}" for q in QUANTITIES) + " largest")
    heading = "".join(f"{role:>13}" for role in ROLES) * 3
    print(f"{'':4} {'predicted / measured exponent':40}{heading} deviation")
    results = []
    for row in table:
        results.append(compare(row, args.widths, measured[row]))
        print(line(results[-1], row, args.tolerance))
    worst = max(result["deviation"] for result in results)
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"widths": args.widths, "seeds": args.seeds, "worst": worst, "rows": results}
    (args.out / "exponents.json").write_text(json.dumps(summary) + "\n")
    plot(args.widths, args.seeds, results, args.out / "exponents.png")
    print(f"\nlargest deviation of {len(table)} rows: {worst:.3f} (tolerance {args.tolerance})")
    return int(worst > args.tolerance)


def plot(widths: list[int], seeds: int, results: list[dict], path: Path) -> None:
    """Top: what each perturbation scaling of Table D.2 does to each layer. Bottom: Table 1's muP², D.1's updates."""
    plt = pyplot()
    by_name = {(r["table"], r["name"]): r for r in results}
    panels = [(("D.2", p), "effect", f"perturbation: {p}") for p in PERTURBATIONS]
    panels += [(("1", f"{v}, muP²"), "effect", f"{v}, muP²") for v in ("elementwise ASAM", "layerwise ASAM")]
    panels += [(("D.1", p), "update", f"update: {p}") for p in ("sp-stable", "ntp", "mup")]
    figure, axes = plt.subplots(2, 5, figsize=(13, 7), sharex=True, layout="constrained")
    for axis, (key, quantity, title) in zip(axes.flat, panels):
        values, measured, predicted = (by_name[key][part][quantity] for part in ("values", "measured", "predicted"))
        for i, role in enumerate(ROLES):
            y, (color, marker) = np.array(values[i], dtype=float), STYLES[role]
            label = f"{role} {measured[i]:+.2f} ({predicted[i]:+g})"
            axis.loglog(widths, y / y[0], color=color, marker=marker, label=label)
        axis.set_title(title, fontsize=11)
        axis.set_ylim(3e-5, 10)  # with room for the legend
        axis.set_xticks(widths[::2], [str(w) for w in widths[::2]])
        axis.minorticks_off()
        axis.legend(title="slope (predicted)", loc="lower left", fontsize=10, title_fontsize=10)
    plt.setp(axes[1], xlabel="width n")
    plt.setp(axes[:, 0], ylabel=f"effect on the layer's output\nrelative to width {widths[0]}")
    figure.suptitle(f"Growth with the width, geometric mean of {seeds} seeds")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    start(main)

"""Predicted and measured width exponents, for every row of Tables D.1, D.2, F.1 and 1 of the paper, and Algorithm 1.

    python experiments/exponents.py

A 3-layer ReLU MLP takes two SAM steps (the unstable "sp" none) at widths 128 to 2048; in the third step we measure,
per role, the Frobenius norm of the gradient and how much update and perturbation change a layer's output: the rms over
256 fresh inputs and all coordinates of (update of W_l) x_{l-1} and e_l x_{l-1}, x_{l-1} being what the layer sees
when the earlier layers are perturbed too. The slope of the logarithm of the geometric mean over seeds against log n is
the measured exponent. Everything goes through mup2_ref.param_groups and mup2_ref.SAM, in float64 and with a radius so
small that effects stay linear even where they grow with n. Labels come from a linear teacher and weights are drawn with
gain 1, so that the error signal is mostly the labels' and not the random initial function's, which only adds noise.
SAM-ON rows have a LayerNorm before each ReLU. Tables are measured with absolute widths (base width 1) and the joint
norm of Definition 4, Algorithm 1 (A1) with its decoupled norm and base width 64.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mup2_ref
from mup2_ref import ROLES

D_IN, D_OUT, BATCH, PROBES = 10, 10, 64, 256
QUANTITIES = ("effect", "update", "gradient")


class Row(NamedTuple):
    table: str
    name: str
    parameterization: str
    perturbation: str | tuple
    variant: str = "sam"
    perturb: str = "all"
    norm: str = "joint"
    base_width: int = 1

    def exponents(self) -> mup2_ref.Exponents:
        perturbed = ("input",) if self.perturb == "norm" else ROLES  # gains and biases are input-like
        return mup2_ref.exponents(self.parameterization, self.perturbation, self.variant, perturbed)

    def prediction(self) -> mup2_ref.Prediction:
        return mup2_ref.predict(self.exponents(), at_init=self.parameterization == "sp")


def rows() -> list[Row]:
    result = [Row("D.1", p, p, "naive") for p in mup2_ref.PARAMETERIZATIONS]
    result += [Row("D.2", p, "mup", p) for p in mup2_ref.PERTURBATIONS]
    gradient = mup2_ref.predict(mup2_ref.exponents()).gradient
    for d in (-1, -0.5, -0.25, 0, 0.25, 0.5, 1):
        for role in ROLES:  # this one alone makes up the norm: the others contribute n^(-1/2) to it
            dl = tuple(g if r == role else g + 0.5 for g, r in zip(gradient, ROLES))
            result.append(Row("F.1", f"d = {d:g}, {role} dominates", "mup", (d, dl)))
    labels = {"sam": "SAM", "elementwise": "elementwise ASAM", "layerwise": "layerwise ASAM"}
    kinds = [(label, variant, "all") for variant, label in labels.items()] + [("SAM-ON", "sam", "norm")]
    for label, variant, perturb in kinds:
        for p in ("naive", "global", "effective"):
            result.append(Row("1", f"{label}, {'muP²' if p == 'effective' else p}", "mup", p, variant, perturb))
    for label, variant, perturb in kinds:
        result.append(Row("A1", f"{label}, muP², base width 64", "mup", "effective", variant, perturb, "decoupled", 64))
    return result


def network(width: int, with_norm: bool) -> nn.Module:
    if not with_norm:
        return mup2_ref.MLP(D_IN, width, D_OUT)
    return nn.Sequential(
        nn.Linear(D_IN, width, bias=False),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.LayerNorm(width),
        nn.ReLU(),
        nn.Linear(width, D_OUT, bias=False),
    )


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
    mup2_ref.init_(model, base, parameterization=row.parameterization, gain=1.0)
    largest = max(0.0, *row.prediction().effect)
    groups = mup2_ref.param_groups(
        model,
        base,
        lr=0.1,
        rho=1e-4 * 2048**-largest,
        parameterization=row.parameterization,
        perturbation=row.perturbation,
        variant=row.variant,
        norm=row.norm,
        perturb=row.perturb,
    )
    optimizer = mup2_ref.SAM(groups, variant=row.variant)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    for _ in range(0 if row.parameterization == "sp" else 2):
        optimizer.step(closure)
    before_inputs = layer_inputs(model, probe)
    before = outputs(before_inputs)
    closure()
    gradient = {layer: layer.weight.grad.norm() for layer in before}
    optimizer.first_step()
    climbed_inputs = layer_inputs(model, probe)
    climbed = outputs(climbed_inputs)
    closure()
    optimizer.restore()
    effect = {layer: climbed[layer] - out for layer, out in outputs(climbed_inputs).items()}
    optimizer.base_optimizer.step()
    update = {layer: out - before[layer] for layer, out in outputs(before_inputs).items()}

    matrices = [layer for layer in before if isinstance(layer, nn.Linear)]
    norms = [layer for layer in before if isinstance(layer, nn.LayerNorm)]

    def rms(values: dict, layer: nn.Module) -> float:
        return values[layer].square().mean().sqrt().item()

    effects = [rms(effect, layer) for layer in matrices]
    if with_norm:
        effects = [float(np.mean([rms(effect, layer) for layer in norms])), float("nan"), float("nan")]
    return {
        "effect": effects,
        "update": [rms(update, layer) for layer in matrices],
        "gradient": [gradient[layer].item() for layer in matrices],
    }


def slopes(widths: list[int], values: np.ndarray) -> np.ndarray:
    """values: (width, seed, role) -> least-squares slope per role of the mean log over seeds against log n."""
    return np.polyfit(np.log(widths), np.log(values).mean(1), 1)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    from tqdm import tqdm

    table = rows()
    tasks = [(row, width, seed) for row in table for width in args.widths for seed in range(args.seeds)]
    tasks.sort(key=lambda task: -task[1])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(measure, *task) for task in tasks]
        measured = {task: f.result() for task, f in tqdm(list(zip(tasks, futures)), desc="measuring", mininterval=1)}

    results, worst = [], 0.0
    print(f"{'':4} {'':40}" + "".join(f"{q:^39}" for q in QUANTITIES) + " largest")
    heading = "".join(f"{role:>13}" for role in ROLES) * 3
    print(f"{'':4} {'predicted / measured exponent':40}{heading} deviation")
    for row in table:
        prediction = row.prediction()._asdict()
        result = {"table": row.table, "name": row.name, "exponents": row.exponents()._asdict(), "predicted": {}}
        result |= {"measured": {}, "values": {}}
        line, deviation = "", 0.0
        for quantity in QUANTITIES:
            values = np.array([[measured[row, w, s][quantity] for s in range(args.seeds)] for w in args.widths])
            slope = slopes(args.widths, values)
            for i in range(3):
                if np.isnan(slope[i]) or (row.perturb == "norm" and quantity == "gradient"):
                    line += f"{'-':>13}"  # LayerNorm makes the gradient of the matrix below it depend on its scale
                    continue
                line += f"{prediction[quantity][i]:+6.2f}/{slope[i]:+6.2f}"
                deviation = max(deviation, abs(prediction[quantity][i] - slope[i]))
            result["predicted"][quantity] = [x if np.isfinite(x) else None for x in prediction[quantity]]
            result["measured"][quantity] = [round(x, 4) if np.isfinite(x) else None for x in slope]
            geometric = np.exp(np.log(values).mean(1)).T.tolist()
            result["values"][quantity] = [
                [float(f"{x:.5g}") if np.isfinite(x) else None for x in role] for role in geometric
            ]
        worst = max(worst, deviation)
        result["deviation"] = round(deviation, 4)
        results.append(result)
        print(f"{row.table:4} {row.name:40}{line}   {deviation:.3f}{' <--' if deviation > args.tolerance else ''}")
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {"widths": args.widths, "seeds": args.seeds, "worst": worst, "rows": results}
    (args.out / "exponents.json").write_text(json.dumps(summary) + "\n")
    plot(args.widths, results, args.out / "exponents.png")
    print(f"\nlargest deviation of {len(table)} rows: {worst:.3f} (tolerance {args.tolerance})")
    return int(worst > args.tolerance)


def plot(widths: list[int], results: list[dict], path: Path) -> None:
    """Top: what each perturbation scaling of Table D.2 does to each layer; bottom: Table 1's muP² and D.1's updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_name = {(r["table"], r["name"]): r for r in results}
    top = [(("D.2", p), "effect", f"perturbation: {p}") for p in mup2_ref.PERTURBATIONS]
    bottom = [(("1", f"{v}, muP²"), "effect", f"{v}, muP²") for v in ("elementwise ASAM", "layerwise ASAM")]
    bottom += [(("D.1", p), "update", f"update: {p}") for p in ("sp-stable", "ntp", "mup")]
    figure, axes = plt.subplots(2, 5, figsize=(17, 7), sharex=True, layout="constrained")
    for axis, (key, quantity, title) in zip(axes.flat, top + bottom):
        for i, (role, color) in enumerate(zip(ROLES, ("tab:blue", "tab:orange", "tab:green"))):
            y = np.array(by_name[key]["values"][quantity][i], dtype=float)
            label = f"{role} {by_name[key]['measured'][quantity][i]:+.2f} ({by_name[key]['predicted'][quantity][i]:+g})"
            axis.loglog(widths, y / y[0], "o-", color=color, label=label)
        axis.set_title(title)
        axis.set_ylim(3e-3, 30)
        axis.set_xticks(widths, [str(w) for w in widths])
        axis.minorticks_off()
        axis.legend(title="measured slope (predicted)", fontsize=8, title_fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("width n")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"effect on the layer's output\nrelative to width {widths[0]}")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())

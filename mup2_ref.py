"""µP² SAM: the whole method in one file, to be read from top to bottom. It needs PyTorch and nothing else.

Haas, Xu, Cevher, Vankadara: "µP²: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling",
NeurIPS 2024, arXiv:2411.00075. The numbers of definitions, tables, appendices and algorithms below are the paper's.

SAM climbs from the weights w to w + e, computes the gradient there, returns to w, and descends along that gradient:

    e = rho * g / ||g||        g: the gradient at w.   ||g||: one joint norm over all layers.

The problem: in a wide network a few layers dominate the joint norm, and the perturbation of every other layer vanishes.
The solution: scale each layer's perturbation so that its effect on the layer's output does not depend on the width n.
In an MLP (h_1 = W_1 x, x_l = relu(h_l), h_{l+1} = W_{l+1} x_l) each layer has one of three roles: input (its fan_out
grows with n), hidden (fan_out and fan_in grow) or output (its fan_in grows). Definition 4 has these exponents:

    initialize    W_l ~ N(0, sigma² n^(-2 b_l))
    update        W_l <- W_l - lr n^(-c_l) dL/dW_l      with the gradient at W + e
    perturb       e_l = rho n^(-d) v_l / ||v||,         v_l = n^(-d_l) dL/dW_l,   ||v||² = sum of all ||v_l||²
For (input, hidden, output) µP has b = (0, 1/2, 1) and c = (-1, 0, 1). µP² adds d = -1/2 and d_l = (-1/2, 1/2, 3/2).

In practice (Algorithm 1) each tensor is compared with its counterpart in a narrow base model. Let r be the growth of
fan_out / fan_in from the base model to this one. The tensor's radius (and SGD's learning rate) is multiplied by r, and
its part of the joint norm by sqrt(r). At the base width all factors are 1 and µP² is plain SAM: by the theory the lr
and the rho that were tuned there stay nearly the best at every other width.

Left out here, and found in mup2_fused: compiled kernels, cheaper steps, 16-bit and distributed training, roles in any
architecture, perturbing normalization layers only (SAM-ON), deepcopy and pickle, and errors that explain themselves.
"""

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.functional import cross_entropy, linear
from torch.optim import SGD, Optimizer

# ---------------------------------------------------------------------------------- 1. Theory: exponents of the width
ROLES = ("input", "hidden", "output")
Triple = tuple[float, ...]  # one number for each role
PARAMETERIZATIONS: dict[str, tuple[Triple, ...]] = {  # Table D.1: b, c for SGD, c for Adam if known
    "sp": ((0, 0.5, 0.5), (0, 0, 0), (0, 0, 0)),  # standard: the exponents of PyTorch's default
    "sp-stable": ((0, 0.5, 0.5), (1, 1, 1)),
    "ntp": ((0, 0.5, 0.5), (0, 1, 1)),  # neural tangent
    "mup": ((0, 0.5, 1), (-1, 0, 1), (0, 1, 1)),  # maximal update
}
PERTURBATIONS = ("naive", "global", "effective")
VARIANTS = ("sam", "elementwise", "layerwise")  # elementwise and layerwise: adaptive SAM


class Exponents(NamedTuple):
    """A bcd-parameterization (Definition 4), for one variant of SAM around one kind of base optimizer."""

    b: Triple
    c: Triple
    dl: Triple
    d: float
    variant: str = "sam"
    base_optimizer: str = "sgd"  # or "adam", also for AdamW
    norm: str = "decoupled"  # the norm has factors of its own (Algorithm 1); "joint": it has n^(-d_l) (Definition 4)
    parameterization: str = "mup"  # the names of the table rows that these exponents come from
    perturbation: Any = "effective"


class Prediction(NamedTuple):
    """What a bcd-parameterization implies. A quantity with exponent a grows like n^a."""

    gradient: Triple  # Frobenius norm of dL/dW_l
    update: Triple  # change of the layer's output by the layer's update
    effect: Triple  # change of the layer's output by e_l. 0: effective, < 0: vanishes, > 0: blows up
    dominating: tuple[str, ...]  # the roles with the largest part of the joint norm of Definition 4
    stable: bool  # neither training nor the perturbation makes anything blow up
    feature_learning: bool


def unscaled(e: Exponents) -> tuple[Triple, Triple, Triple]:
    """Exponents without d and d_l (Appendix F.1): ||g_l||, the normalizer T, and the change of h_l by T² g_l."""
    k = min(e.b[2], e.c[2])  # after the first update the output weights, and so the gradient below them, have size n^-k
    size = {"sam": e.b, "elementwise": (0, 0, 0), "layerwise": (0.5, 1, 0.5)}[e.variant]
    T = tuple(x - y for x, y in zip(size, e.b))  # 1, or the typical |w| or ||W||_F of the initial weights
    # Hidden and output layers add up n inputs that correlate with g_l: the effect of T² g_l is n times larger there.
    return (0.5 - k, 1 - k, 0.5), T, tuple(x + 2 * t for x, t in zip((-k, 1 - k, 1), T))


def known(name: str, names: Any) -> str:
    if name not in tuple(names):
        raise ValueError(f"unknown name {name!r}; choose one of {', '.join(names)}")
    return name


def exponents(
    parameterization: str = "mup",
    perturbation: str = "effective",
    variant: str = "sam",
    *,
    base_optimizer: str = "sgd",
    norm: str = "decoupled",
) -> Exponents:
    """Rows of Tables 1, D.1 and D.2; ("mup", "effective") is µP². Others: exponents()._replace(d=..., dl=...).

    naive: SAM as it is. global: one radius for all layers, the largest stable one. effective: the exponent of every
    layer's effect is 0. ValueError for a name that is unknown, or that has no learning rates for Adam.
    """
    known(variant, VARIANTS), known(norm, ("decoupled", "joint")), known(perturbation, PERTURBATIONS)
    adam = known(base_optimizer, ("sgd", "adam")) == "adam"
    b, *c = PARAMETERIZATIONS[known(parameterization, ("sp", "mup") if adam else PARAMETERIZATIONS)]
    e = Exponents(b, c[adam], (0, 0, 0), 0, variant, base_optimizer, norm, parameterization, perturbation)
    gradient, T, effect = unscaled(e)
    parts = [g + t for g, t in zip(gradient, T)]  # of the joint norm, which has the largest part's exponent
    if perturbation == "global":  # the effect on the network's output must be bounded, too
        return e._replace(d=max(effect[0] + 1 - b[2], effect[1] + 1 - b[2], effect[2]) - max(parts))
    if perturbation == "effective":  # with d_l = effect - d the parts become parts - effect + d; d makes the largest 0
        d = min(x - y for x, y in zip(effect, parts))
        return e._replace(d=d, dl=tuple(x - d for x in effect))
    return e


def predict(e: Exponents) -> Prediction:
    """Which layers learn, which are perturbed effectively, and whether anything blows up (Appendix F.1)."""
    gradient, T, raw = unscaled(e)
    parts = [round(g + t - x, 9) for g, t, x in zip(gradient, T, e.dl)]  # rounded: 0.1 + 0.2 is not 0.3
    effect = tuple(round(y - e.d - x - max(parts), 9) for y, x in zip(raw, e.dl))
    k = 0 if e.base_optimizer == "adam" else min(e.b[2], e.c[2])  # Adam's steps do not depend on the gradient's size
    update = (-e.c[0] - k, 1 - e.c[1] - k, 1 - e.c[2])
    features = max(update[:2])  # how far the hidden activations move
    trains = features <= 0 and e.c[2] >= 1 and e.b[2] - features >= 1  # activations and network output stay bounded
    perturbs = max(effect) <= 0 and e.b[2] - max(effect[:2]) >= 1
    dominating = tuple(role for role, x in zip(ROLES, parts) if x == max(parts))
    return Prediction(gradient, update, effect, dominating, trains and perturbs, trains and features == 0)


MUP2 = exponents()


# ---------------------------------------------------------------------- 2. Parameter groups: exponents become factors
class Growth(NamedTuple):  # how many times larger a tensor's fans are than in the base model
    fan_out: float
    fan_in: float

    @property
    def role(self) -> str:
        """One of ROLES, or "finite" for a tensor that does not grow, such as the bias of the last layer."""
        return ("finite", "output", "input", "hidden")[2 * (self.fan_out != 1) + (self.fan_in != 1)]


def fans(module: Module, shape: torch.Size) -> tuple[int, int]:
    """(fan_out, fan_in) of a tensor in this module. A vector, such as a bias, is a layer with the single input 1."""
    if len(shape) == 1 or isinstance(module, nn.Embedding):
        return shape[-1], 1
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return shape[0], shape.numel() // shape[0]
    raise ValueError(f"cannot tell fans of {tuple(shape)} in a {type(module).__name__}: mup2_fused knows more modules")


def growths(model: Module, base: Module) -> dict[str, Growth]:
    """The growth of every parameter. base: the same architecture at the base width, maybe on the meta device."""
    found = {}
    for name, p in model.named_parameters():
        module, shape = model.get_submodule(name.rpartition(".")[0]), base.get_parameter(name).shape
        found[name] = Growth(*(n / n0 for n, n0 in zip(fans(module, p.shape), fans(module, shape))))
    return found


def growths_of_mup(model: Module) -> dict[str, Growth]:
    """growths() from p.infshape, which mup.set_base_shapes() sets (Algorithm 1). A single "infinite" dimension counts
    as fan_out, even in a MuReadout, because a MuReadout divides its input by the width."""
    shapes = {name: p.infshape for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    wide_dims = {name: [dim.width_mult() for dim in shape if dim.isinf()] for name, shape in shapes.items()}
    return {name: Growth(*(*dims, 1.0, 1.0)[:2]) for name, dims in wide_dims.items()}  # [f] -> (f, 1), [f, g] -> (f, g)


def power(x: list[float], growth: Growth, n: float | None) -> float:
    """n^(x_role), as fan_out^p fan_in^q n^s. n is None if fans grow by different factors: s must be 0 then."""
    s = x[0] + x[2] - x[1]  # 0 in µP². p + s = x_input, p + q + s = x_hidden, q + s = x_output
    if s and n is None:
        raise ValueError("this scaling needs one width, but this model's dimensions grow by different factors")
    return growth.fan_out ** (x[0] - s) * growth.fan_in ** (x[2] - s) * (n or 1.0) ** s


def initial_std(growth: Growth, e: Exponents) -> float:
    """n^(-b_l): the initial standard deviation divided by the base model's."""
    std = growth.fan_in ** -(e.b[2] if growth.fan_out == 1 else e.b[1])
    in_mup = e.b[2] == 1 and growth.role == "hidden"  # µP corrects hidden layers whose fan_in grows more than fan_out
    return std * (min(1.0, growth.fan_out / growth.fan_in) ** 0.5 if in_mup else 1.0)


def factors(e: Exponents, growth: Growth, n: float | None) -> tuple[float, float, float]:
    """A tensor's factors: n^(-c_l) for lr, n^(-d - d_l) for rho, and gradnorm_scaling, its factor in the joint norm.
    gradnorm_scaling keeps each layer's part of the norm at Theta(1) (Algorithm 1), or is n^(-d_l) with norm="joint".
    Adaptive SAM's normalizer T grows by t, which is n^(exponent of T) only if all fans grow by n: t corrects this."""
    gradient, of_T, _ = unscaled(e)
    lr = power([-x for x in e.c], growth, n)
    if not any(e.dl):
        return lr, power([-e.d] * 3, growth, n), 1.0
    std = initial_std(growth, e)
    t = {"sam": 1.0, "elementwise": std, "layerwise": std * math.prod(growth) ** 0.5}[e.variant]
    numerator = [2 * y - x for x, y in zip(e.dl, of_T)]
    rho = power([x - e.d for x in numerator], growth, n) / t**2
    norm = power(numerator, growth, n) / t**2 if e.norm == "joint" else power([-x for x in gradient], growth, n) / t
    return lr, rho, norm


def param_groups(
    model: Module, base: Module | None, scaling: Exponents = MUP2, *, lr: float, rho: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for SAM, with every tensor's lr, rho and gradnorm_scaling; lr * weight_decay is the same at every width.

    base: the same architecture at the width where lr and rho were tuned; None for a model of the mup package.
    """
    grown = growths_of_mup(model) if base is None else growths(model, base)
    widths = {x for growth in grown.values() for x in growth if x != 1}
    n = max(widths, default=1.0) if len(widths) < 2 else None
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        of_lr, of_rho, of_norm = factors(scaling, grown[name], n)
        settings = dict(role=grown[name].role, lr=lr * of_lr, weight_decay=weight_decay / of_lr, rho=rho * of_rho)
        settings |= dict(gradnorm_scaling=of_norm, perturb=True, variant=scaling.variant)
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": []} | settings)
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


@torch.no_grad()
def init_(model: Module, base: Module, scaling: Exponents = MUP2) -> Module:
    """Draw matrices with std sqrt(2 / fan_in) at the base width and n^(-b_l) times that elsewhere; biases become 0."""
    for name, growth in growths(model, base).items():
        p, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            std = (2 / fans(module, base.get_parameter(name).shape)[1]) ** 0.5
            p.normal_(0, std * initial_std(growth, scaling)) if p.ndim > 1 else p.zero_()
    return model


# ------------------------------------------------------------------------------------------------------------- 3. SAM
EPS = 1e-12  # avoids 0 / 0 where the norm is 0
norm64 = partial(torch.linalg.vector_norm, dtype=torch.float64)  # Frobenius norm; it neither overflows nor loses terms
ORDER = "call first_step() and second_step() in turn, each after a backward pass; step(closure) does both"


def wide(x: Tensor) -> Tensor:  # 16-bit numbers become float32
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalizer(w: Tensor, variant: str) -> Tensor | float:
    """T: 1 for SAM, |w| for elementwise and ||w||_F for layerwise adaptive SAM."""
    if variant == "sam":
        return 1.0
    return wide(w).abs() if variant == "elementwise" else norm64(w)


def contribution(w: Tensor, g: Tensor, scaling: float, variant: str) -> Tensor:
    """scaling * ||T g||, one tensor's part of the joint norm: a float64 scalar."""
    T = normalizer(w, variant)
    return scaling * (norm64(wide(g) * T) if variant == "elementwise" else T * norm64(g))


def joint_norm(tensors: list[tuple[Tensor, Tensor, float]], variant: str) -> Tensor:
    """sqrt(sum of all contribution²) over triples (w, g, scaling): a float64 scalar, 0 if there are none."""
    parts = [contribution(w, g, scaling, variant) for w, g, scaling in tensors]
    return norm64(torch.stack([x.to(parts[0].device) for x in parts])) if parts else torch.zeros(()).double()


def perturb_(w: Tensor, g: Tensor, coefficient: Tensor, variant: str) -> None:
    """w <- w + coefficient T² g, computed in float32 or wider and rounded once to w's type."""
    w, g = torch.atleast_1d(w, g)  # with 0-d tensors torch would compute in the coefficient's float64
    T = normalizer(w, variant)
    w.copy_(wide(w) + wide(g) * (T * T * coefficient.to(w.device)))


class SAM(Optimizer):
    """Sharpness-aware minimization around a torch optimizer; with the groups above, µP² (Algorithm 1).

        norm = sqrt(sum_l (gradnorm_scaling_l ||T g_l||)²)        e_l = rho_l T² g_l / norm

    Groups may set rho, gradnorm_scaling, variant, and perturb=False (not in e, not in norm). Groups and state are
    shared with the base optimizer. Call step(closure), or first_step() and second_step(), each after a backward pass.
    """

    def __init__(
        self, params: Any, base_optimizer: Any = SGD, *, rho: float = 0.05, variant: Any = None, **base_kwargs: Any
    ) -> None:
        super().__init__(params, dict(rho=rho, gradnorm_scaling=1.0, perturb=True, variant=variant or "sam"))
        self.variant = known(variant or self.param_groups[0]["variant"], VARIANTS)
        if any(group["variant"] != self.variant for group in self.param_groups):
            raise ValueError(f"some groups are scaled for another variant of SAM than {self.variant!r}")
        self.backup: list[tuple[Tensor, Tensor]] | None = None  # between the passes: (w, its value before the climb)
        self.base_optimizer: Optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults |= self.base_optimizer.defaults
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb: w <- w + e, for every w that has a gradient."""
        if self.backup is not None:
            raise RuntimeError(ORDER)
        climbing = [(p, s) for s in self.param_groups if s["perturb"] for p in s["params"] if p.grad is not None]
        norm = joint_norm([(p, p.grad, settings["gradnorm_scaling"]) for p, settings in climbing], self.variant)
        self.backup = [(p.detach(), p.detach().clone()) for p, _ in climbing]
        for p, settings in climbing:
            perturb_(p, p.grad, settings["rho"] / (norm + EPS), self.variant)

    def second_step(self) -> None:
        self.step()

    def step(self, closure: Any = None) -> Any:
        """Return to w and update w. A closure (zero_grad, forward, backward) runs at w and at w + e first."""
        loss = closure() if closure else None
        if closure:
            self.first_step()
        if self.backup is None:
            raise RuntimeError(ORDER)
        try:
            if closure:
                closure()
        finally:
            for w, before in self.backup:
                w.copy_(before)  # a copy restores every bit; subtracting e would not
            self.backup = None
        self.base_optimizer.step()
        return loss


# --------------------------------------------------------------------------------------------------------- 4. Example
class MLP(Module):
    """The paper's ReLU MLP without biases: (batch, ...) with d_in values per sample -> (batch, d_out)."""

    def __init__(self, d_in: int, width: int, d_out: int, hidden_layers: int = 2) -> None:
        super().__init__()
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def effects(width: int, scaling: Exponents, x: Tensor, y: Tensor) -> list[float]:
    """Train an MLP, and return how far e_l moves each layer's output in the last step: the rms of e_l x_{l-1}."""
    torch.manual_seed(0)
    model = init_(MLP(40, width, 10), base := MLP(40, 64, 10), scaling)
    model.get_parameter("layers.2.weight").data.zero_()  # random first outputs would add noise at small widths
    opt = SAM(param_groups(model, base, scaling, lr=0.5, rho=0.01), SGD)
    for _ in range(5):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.first_step()
        found, h = [], x
        for w, before in opt.backup or ():
            found.append(linear(h, w - before).square().mean().sqrt().item())
            h = linear(h, w).relu()
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.second_step()
    return found


def main(widths: tuple[int, ...] = (64, 256, 1024)) -> None:
    """Print what theory predicts for each layer and what training shows, for SAM in µP and for µP²."""
    torch.manual_seed(0)
    x, teacher = torch.randn(256, 40), torch.randn(40, 10)
    print("How far e moves each layer's output (rms), and how that grows with the width n. The aim is n^0:")
    for title, scaling in {"SAM in µP": exponents("mup", "naive"), "µP²": MUP2}.items():
        found = zip(*(effects(n, scaling, x, (x @ teacher).argmax(1)) for n in widths))
        print(f"\n{title:<10} predicted  measured " + "".join(f"{'width ' + str(n):>13}" for n in widths))
        for role, predicted, sizes in zip(ROLES, predict(scaling).effect, found):
            measured = math.log(sizes[-1] / sizes[0]) / math.log(widths[-1] / widths[0])
            print(f"{role:<10} n^{predicted:<+8.1f} n^{measured:<+8.2f}" + "".join(f"{size:>13.1e}" for size in sizes))


if __name__ == "__main__":
    main()

"""Parameters, gradients, losses, steps and modules that several tests take, also tests outside of this folder."""

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("sam", "elementwise", "layerwise")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BASES = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
WAYS = [  # options of steps with less than two passes
    dict(interval=3, momentum=0.9),
    dict(ascent="momentum", momentum=0.9),
    dict(interval=2, base_optimizer=torch.optim.AdamW),
    dict(ascent="momentum", base_optimizer=torch.optim.AdamW),
]


def blocks(page):
    """The Python code of a page, such as docs/training.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def block(page, word):
    """The one block of the page with this word in it."""
    (found,) = (code for code in blocks(page) if word in code)
    return found


def parameters(dtype=torch.float32, shapes=((5, 3), (7,), (2, 3, 4))):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(params, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape, dtype=torch.float64) * scale).to(p.dtype)


def two_steps(opt, params):
    """A whole step, with random gradients in both passes."""
    set_gradients(params)
    opt.first_step()
    set_gradients(params)
    opt.second_step()


def ones_step(opt, params, value=1.0):
    """A whole step in which all gradients are value, and then 1."""
    for number in (value, 1.0):
        for p in params:
            p.grad = torch.full_like(p, number)
        opt.first_step() if opt.phase.backups is None else opt.second_step()


def weights(params):
    return [p.detach().clone() for p in (params.parameters() if isinstance(params, nn.Module) else params)]


def equal(xs, ys):
    """Bit for bit: tells -0.0 from 0.0 and takes NaN as equal to itself."""
    as_bytes = lambda t: t.detach().reshape(-1).contiguous().view(torch.uint8)
    return all(torch.equal(as_bytes(x), as_bytes(y)) for x, y in zip(xs, ys, strict=True))


def assert_close(xs, ys, rtol=1e-9, atol=1e-12):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=rtol, atol=atol)


def quadratic(params):
    """A loss whose gradient depends on w, so that the two passes differ."""
    return sum(((p - 0.3) ** 4).sum() + p.sin().sum() for p in params)


def closure_of(opt, params, loss=quadratic, zero=True):
    """zero=False: it adds to the gradients that are there."""

    def closure():
        if zero:
            opt.zero_grad()
        value = loss(params)
        value.backward()
        return value.detach()

    return closure


def step_by(form, opt, closure):
    """One step; returns the first loss. form: "bare" for an optimizer without SAM, "closure" or "two steps"."""
    if form == "closure":
        return opt.step(closure)
    loss = closure()
    if form == "two steps":
        opt.first_step()
        closure()
        opt.second_step()
    else:
        opt.step()
    return loss


def train_closure(opt, model, x, y):
    return closure_of(opt, None, lambda _: nn.functional.cross_entropy(model(x), y))


def classification(model):
    """(model, inputs, targets) for a model with 5 inputs and 3 classes."""
    return model, torch.randn(12, 5), torch.randint(3, (12,))


def backward(model, x, y):
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


class Raw(nn.Module):
    """A tensor of which no module tells what it is."""

    def __init__(self, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))


class Tied(nn.Module):
    """An embedding that is the readout, too."""

    def __init__(self, n):
        super().__init__()
        self.embed, self.head = nn.Embedding(500, n), nn.Linear(n, 500, bias=False)
        self.head.weight = self.embed.weight


def by_name(groups):
    """name of a parameter -> its group"""
    return {name: group for group in groups for name in group["names"]}

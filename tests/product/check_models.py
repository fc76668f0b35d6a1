"""Models and parameter groups for the tests of the perturbation check."""

from torch import nn
from torch.nn import functional as F

from mup2_fused import exponents, init_, param_groups

WIDTHS = [32, 64, 128, 256]
LR, RHO = 0.02, 0.02


class Net(nn.Module):
    """An MLP with biases and a normalization."""

    def __init__(self, n):
        super().__init__()
        self.first, self.norm = nn.Linear(20, n), nn.LayerNorm(n)
        self.hidden, self.head = nn.Linear(n, n), nn.Linear(n, 10)

    def forward(self, x):
        return self.head(F.relu(self.hidden(F.relu(self.norm(self.first(x))))))


def initialised(model):
    return init_(model, Net(WIDTHS[0]))


def correct(scaling=exponents(), change=lambda group: group, **kwargs):  # noqa: B008 (immutable)
    """A user's function that makes groups: right ones, but for the change."""

    def groups(model):
        initialised(model)
        return [change(group) for group in param_groups(model, Net(WIDTHS[0]), scaling, lr=LR, rho=RHO, **kwargs)]

    return groups

"""The optimizers of torch and of the package pytorch_optimizer as the base of SAM.

At rho=0 SAM must be the bare optimizer to the bit, and at other radii the reference around the same base.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from small_problems import assert_close, closure_of, equal, step_by, two_steps, weights
from torch import nn

import mup2_fused as mup2
import mup2_ref

CANNOT = {"Optimizer", "LBFGS", "SparseAdam", "Adadelta"}  # tests/product/test_sam_phases.py has their errors
TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in CANNOT
)
# Of pytorch_optimizer: those that need more than parameters, and those that cannot be a base.
USE_MUON = {"muon", "adamuon", "adago", "normuon", "muonclip"}  # a key of their groups
MATRICES_ONLY = {"spectralsphere"}
OPTIONS = {"ranger21": dict(num_iterations=100), "adashift": dict(keep_num=2)}
UNUSABLE = {
    "adadelta": "has a rho of its own",
    "bsam": "is a SAM itself",
    "lbfgs": "evaluates the loss inside its step",
    "alig": "needs the loss in its step",
    "adahessian": "differentiates the gradient at w + e when the weights are at w again",
    "sophiah": "differentiates the gradient at w + e when the weights are at w again",
    "adammini": "takes a model instead of groups",
    "lomo": "takes a model instead of groups",
    "adalomo": "takes a model instead of groups",
    "lorarite": "takes pairs of matrices of LoRA only",
    "demo": "needs the package einops and several processes",
    "distributedmuon": "needs several processes",
    "magma": "wraps an optimizer",
}
FEW = {"lion", "muon", "ranger21", "schedulefreeadamw", "spam"}


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer for its optimizers")


class Network(nn.Module):
    """Matrices; also a convolution, a bias and a normalization if not only matrices are wanted."""

    def __init__(self, matrices_only=False):
        super().__init__()
        torch.manual_seed(1)
        matrices = [nn.Flatten(), nn.Linear(32, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)]
        others = [nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), *matrices, nn.LayerNorm(3)]
        self.layers = nn.Sequential(*(matrices if matrices_only else others))
        self.x, self.y = torch.randn(10, 2, 4, 4), torch.randint(3, (10,))

    def forward(self):
        return nn.functional.cross_entropy(self.layers(self.x), self.y)


def groups_of(model, name):
    params = list(model.parameters())
    if name not in USE_MUON:
        return [{"params": params}]
    return [{"params": [p for p in params if (p.ndim > 1) == muon], "use_muon": muon} for muon in (False, True)]


def train(model, opt, form, steps):
    """steps: a range. form: of step_by."""
    base = getattr(opt, "base_optimizer", opt)
    getattr(base, "train", lambda: None)()  # schedule-free ones have two modes
    for step in steps:

        def loss(_):
            torch.manual_seed(step), np.random.seed(step)  # some bases draw random numbers
            return model()

        step_by(form, opt, closure_of(opt, None, loss))
    getattr(base, "eval", lambda: None)()


def trained(make, name, form):
    """Weights after some steps. make: groups -> optimizer."""
    model = Network(name == "Muon" or name in MATRICES_ONLY)
    start, opt = weights(model), make(groups_of(model, name))
    train(model, opt, form, range(7))  # some bases, such as RAdam, move nothing in their first steps
    assert not equal(weights(model), start)
    return weights(model)


def assert_resumes(make, name):
    """After saving and loading, training goes on with the same bits."""
    model = Network(name in MATRICES_ONLY)
    opt = make(groups_of(model, name))
    train(model, opt, "closure", range(4))
    other = copy.deepcopy(model)
    another = make(groups_of(other, name))
    another.load_state_dict(copy.deepcopy(opt.state_dict()))
    with torch.no_grad():  # some bases change weights when they are made
        for p, q in zip(model.parameters(), other.parameters()):
            q.copy_(p)
    for both in ((model, opt), (other, another)):
        train(*both, "two steps", range(4, 8))
    assert_close(model.parameters(), other.parameters(), rtol=0, atol=0)


def assert_same(SAM, base, name, **options):
    """At rho=0 the bare optimizer, in both forms; at rho=0.5 the reference."""
    kernels = SAM.keywords["backend"] == "compiled"
    close = partial(assert_close, rtol=1e-5, atol=1e-7)
    exact = partial(assert_close, rtol=0, atol=0)
    # The kernels' square root is correctly rounded, that of torch on the CPU is not.
    same = close if kernels and base in (torch.optim.Adam, torch.optim.AdamW) else exact
    base = partial(base, **options)
    bare = trained(base, name, "bare")
    for form in ("closure", "two steps") if name in TORCH else ("two steps",):
        same(trained(partial(SAM, base_optimizer=base, rho=0.0), name, form), bare)
    ours = trained(partial(SAM, base_optimizer=base, rho=0.5), name, "closure")
    assert not equal(ours, bare)
    if name in TORCH or not kernels:  # the kernels may climb one rounding further, which some bases magnify
        reference = trained(partial(mup2_ref.SAM, base_optimizer=base, rho=0.5), name, "closure")
        (close if kernels else exact)(ours, reference)


@pytest.mark.parametrize("name", TORCH)
def test_torch(SAM, name):
    assert_same(SAM, getattr(torch.optim, name), name)


@pytest.mark.filterwarnings("ignore")  # of the package, about options and deprecated calls
@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_pytorch_optimizer(SAM, peer, which):
    names = FEW if which == "few" else set(peer.get_supported_optimizers()) - UNUSABLE.keys() - FEW
    wrong = {}
    for name in sorted(names):
        try:
            base, options = peer.load_optimizer(name), OPTIONS.get(name, {})
            assert_same(SAM, base, name, **options)
            assert_resumes(partial(SAM, base_optimizer=base, rho=0.5, **options), name)
        except Exception as error:  # noqa: BLE001 - shown below, with those of the other names
            wrong[name] = repr(error)
    assert not wrong and len(names) >= len(FEW)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("name, words", [("alig", "closure"), ("adahessian", "inplace"), ("sophiah", "inplace")])
def test_a_base_that_fails_leaves_the_weights_as_they_were(SAM, peer, name, words):
    model = Network()
    before, opt = weights(model), SAM(model.parameters(), peer.load_optimizer(name), rho=0.5)

    def closure():
        opt.zero_grad()
        loss = model()
        loss.backward(create_graph=True)
        return loss

    with pytest.raises(Exception, match=words):
        opt.step(closure)
    assert equal(weights(model), before)


def test_bases_that_are_refused(SAM, peer):
    """Those with settings of SAM's names, other SAMs, and wrappers, by class or from a function."""
    sgd = torch.optim.SGD
    a2grad = lambda groups: peer.A2Grad(groups, variant="exp")
    own = {base: r"has settings of its own in its groups .*\(rho\)" for base in (peer.AdaDelta, a2grad)}
    sams = (peer.SAM, peer.LookSAM, peer.FriendlySAM, mup2_ref.SAM, SAM)
    nested = {partial(kind, base_optimizer=sgd, lr=0.1): "a SAM cannot be the base" for kind in sams}
    nested |= dict.fromkeys((partial(peer.BSAM, num_data=9), mup2.SAM, mup2_ref.SAM), "a SAM cannot be the base")
    kinds = (peer.Lookahead, peer.TRAC, peer.OrthoGrad, peer.PCGrad, peer.ScheduleFreeWrapper, peer.Magma)
    wrappers = {lambda groups, kind=kind: kind(sgd(groups)): "wraps an optimizer: put it around SAM" for kind in kinds}
    for base, words in (own | nested | wrappers).items():
        with pytest.raises(TypeError, match=words):
            SAM([nn.Parameter(torch.ones(3))], base)


@pytest.mark.parametrize("name", ["Lookahead", "TRAC"])
def test_wrappers_go_around_sam(SAM, peer, name):
    """Lookahead(SAM(...)) is, at rho=0, Lookahead(SGD(...))."""
    wrapper, sgd = getattr(peer, name), partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    inside = lambda groups: wrapper(SAM(groups, sgd, rho=0.0))
    assert equal(trained(inside, name, "closure"), trained(lambda groups: wrapper(sgd(groups)), name, "bare"))


@pytest.mark.parametrize("form", ["closure", "two steps"])
def test_hooks_are_called_once_for_each_step(SAM, form):
    """Those of SAM around those of its base; and those of states."""
    params, calls = [nn.Parameter(torch.ones(3))], []
    opt = SAM(params, torch.optim.RMSprop, lr=0.1)
    note = lambda name: lambda optimizer, *_: calls.append((name, optimizer is opt))
    for of in (opt, opt.base_optimizer):
        of.register_step_pre_hook(note("pre")), of.register_step_post_hook(note("post"))
    for _ in range(2):
        two_steps(opt, params) if form == "two steps" else opt.step(closure_of(opt, params))
    assert calls == [("pre", True), ("pre", False), ("post", False), ("post", True)] * 2
    calls.clear()
    names = ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    for name in names:
        getattr(opt, f"register_{name}_hook")(note(name))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert [name for name, _ in calls] == names


def test_names_of_parameters(SAM):
    """model.named_parameters() may be given; groups, copies and states keep the names."""
    model = nn.Linear(3, 2)
    opt = SAM([{"params": [("w", model.weight)]}, {"params": [("b", model.bias)], "rho": 0.3}], torch.optim.Adam)
    two_steps(opt, list(model.parameters()))
    opt.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    for groups in (opt.base_optimizer.param_groups, copy.deepcopy(opt).param_groups, opt.state_dict()["param_groups"]):
        assert [group["param_names"] for group in groups] == [["w"], ["b"], ["extra"]]
    bare = torch.optim.Adam(model.named_parameters(), lr=0.3)
    other = SAM(model.parameters(), torch.optim.Adam)
    other.load_state_dict(bare.state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias"] and other.param_groups[0]["lr"] == 0.3

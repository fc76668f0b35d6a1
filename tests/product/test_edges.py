"""Cases at the edge of what SAM accepts: float8 weights, a counter that is set, replaced groups."""

import copy
import math

import pytest
import torch
from torch import nn

import mup2_fused as mup2


def ones(dtype=torch.float32, requires_grad=True):
    return nn.Parameter(torch.ones(4).to(dtype), requires_grad)


def step(opt, w, first=1.0):
    """One SAM step with the gradient `first` at w and the gradient 1 at w + e."""
    for gradient, half in ((first, opt.first_step), (1.0, opt.second_step)):
        w.grad = torch.full_like(w, gradient)
        half()


def test_a_frozen_float8_parameter_does_not_keep_the_kernels_away():
    w, frozen = ones(), ones(torch.float8_e5m2, requires_grad=False)
    opt = mup2.SAM([w, frozen], lr=0.5, backend="compiled")
    step(opt, w)
    assert opt.passes.norms()[0] == 2.0, "the kernels have computed the norm"
    assert torch.equal(w, ones() * 0.5) and torch.equal(frozen.float(), ones())


def test_a_group_that_is_refused_is_not_added():
    w = ones()
    opt = mup2.SAM([w], lr=0.5, backend="compiled")
    with pytest.raises(RuntimeError, match="not for torch.float8_e5m2"):
        opt.add_param_group({"params": [ones(torch.float8_e5m2)]})
    assert [len(x.param_groups) for x in (opt, opt.base_optimizer, copy.deepcopy(opt))] == [1, 1, 1]
    step(opt, w)
    assert torch.equal(w, ones() * 0.5)


def test_skipped_steps_can_be_set(SAM):
    w = ones()
    opt = SAM([w], lr=0.5)
    for value in (7, 0):
        step(opt, w, first=math.nan)
        opt.skipped_steps = value
        step(opt, w, first=math.nan)
        assert opt.skipped_steps == value + 1


def test_the_next_step_uses_a_new_list_of_groups(SAM):
    w = ones()
    opt = SAM([w], lr=0.5)
    opt.param_groups = [group | {"lr": 0.0} for group in opt.param_groups]
    step(opt, w)
    assert torch.equal(w, ones())

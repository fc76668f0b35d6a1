"""Cases at the edge of what SAM accepts: float8 weights, replaced groups, an interrupt, a wrong MUP2_CPU."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import mup2_fused as mup2
import mup2_ref


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


def test_a_group_without_a_variant_does_not_fit_an_adaptive_one(SAM):
    groups = [{"params": [ones()], "variant": "elementwise"}, {"params": [ones()]}]
    for order in (groups, groups[::-1]):
        with pytest.raises(ValueError, match="different variants of SAM, 'elementwise' and 'sam'"):
            SAM(order, lr=0.5)


def test_an_interrupt_in_the_second_pass_of_the_reference_restores_the_weights():
    layer, seen = nn.Linear(5, 3), []
    before = layer.weight.detach().clone()

    def interrupt_the_second_pass(*_):
        seen.append(torch.equal(layer.weight, before))
        if len(seen) == 2:
            raise KeyboardInterrupt

    layer.register_forward_hook(interrupt_the_second_pass)
    batch = torch.randn(12, 5), torch.randint(3, (12,))
    with pytest.raises(KeyboardInterrupt):
        mup2.train_epoch(layer, mup2_ref.SAM(layer.parameters(), lr=0.5), [batch])
    assert seen == [True, False] and torch.equal(layer.weight, before)


def test_an_unknown_instruction_set_stops_the_import():
    where = {"cwd": os.path.dirname(mup2_ref.__file__), "env": os.environ | {"MUP2_CPU": "bad"}}
    done = subprocess.run([sys.executable, "-c", "import mup2_fused"], **where, capture_output=True, check=False)
    assert done.returncode and b"MUP2_CPU is baseline, avx2 or avx512, not bad" in done.stderr

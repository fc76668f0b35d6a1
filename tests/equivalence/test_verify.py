"""`python -m mup2_fused.verify`: it passes here, for all types, and it fails when something is wrong."""

import re

import pytest
import torch

import mup2_fused
from mup2_fused import compiled_passes, verify
from mup2_ref import VARIANTS

CHECKS = ["norm", "perturbation", "restore", "update", "20 steps", "20 steps, interval", "20 steps, momentum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_row_passes(device, dtype):
    model = verify.Odd().to(device, dtype)
    for variant in VARIANTS:
        for base in verify.BASES:
            rows = list(verify.verify(model, verify.smooth, variant, base))
            assert [(r.check, r.backend) for r in rows] == [(c, b) for c in CHECKS for b in verify.BACKENDS]
            for row in rows:
                assert row.passed, row
                same_order = dtype == torch.float32 and base == "sgd" and mup2_fused.instruction_set != "baseline"
                exact = row.backend == "torch" or (same_order and device == "cpu" and row.check != "norm")
                # Another order in the norm's sum shows in the last digits of a perturbation in float64 only.
                if exact or (row.check == "perturbation" and dtype != torch.float64):
                    assert row.error == 0, f"not equal to the reference bit for bit: {row}"


def test_the_bound_is_twice_the_references_error_and_one_unit():
    reference, exact = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.0 + 1e-6], dtype=torch.float64)]
    error, bound = verify.error_and_bound([torch.tensor([1.0, 2.0 + 4e-6])], reference, exact)
    assert error == pytest.approx(3e-6, rel=0.1) and bound == pytest.approx(2e-6 + 2 * 1.19e-7, rel=0.05)
    assert verify.error_and_bound(reference, reference, exact) == (0, 0)
    assert verify.error_and_bound([torch.tensor([1.0, torch.nan])], reference, exact)[0] == torch.inf
    assert not verify.Row("update", "sam", "sgd", "torch", float("nan"), 1.0).passed


@pytest.mark.parametrize("backend", verify.BACKENDS)
def test_it_fails_when_something_is_wrong(backend, monkeypatch, capsys):
    monkeypatch.setattr(mup2_fused.SAM, "restore", lambda opt: setattr(opt.phase, "backups", None))
    monkeypatch.setattr(verify, "STEPS", 2)
    assert verify.main(["--backend", backend]) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"restore +sam +sgd +{backend} .*FAILED", printed) and "FAILED: " in printed


def after_climbing(change):
    """SAM._climb, with which ascent by momentum goes wrong. change(w, w + e) happens in place."""
    climb = mup2_fused.SAM._climb

    @torch.no_grad()
    def wrong(optimizer, groups, process_group):
        climb(optimizer, groups, process_group)
        for p, before in optimizer.phase.backups if optimizer.moments else ():
            change(before, p)

    return wrong


MISTAKES = {  # name -> (attribute of SAM, its wrong value, the check that must fail)
    "along the momentum": ("_climb", after_climbing(lambda before, p: p.copy_(2 * before - p)), "momentum"),
    "no climb by momentum": ("_climb", after_climbing(lambda before, p: p.copy_(before)), "momentum"),
    "by another moment": ("moments", property(lambda opt: opt.moment and (opt.state, "exp_avg_sq")), "momentum"),
    "always SAM": ("climbs", True, "interval"),
    "never SAM": ("climbs", False, "interval"),
    "SAM in every second step": ("climbs", property(lambda opt: opt.phase.steps % 2 == 0), "interval"),
    "SAM in the last step of an interval": ("climbs", property(lambda opt: opt.phase.steps % 4 == 3), "interval"),
}


@pytest.mark.parametrize("backend", verify.BACKENDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_fails_when_cheaper_steps_are_wrong(mistake, backend, monkeypatch):
    """And only for the way of climbing that is wrong."""
    attribute, value, failing = MISTAKES[mistake]
    monkeypatch.setattr(mup2_fused.SAM, attribute, value)
    base = "adamw" if mistake == "by another moment" else "sgd"
    rows = list(verify.verify(verify.Odd(), verify.smooth, "sam", base, backends=(backend,)))
    assert [r.check for r in rows if not r.passed] == [f"20 steps, {failing}"]


def test_without_the_compiled_part_it_verifies_the_other_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(verify, "STEPS", 2)
    monkeypatch.setattr(compiled_passes, "compiled", False)
    monkeypatch.setattr(compiled_passes, "missing", "the compiled part is missing: build it")
    assert verify.main([]) == 0
    printed = capsys.readouterr().out
    assert "The compiled backend is not verified: the compiled part is missing: build it." in printed
    assert "Passed: 42 checks, 42 exact" in printed
    with pytest.raises(RuntimeError, match="build it"):
        verify.main(["--backend", "compiled"])


def test_it_takes_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Linear(3, 2), lambda m: m(torch.ones(1, 3)).square().sum()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert verify.main(["--model", "mine:net"]) == 0
    assert "mine:net" in capsys.readouterr().out
    for name, words in {"mine": "expected module:name", "mine:absent": "must be importable from here"}.items():
        with pytest.raises(SystemExit, match="2"):
            verify.main(["--model", name])
        assert words in capsys.readouterr().err

"""What users of mypy see: an error in each line below that is marked as wrong, and in no other."""

import re
import subprocess
import sys

import pytest
from small_problems import ROOT

GROUPS = """
import torch
from torch import Tensor, nn
import mup2_fused as mup2
import mup2_ref
from mup2_fused.check import Report, check

def network(width: int) -> nn.Module:
    return mup2.MLP(3, width, 2)

model, base = network(8), network(4)
own = mup2.exponents("mup", (0.5, (0.0, 0.5, 1.0)), norm="joint")
groups = MODULE.param_groups(model, base, mup2.exponents("mup", "global"), lr=0.1, rho=0.1)
MODULE.param_groups(model, base, lr="0.1", rho=0.1)  # wrong
MODULE.param_groups(model, base, lr=0.1)  # wrong
MODULE.param_groups(model, base, "mup", lr=0.1, rho=0.1)  # wrong
MODULE.init_(model, base, own).eval()
radius: float = MODULE.exponents("mup").d
stable: str = MODULE.predict(own).stable  # wrong
opt = MODULE.SAM(groups, torch.optim.AdamW, rho=0.1, variant="sam", weight_decay=0.1)
MODULE.SAM(model.parameters(), lr=0.1, momentum=0.9)
MODULE.SAM(groups, rho="0.1")  # wrong
MODULE.SAM(groups, torch.optim.SGD, 0.1)  # wrong
MODULE.SAM()  # wrong

def closure() -> Tensor:
    opt.zero_grad()
    return mup2.accumulate(model, [(torch.ones(1, 3), torch.ones(1))], nn.functional.cross_entropy)

opt.step(closure)
opt.first_step()
opt.second_step()
torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
"""
PRODUCT = """
mup2.param_groups(model, lr=None, rho=0.1, perturb=lambda name, p: p.ndim > 1)
mup2.param_groups(model, base, lr=0.1, rho=0.1, perturb=3)  # wrong
mup2.init_(model, base, roles={"layers.0.weight": "input"}, gain=1.0, zero_output=True)
mup2.init_(model, base, roles=["input"])  # wrong
mup2.SAM(groups, backend="torch", skip_nonfinite=True, same_randomness=True)
mup2.SAM(groups, base_optimizer=torch.optim.SGD(groups))  # wrong
opt.step(3)  # wrong
opt.second_step(zero_grad="yes")  # wrong
opt.restore()
with opt.perturbed(), mup2.frozen_buffers(model):
    closure()
with opt.restore():  # wrong
    pass
skipped: int = opt.skipped_steps
skipped = opt.state_dict()  # wrong
mup2.accumulate(model, [torch.ones(3)])  # wrong
loss: Tensor = mup2.train_epoch(model, opt, [(torch.ones(1, 3), torch.ones(1))], scaler=torch.amp.GradScaler())
mup2.train_epoch(model, model, [])  # wrong
report: Report = check(network, [4, 8], lr=0.1)
check(network, "4")  # wrong
"""


def test_annotations_accept_right_calls_and_refuse_wrong_ones(tmp_path):
    pytest.importorskip("mypy")
    sources = {"reference": GROUPS.replace("MODULE", "mup2_ref"), "product": GROUPS.replace("MODULE", "mup2") + PRODUCT}
    for name, text in sources.items():
        (tmp_path / f"{name}_usage.py").write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *tmp_path.glob("*.py")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"(\w+)_usage.py:(\d+): error:", printed.stdout)
    lines = [(name, str(n), line) for name, text in sources.items() for n, line in enumerate(text.splitlines(), 1)]
    wrong = [(name, n) for name, n, line in lines if line.endswith("# wrong")]
    assert set(found) == set(wrong) and len(wrong) == 24, printed.stdout + printed.stderr

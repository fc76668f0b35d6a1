import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
torch.set_num_threads(1)  # small tensors; steadier times when tests share the machine

import mup2_fused
import mup2_ref

IMPLEMENTATIONS = {"mup2_ref": mup2_ref.SAM, "mup2_fused": mup2_fused.SAM}


@pytest.fixture(params=IMPLEMENTATIONS)
def SAM(request):
    """Every implementation of the optimizer: what holds for the reference holds for the others."""
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "benchmarks")]
torch.set_num_threads(1)  # small tensors; steadier times when tests share the machine

import mup2_fused
import mup2_ref


def pytest_collection_modifyitems(items):
    if not (torch.cuda.is_available() and mup2_fused.built_with_cuda):
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and mup2_fused built with CUDA")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


IMPLEMENTATIONS = {"mup2_ref": mup2_ref.SAM, "mup2_fused": mup2_fused.SAM}


@pytest.fixture(params=IMPLEMENTATIONS)
def SAM(request):
    """Every implementation of the optimizer: what holds for the reference holds for the others."""
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

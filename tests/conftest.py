"""Fixtures for all tests: the product's two backends, the devices of this machine, and a fixed seed."""

from functools import partial

import pytest
import torch

torch.set_num_threads(1)  # small tensors; times are steadier when tests share the machine


def _has_cuda_kernels() -> bool:
    import mup2_fused

    return torch.cuda.is_available() and mup2_fused.built_with_cuda


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("cuda") for item in items) and not _has_cuda_kernels():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and mup2_fused built with CUDA")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.fixture(params=["torch", "compiled"])
def backend(request):
    """The product's backends: what holds for one holds for the other."""
    return request.param


@pytest.fixture
def SAM(backend):
    """The product's optimizer, with each backend in turn."""
    import mup2_fused

    return partial(mup2_fused.SAM, backend=backend)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device that this machine has."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

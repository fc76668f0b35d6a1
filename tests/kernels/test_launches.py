"""How tensors become launches: chunks, batches, threads and instruction sets. None of these may change a result."""

import ast
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CHUNK, F32, tensors
from torch import nn

import mup2_fused
import mup2_ref
from mup2_fused import _C


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**33 + 8191])
def test_the_walk_over_tensors_beyond_2_to_the_31(size):
    """Index arithmetic of every kernel, without the memory: chunk by chunk, nothing twice, nothing left out."""
    sizes = [5, size, 7 * CHUNK + 1, 0, 3]
    last = -(-size // CHUNK)  # last chunk of the large tensor, which begins with chunk 1
    found = _C.walk(sizes, [0, 1, 2, last - 1, last, last + 1, last + 8, last + 9])
    walked = [(0, 0), (1, 0), (1, 1), (1, last - 2), (1, last - 1), (2, 0), (2, 7), (4, 0)]  # (tensor, chunk of it)
    assert found == [(t, i * CHUNK, min(CHUNK, sizes[t] - i * CHUNK)) for t, i in walked]


def test_the_walk_over_many_tensors_covers_each_element_once():
    sizes = [1 + (i * 37) % (2 * CHUNK) for i in range(3000)]
    chunks = sum(-(-n // CHUNK) for n in sizes)
    found = _C.walk(sizes, list(range(chunks)))
    assert [sum(n for t, _, n in found if t == i) for i in range(0, 3000, 500)] == sizes[::500]
    assert sum(n for _, _, n in found) == sum(sizes) and len(found) == chunks
    assert all(_C.walk(sizes, [chunk]) == [found[chunk]] for chunk in range(0, chunks, 97))


SGD, ADAMW = (torch.optim.SGD, dict(momentum=0.9)), (torch.optim.AdamW, dict(eps=1e-4))
HUNDRED_GROUPS = [([3], dict(lr=0.001 * i, rho=0.01 * i)) for i in range(1, 101)]
MANY_TENSORS = [([1 + i % 7 for i in range(2500)], dict(lr=0.01, rho=0.5))]


@pytest.mark.parametrize("groups, base", [(HUNDRED_GROUPS, SGD), (MANY_TENSORS, SGD), (MANY_TENSORS, ADAMW)])
def test_more_groups_or_tensors_than_a_launch_holds(device, groups, base):
    """Two steps give the parameters that the reference gives."""
    assert 2500 > 2 * max(_C.tensors_per_launch.values())
    results = []
    for SAM, own in ((mup2_fused.SAM, {"backend": "compiled"}), (mup2_ref.SAM, {})):
        torch.manual_seed(0)
        mine = [dict(params=list(map(nn.Parameter, tensors(F32, device, sizes)))) | o for sizes, o in groups]
        opt = SAM(mine, base[0], **base[1], **own)
        results.append([p for group in mine for p in group["params"]])
        for half_step in (opt.first_step, opt.second_step) * 2:
            for p in results[-1]:
                p.grad = (p.detach() - 0.3) ** 3
            half_step()
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def step_hashes():
    """Per dtype and variant, the hashes of (norms and climbed weights, updated weights)."""
    torch.manual_seed(0)
    hashes = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for variant in ("sam", "elementwise", "layerwise"):
            params = [nn.Parameter(torch.randn(n).to(dtype)) for n in (3, 100_003, 40_000, 8192)]
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            opt = mup2_fused.SAM(params, rho=0.1, variant=variant, lr=0.1, backend="compiled")
            digest = lambda: hashlib.sha256(b"".join(p.detach().double().numpy().tobytes() for p in params)).hexdigest()
            before = digest()
            opt.first_step()
            climbed = digest()
            assert climbed != before and all(p.isfinite().all() for p in params)
            opt.second_step()
            hashes.append((f"{climbed} {opt.passes.norms()}", digest()))
    return hashes


def test_the_same_bits_for_any_number_of_threads():
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            runs.append(step_hashes())
    finally:
        torch.set_num_threads(threads)
    assert runs[0] == runs[1] == runs[2]


def test_norm_and_perturbation_have_the_same_bits_on_any_cpu():
    """Updates have the same bits on all processors with FMA, as torch's own have. An unknown name is an error."""
    code = "import test_launches; print(test_launches._C.instruction_set, test_launches.step_hashes())"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {
        name: subprocess.Popen([sys.executable, "-c", code], env=environment | {"MUP2_CPU": name}, **options)
        for name in ("baseline", "avx2", "neon")
    }
    printed = {name: process.communicate() for name, process in processes.items()}
    assert "MUP2_CPU is baseline, avx2 or avx512, not neon" in printed["neon"][1] and processes["neon"].returncode
    results = {name: ast.literal_eval(out.split(" ", 1)[1]) for name, (out, _) in printed.items() if out}
    assert printed["baseline"][0].split()[0] == "baseline"
    best = step_hashes()
    for result in results.values():
        assert [climbed for climbed, _ in result] == [climbed for climbed, _ in best]
    if _C.instruction_set != "baseline":
        assert results["avx2"] == best

"""How tensors become launches: chunks, batches, threads and instruction sets. None of these may change a result."""

import ast
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import CHUNK, F32, clones, equal, tensors
from torch import nn

import mup2_fused
import mup2_ref
from mup2_fused import _C

ops = torch.ops.mup2
CLIMBED, UPDATED = 0, 1

# ------------------------------------------------------------------------------------------------ chunks and batches


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**31 + 5, 2**33 + 8191])
def test_the_walk_over_tensors_beyond_2_to_the_31(size):
    """Index arithmetic of every kernel, without the memory: chunk by chunk, nothing twice, nothing left out."""
    sizes = [5, size, 7 * CHUNK + 1, 0, 3]
    chunks = -(-size // CHUNK)  # of the large tensor
    third, last = 1 + chunks, chunks  # first chunk of the third tensor, last chunk of the large one
    found = _C.walk(sizes, [0, 1, 2, last - 1, last, third, third + 7, third + 8])
    assert found == [
        (0, 0, 5),
        (1, 0, CHUNK),
        (1, CHUNK, CHUNK),
        (1, (last - 2) * CHUNK, CHUNK),
        (1, (last - 1) * CHUNK, size - (last - 1) * CHUNK),
        (2, 0, CHUNK),
        (2, 7 * CHUNK, 1),
        (4, 0, 3),
    ]


def test_the_walk_over_many_tensors_covers_each_element_once():
    sizes = [1 + (i * 37) % (2 * CHUNK) for i in range(3000)]
    chunks = sum(-(-n // CHUNK) for n in sizes)
    found = _C.walk(sizes, list(range(chunks)))
    assert [sum(n for t, _, n in found if t == i) for i in range(0, 3000, 500)] == sizes[::500]
    assert sum(n for _, _, n in found) == sum(sizes) and len(found) == chunks
    assert all(_C.walk(sizes, [chunk]) == [found[chunk]] for chunk in range(0, chunks, 97))


def two_steps_of_both(groups, device, base, **kwargs):
    """Parameters after two steps with each of the two optimizers. groups: (sizes, options)."""
    results = []
    for SAM in (mup2_fused.SAM, mup2_ref.SAM):
        torch.manual_seed(0)
        own = [dict(params=list(map(nn.Parameter, tensors(F32, device, sizes)))) | options for sizes, options in groups]
        opt = SAM(own, base, **kwargs, **({"backend": "compiled"} if SAM is mup2_fused.SAM else {}))
        params = [p for group in own for p in group["params"]]
        for half_step in (opt.first_step, opt.second_step) * 2:
            for p in params:
                p.grad = (p.detach() - 0.3) ** 3
            half_step()
        results.append(params)
    return results


def test_more_groups_than_a_launch_holds(device):
    groups = [([3], dict(lr=0.001 * i, rho=0.01 * i)) for i in range(1, 101)]
    ours, reference = two_steps_of_both(groups, device, torch.optim.SGD, momentum=0.9)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_more_tensors_than_a_launch_holds(device, base):
    sizes = [1 + i % 7 for i in range(2500)]
    assert len(sizes) > 2 * max(_C.tensors_per_launch.values())
    groups = [(sizes, dict(lr=0.01, rho=0.5) | ({"eps": 1e-4} if base is torch.optim.AdamW else {}))]
    ours, reference = two_steps_of_both(groups, device, base)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


def test_gradients_packed_without_padding(device):
    """As DistributedDataParallel's gradient_as_bucket_view has them: no address is a multiple of 16 bytes."""
    w = tensors(F32, device, (5, 3, 1027, 9000))
    bucket = torch.randn(1 + sum(map(len, w)), device=device)
    packed = bucket[1:].split([len(x) for x in w])
    results = []
    for g in (packed, clones(packed)):
        x, backup, m = clones(w), clones(w), [torch.zeros_like(y) for y in w]
        _, c, _, nonfinite = ops.joint_norm(x, g, [0.5] * len(w), [1.0] * len(w), "sam")
        ops.perturb_(x, g, backup, c, "sam")
        moved = clones(x)
        ops.sgd_(x, g, backup, m, torch.tensor(0.1), momentum=0.9, skip=nonfinite)
        results.append(moved + x + m)
    assert equal(*results) and not equal(moved, w)


# ------------------------------------------------------------------------------------------------ threads, processors


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


def with_instruction_set(name, code):
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"MUP2_CPU": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


def test_norm_and_perturbation_have_the_same_bits_on_any_cpu():
    """Updates have the same bits on all processors with FMA, as torch's own have. An unknown name is an error."""
    code = "import test_launches; print(test_launches._C.instruction_set, test_launches.step_hashes())"
    processes = {name: with_instruction_set(name, code) for name in ("baseline", "avx2", "neon")}
    printed = {name: process.communicate() for name, process in processes.items()}
    assert "MUP2_CPU is baseline, avx2 or avx512, not neon" in printed["neon"][1] and processes["neon"].returncode
    results = {name: ast.literal_eval(out.split(" ", 1)[1]) for name, (out, _) in printed.items() if out}
    assert printed["baseline"][0].split()[0] == "baseline"
    best = step_hashes()
    for result in results.values():
        assert [hashes[CLIMBED] for hashes in result] == [hashes[CLIMBED] for hashes in best]
    if _C.instruction_set != "baseline":
        assert results["avx2"] == best

"""The CUDA kernels without torch and without a GPU: their source run on the CPU, under sanitizers, and through nvcc."""

import collections
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import a10g

CSRC, HARNESS = Path(__file__).parents[2] / "csrc", Path(__file__).parent / "cuda_on_cpu"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
SOURCES = [HARNESS / "parity.cpp", CSRC / "cpu" / "baseline.cpp", CSRC / "cpu" / "avx2.cpp", *KERNELS]
COMMON = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
FMA = "fma" in Path("/proc/cpuinfo").read_text()  # then against the AVX2 kernels, in the rounding that a GPU has
KINDS = {
    "plain": ["-O2", *(["-mavx2", "-mfma"] if FMA else [])],
    # Fewer threads per block, because sanitizers are slow.
    "address": ["-O1", "-DMUP2_THREADS=64", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-DMUP2_THREADS=64", "-fsanitize=thread"],
}
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def compile_all(folder, kind, sources, include=CSRC):
    """Object files of these sources in a folder, compiled at the same time."""
    targets = [folder / f"{source.name}.o" for source in sources]
    command = ["g++", *COMMON, *KINDS[kind], "-I", HARNESS, "-I", include, "-x", "c++", "-c"]
    compilers = [subprocess.Popen([*command, s, "-o", t]) for s, t in zip(sources, targets)]
    statuses = [compiler.wait() for compiler in compilers]
    assert not any(statuses)
    return targets


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Object files of a kind of build, each compiled once."""
    return functools.cache(lambda kind: compile_all(tmp_path_factory.mktemp(kind), kind, SOURCES))


def link_and_run(program, kind, objects, *arguments):
    subprocess.run(["g++", *KINDS[kind], *objects, "-o", program, "-pthread"], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)


QUICK = ("address", ["quick"])
SLOW = [("plain", []), ("address", []), ("thread", ["quick"])]


@needs_gcc
@pytest.mark.parametrize("kind, cases", [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_cuda_kernels_on_the_cpu(objects, tmp_path, kind, cases):
    """Bit for bit what the CPU kernels compute. Sanitizers look at both."""
    done = link_and_run(tmp_path / "parity", kind, objects(kind), *cases)
    assert done.returncode == 0 and " 0 differences" in done.stdout, done.stdout + done.stderr[:3000]


BARRIER = "  __syncthreads();  // the next sum overwrites the scratch\n"
MUTANTS = {  # what is broken: (kind of build, text in device.h, its replacement, a kernel that uses it, what is said)
    "barrier": ("thread", BARRIER, "", "norm.cu", "data race"),
    "fence before": ("thread", "    __threadfence();\n    scratch.last", "    scratch.last", "norm.cu", "data race"),
    "fence after": ("thread", "// ready for the next launch\n    __threadfence();", "", "norm.cu", "data race"),
    "tail": ("address", "if (aligned && left >= n) return", "if (aligned) return", "perturb.cu", "AddressSanitizer"),
}


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_synchronization_and_tails_are_caught(objects, tmp_path, mutant):
    kind, text, replacement, kernel, expected = MUTANTS[mutant]
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("torch"))
    header = tmp_path / "csrc" / "cuda" / "device.h"
    source = header.read_text()
    assert source.count(text) == 1
    header.write_text(source.replace(text, replacement))
    (broken,) = compile_all(tmp_path, kind, [tmp_path / "csrc" / "cuda" / kernel], tmp_path / "csrc")
    others = [target for target in objects(kind) if target.name != broken.name]
    done = link_and_run(tmp_path / "parity", kind, [broken, *others], "quick")
    assert done.returncode and expected in done.stderr


@pytest.fixture(scope="module")
def compiled():
    return a10g.compile_kernels(86)


def assert_nothing_spills(report):
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(usage) == len(registers) == 130 and set(usage) == {("0", "0", "0")}
    assert max(registers) <= 64, "four blocks of 256 threads must fit into a multiprocessor"


@needs_nvcc
def test_nvcc_spills_no_register_and_uses_as_many_as_is_committed(compiled):
    assert_nothing_spills(compiled[0])
    result = json.loads(a10g.OUT.read_text())
    if a10g.nvcc_version() != result["nvcc"]:
        pytest.skip("another nvcc may use more or fewer registers than those that are committed")
    assert a10g.kernels(compiled[0]) == result["kernels"]


@needs_nvcc
@pytest.mark.slow
def test_nvcc_spills_no_register_on_hopper():
    assert_nothing_spills(a10g.compile_kernels(90)[0])


@pytest.mark.parametrize("registers, blocks", [(32, 6), (40, 6), (41, 5), (64, 4), (65, 3), (255, 1)])
def test_occupancy(registers, blocks):
    assert a10g.occupancy(registers) == (blocks, blocks / 6)


def loops(entry):
    """Bodies of the loops of one function in PTX: from a label to a branch back to it."""
    lines = entry.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$\w+):", line))}
    branches = [(i, m[1]) for i, line in enumerate(lines) if (m := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line))]
    return ["\n".join(lines[labels[to] : i]) for i, to in branches if labels[to] <= i]


@needs_nvcc
def test_no_float64_arithmetic_per_element(compiled):
    """Cards such as the A10G do 1/64 as much of it as of float32.

    The norm also has loops in float64, for chunks whose sum in float32 is not finite.
    """
    float64 = re.compile(r"\b(?!ld|st|mov)\w+[.\w]*\.f64")
    seen = collections.Counter()
    for entry in compiled[1].split(".entry ")[1:]:
        kernel, kind, w = re.match(r".*?(\w+)_kernel(?:<([\w:]+), ([\w:]+),)?", entry).groups()
        if w in (None, "double"):
            continue
        of_elements = [body for body in loops(entry) if re.search(r"ld\.global(?!\S*f64)", body)]
        if kernel == "norm":
            fast = [body for body in of_elements if not float64.search(body) and "add" in body]
            assert len(fast) == (2 if kind == "2" else 1), entry[:200]
        else:
            written = [body for body in of_elements if "st.global" in body]
            assert written and not any(map(float64.search, written)), entry[:200]
        seen[kernel] += 1
    assert seen == {"norm": 3 * 5 * 2, "perturb": 2 * 5 * 2, "update": 2 * 2 * 5 * 2}, seen

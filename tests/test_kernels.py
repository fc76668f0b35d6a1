"""The kernels without torch and without a GPU: the CUDA source run on the CPU, sanitizers, what nvcc makes of it."""

import collections
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import a10g

CSRC, HARNESS = ROOT / "csrc", ROOT / "tests" / "cuda_on_cpu"
SOURCES = [HARNESS / "parity.cpp", CSRC / "cpu_baseline.cpp", CSRC / "cpu_avx2.cpp"]
COMMON = [
    "-std=c++20",
    "-g",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
FMA = "fma" in Path("/proc/cpuinfo").read_text()  # then against the AVX2 kernels, in the rounding that a GPU has
KINDS = {
    "plain": ["-O2", *(["-mavx2", "-mfma"] if FMA else [])],
    # Fewer threads per block: sanitizers are slow.
    "address": ["-O1", "-DMUP2_THREADS=64", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-DMUP2_THREADS=64", "-fsanitize=thread"],
}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compiles what a kind of program needs; all but the CUDA kernels once."""
    objects = {}

    def start(kind, source, target):
        command = ["g++", *COMMON, *KINDS[kind], "-I", HARNESS, "-I", CSRC, "-x", "c++", "-c", source, "-o", target]
        return subprocess.Popen(command)

    def build(folder, kind, kernels=CSRC / "cuda_kernels.cu"):
        compilers = [start(kind, kernels, folder / "kernels.o")]
        if kind not in objects:
            common = tmp_path_factory.mktemp(kind)
            objects[kind] = [common / f"{source.stem}.o" for source in SOURCES]
            compilers += [start(kind, source, target) for source, target in zip(SOURCES, objects[kind])]
        statuses = [compiler.wait() for compiler in compilers]
        assert not any(statuses)
        program = folder / "parity"
        link = ["g++", *KINDS[kind], folder / "kernels.o", *objects[kind], "-o", program, "-pthread"]
        subprocess.run(link, check=True)
        return program

    return build


def run(program, *arguments):
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_kernels_on_the_cpu(build, kind, tmp_path):
    """Bit for bit what the CPU kernels compute; sanitizers look at both."""
    done = run(build(tmp_path, kind), *(["small"] if kind == "thread" else []))
    assert done.returncode == 0 and " 0 differences" in done.stdout, done.stdout + done.stderr[:3000]


BARRIER = "  __syncthreads();  // the next sum overwrites the scratch\n"
MUTANTS = {  # what is broken: (kind of build, text, its replacement, what must be said)
    "barrier": ("thread", BARRIER, "", "data race"),
    "fence before": ("thread", "    __threadfence();\n    scratch.last", "    scratch.last", "data race"),
    "fence after": ("thread", "// ready for the next launch\n    __threadfence();", "", "data race"),
    "tail": ("address", "  if (aligned && left >= n) return", "  if (aligned && left > 0) return", "AddressSanitizer"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_broken_synchronization_and_tails_are_caught(build, mutant, tmp_path):
    kind, text, replacement, expected = MUTANTS[mutant]
    source = (CSRC / "cuda_kernels.cu").read_text()
    assert source.count(text) == 1
    broken = tmp_path / "broken.cu"
    broken.write_text(source.replace(text, replacement))
    done = run(build(tmp_path, kind, broken), "one")
    assert done.returncode and expected in done.stderr


@pytest.fixture(scope="module")
def reports():
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return {architecture: a10g.compile_report(architecture) for architecture in (86, 90)}


@pytest.mark.parametrize("architecture", [86, 90])
def test_nvcc_spills_no_register(reports, architecture):
    report = reports[architecture]
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(usage) == len(registers) >= 60 and set(usage) == {("0", "0", "0")}
    assert max(registers) <= 64, "four blocks of 256 threads must fit into a multiprocessor"


def test_the_committed_registers_are_those_of_this_source(reports):
    result = json.loads(a10g.OUT.read_text())
    if a10g.nvcc_version() != result["nvcc"]:
        pytest.skip("another nvcc may count others")
    assert a10g.kernels(reports[86]) == result["kernels"]


@pytest.mark.parametrize("registers, blocks", [(32, 6), (40, 6), (41, 5), (64, 4), (65, 3), (255, 1)])
def test_occupancy(registers, blocks):
    assert a10g.occupancy(registers) == (blocks, blocks / 6)


def loops(entry):
    """Bodies of the loops of one function in PTX: from a label to a branch back to it."""
    lines = entry.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$\w+):", line))}
    branches = [(i, m[1]) for i, line in enumerate(lines) if (m := re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line))]
    return ["\n".join(lines[labels[to] : i]) for i, to in branches if labels[to] <= i]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_no_float64_arithmetic_per_element(tmp_path):
    """Cards such as the A10G do 1/64 as much of it as of float32.

    The norm has loops in float64 besides, for chunks whose sum in float32 was not finite.
    """
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-arch=compute_86", "-ptx", CSRC / "cuda_kernels.cu"]
    subprocess.run([*command, "-o", tmp_path / "kernels.ptx"], check=True)
    with (tmp_path / "kernels.ptx").open() as file:
        ptx = subprocess.run(["c++filt"], stdin=file, capture_output=True, text=True, check=True).stdout
    float64 = re.compile(r"\b(?!ld|st|mov)\w+[.\w]*\.f64")
    seen = collections.Counter()
    for entry in ptx.split(".entry ")[1:]:
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
    assert seen == {"norm": 3 * 5 * 2, "perturb": 2 * 5 * 2, "update": 2 * 5 * 2}, seen

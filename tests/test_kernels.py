"""The kernels without torch and without a GPU: the CUDA source run on the CPU, sanitizers, what nvcc makes of it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

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


def build(folder, kind, kernels=CSRC / "cuda_kernels.cu"):
    program = folder / "parity"
    include = ["-I", HARNESS, "-I", CSRC]
    command = ["g++", *COMMON, *KINDS[kind], *include, "-x", "c++", kernels, *SOURCES, "-o", program, "-pthread"]
    subprocess.run(command, check=True)
    return program


def run(program, *arguments):
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_kernels_on_the_cpu(kind, tmp_path):
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
def test_broken_synchronization_and_tails_are_caught(mutant, tmp_path):
    kind, text, replacement, expected = MUTANTS[mutant]
    source = (CSRC / "cuda_kernels.cu").read_text()
    assert source.count(text) == 1
    broken = tmp_path / "broken.cu"
    broken.write_text(source.replace(text, replacement))
    done = run(build(tmp_path, kind, broken), "one")
    assert done.returncode and expected in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_spills_no_register(tmp_path):
    targets = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in (86, 90)]
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas", "-v", "--threads", "2", *targets]
    command += ["-c", CSRC / "cuda_kernels.cu", "-o", tmp_path / "kernels.o"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(usage) == len(registers) >= 2 * 60 and set(usage) == {("0", "0", "0")}
    assert max(registers) <= 64, "four blocks of 256 threads must fit into a multiprocessor"

"""Builds csrc/ into mup2_fused._C: for the CPU always, for CUDA where torch has it and a toolkit is (no GPU needed).

MUP2_CUDA=1 insists on CUDA, MUP2_CUDA=0 leaves it out; CUDA_HOME names the toolkit; TORCH_CUDA_ARCH_LIST the GPUs.
"""

import os
import platform
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ARCHITECTURES = "7.5;8.0;8.6;9.0+PTX"  # T4, A100, A10G, H100, and whatever comes after


def toolkit():
    """Folder of a CUDA toolkit of torch's major version, or None and the reason."""
    reason = "no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found: set CUDA_HOME to its folder"
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME, "/usr/local/cuda"]
    for guess in filter(None, guesses):
        if not all(Path(guess, file).is_file() for file in ("bin/nvcc", "include/cuda.h", "include/cuda_runtime.h")):
            continue
        lines = Path(guess, "include", "cuda.h").read_text().splitlines()
        version = int(next(line for line in lines if line.startswith("#define CUDA_VERSION")).split()[-1])
        if version < 12010:
            reason = f"the toolkit in {guess} is older than CUDA 12.1, whose kernels take 32 KB of parameters"
        elif version // 1000 != int(torch.version.cuda.split(".")[0]):
            reason = f"the toolkit in {guess} is CUDA {version // 1000}, torch's is {torch.version.cuda}"
        else:
            return guess, ""
    return None, reason


def cuda():
    """The toolkit's folder, or None to build for the CPU only; and a line that says why."""
    wish = os.environ.get("MUP2_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MUP2_CUDA is 0 or 1, not {wish!r}")
    home, reason = toolkit() if torch.version.cuda else (None, f"torch {torch.__version__} is built without CUDA")
    if wish == "1" and home is None:
        raise SystemExit(f"MUP2_CUDA=1, but {reason}")
    return (None, "MUP2_CUDA=0") if wish == "0" else (home, reason)


def extension():
    home, reason = cuda()
    sources = ["bindings.cpp", "cpu_baseline.cpp", "cpu_avx2.cpp", "cpu_avx512.cpp"]
    # No contraction of a * b + c: rounding as in mup2_ref.py. No errno, no traps: loops with sqrt vectorize.
    cxx = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    depends = sorted(map(str, Path("csrc").glob("*")))  # and so they are part of a source distribution
    options = {"include_dirs": ["csrc"], "depends": depends, "extra_compile_args": {"cxx": cxx}}
    options["extra_link_args"] = ["-fopenmp"]
    if home:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
        sources.append("cuda_kernels.cu")
        options["define_macros"] = [("MUP2_CUDA", None)]
        options["extra_compile_args"]["nvcc"] = ["-O3", "-fmad=false", "--threads", "0"]
    built = f"CUDA ({os.environ['TORCH_CUDA_ARCH_LIST']}, {home})" if home else f"no CUDA: {reason}"
    print(f"mup2_fused: CPU ({platform.machine()}), {built}; torch {torch.__version__}")
    kind = cpp_extension.CUDAExtension if home else cpp_extension.CppExtension
    return kind("mup2_fused._C", [f"csrc/{name}" for name in sources], **options)


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
